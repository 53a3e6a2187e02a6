"""Objects under a prefix, in an S3 bucket or a local folder, behind one small interface.

An object appears whole or not at all. Credentials and endpoint come from the standard AWS chain
(environment, profile, instance role; `AWS_ENDPOINT_URL`); none is ever printed. `StoreOptions` says
how long to try, and how S3 is asked to encrypt and to check what it is sent.
"""

import os
from pathlib import Path
from urllib.parse import quote

from mdm.storage.base import (
    ChangedObjectError,
    MissingObjectError,
    Store,
    StoreError,
    StoreOptions,
)
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

    Without `options` those of the environment count. Nothing is contacted or created yet.
    ValueError for another scheme, a missing bucket name, a `file://` URI of another host, or an
    option that makes no sense.
    """
    if uri.startswith("s3://"):
        return S3Store(uri, options or StoreOptions.from_environment())
    if not uri.startswith(FILE_URI) and "://" in uri:
        raise ValueError(f"{uri!r} is no store; use s3://bucket/prefix, file:///folder or a folder")
    return LocalStore(Path(folder_of(uri)))


def join(uri: str, name: str) -> str:
    """The URI of `name` below `uri`."""
    uri = in_full(uri)
    if uri.startswith(FILE_URI):
        return f"{FILE_URI}{uri.removeprefix(FILE_URI).rstrip('/')}/{quote(os.fsencode(name))}"
    return f"{uri.rstrip('/')}/{name}"
