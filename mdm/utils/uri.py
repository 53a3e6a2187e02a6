"""`file://` URIs as folders, read as `pathlib.Path.from_uri` of Python 3.13 reads them."""

import os
from urllib.parse import unquote_to_bytes

FILE_URI = "file://"


def in_full(uri: str) -> str:
    """`file:/folder`, the short form of RFC 8089, as `file:///folder`; other text unchanged."""
    if uri.startswith("file:/") and not uri.startswith(FILE_URI):
        return FILE_URI + uri.removeprefix("file:")
    return uri


def folder_of(uri: str) -> str:
    """The path that a `file://` URI names; other text unchanged.

    Percent-encoded characters are decoded to bytes, as `Path.as_uri` encodes them; `#` and `?` are
    part of the name. Raises ValueError for another host, a missing path or a path with a NUL.
    """
    uri = in_full(uri)
    if not uri.startswith(FILE_URI):
        return uri
    host, slash, path = uri.removeprefix(FILE_URI).partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"{uri!r} names the host {host!r}; write file:///absolute/folder")
    folder = os.fsdecode(unquote_to_bytes(slash + path))
    if "\0" in folder:
        raise ValueError(f"{uri!r} names a path with a NUL, which no folder can have")
    return folder
