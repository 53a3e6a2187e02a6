"""`file://` URIs as folders, read as `pathlib.Path.from_uri` of newer Pythons reads them."""

import os
from urllib.parse import unquote_to_bytes

FILE_URI = "file://"


def in_full(uri: str) -> str:
    """`file:/folder`, the short form of RFC 8089, as `file:///folder`; anything else as it is."""
    if uri.startswith("file:/") and not uri.startswith(FILE_URI):
        return FILE_URI + uri.removeprefix("file:")
    return uri


def folder_of(uri: str) -> str:
    """The path that a `file://` URI names; anything else as it is.

    What is percent-encoded is decoded to bytes, as `Path.as_uri` encoded it; `#` and `?` belong to
    the name. ValueError for another host, a missing path or one with a NUL.
    """
    uri = in_full(uri)
    if not uri.startswith(FILE_URI):
        return uri
    host, slash, path = uri.removeprefix(FILE_URI).partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"{uri!r} names the host {host!r}; write file:///absolute/folder")
    folder = os.fsdecode(unquote_to_bytes(slash + path))
    if "\0" in folder:
        raise ValueError(f"{uri!r} names a path with a NUL; no folder has one")
    return folder
