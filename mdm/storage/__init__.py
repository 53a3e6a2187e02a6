"""Objects under a prefix, in an S3 bucket or a local folder, behind one small interface.

An object appears whole or not at all. Credentials and endpoint come from the standard AWS chain
(environment, profile, instance role; `AWS_ENDPOINT_URL`); credentials are never printed.
`StoreOptions` sets how long to retry, and which encryption and checksums S3 is asked for.
"""

import os
from pathlib import Path
from urllib.parse import quote

from mdm.storage.base import ChangedObjectError, MissingObjectError, Store, StoreError, StoreOptions
from mdm.storage.local import LocalStore
from mdm.storage.s3 import S3Store
from mdm.utils.uri import FILE_URI, folder_of, in_full

__all__ = [
    "ChangedObjectError",
    "LocalStore",
    "MissingObjectError",
    "S3Store",
    "Store",
    "StoreError",
    "StoreOptions",
    "join",
    "open_store",
]


def open_store(uri: str, options: StoreOptions | None = None) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain folder.

    Without `options` those of the environment apply. Nothing is contacted or created yet.

    Raises:
        ValueError: the scheme is another, the bucket's name is missing, a `file://` URI names
            another host, or an option is invalid.
    """
    if uri.startswith("s3://"):
        return S3Store(uri, options or StoreOptions.from_environment())
    if not uri.startswith(FILE_URI) and "://" in uri:
        raise ValueError(
            f"{uri!r} is not a store; use s3://bucket/prefix, file:///folder or a folder"
        )
    return LocalStore(Path(folder_of(uri)))


def join(uri: str, name: str) -> str:
    """The URI of `name` below `uri`."""
    uri = in_full(uri)
    if uri.startswith(FILE_URI):
        return f"{FILE_URI}{uri.removeprefix(FILE_URI).rstrip('/')}/{quote(os.fsencode(name))}"
    return f"{uri.rstrip('/')}/{name}"
