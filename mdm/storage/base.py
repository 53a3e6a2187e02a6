"""The interface of a store, its errors and its options."""

import dataclasses
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from mdm.utils.fields import POSITIVE, Rule, check_fields, doc, one_of

ENVIRONMENT = "MDM_STORE_"  # MDM_STORE_DEADLINE=120, MDM_STORE_SSE=aws:kms, ...
_PART = Rule(lambda size: size >= 5 << 20, "S3 takes 5 MiB (5242880) or more")
_SSE = Rule(lambda kind: kind in ("", "AES256", "aws:kms"), "choose AES256, aws:kms or nothing")
_CHECKSUM = one_of("", "none", "CRC32", "SHA1", "SHA256", "CRC32C", "CRC64NVME")


class StoreError(RuntimeError):
    """Storage failed for good; the message is one line for the user."""


class MissingObjectError(StoreError):
    """The object does not exist."""


class ChangedObjectError(StoreError):
    """The object was replaced since it was first read."""


@dataclass(frozen=True)
class StoreOptions:
    """How long to retry, and what S3 is asked for. Times are in seconds.

    Each can be set in the environment, as `MDM_STORE_` and its name in capitals.
    """

    attempts: int = doc(6, "of a request", POSITIVE)
    backoff: float = 0.2  # the n-th pause is drawn from [0, min(backoff_cap, backoff * 2**n))
    backoff_cap: float = 5.0
    deadline: float = doc(60.0, "of a request, or a part, with all its attempts", POSITIVE)
    connect_timeout: float = doc(3.0, "until a server answers", POSITIVE)
    read_timeout: float = doc(20.0, "without a byte", POSITIVE)
    part_bytes: int = doc(16 << 20, "larger objects are uploaded in parts of this size", _PART)
    sse: str = doc("", "encryption at rest; empty for the bucket's default", _SSE)
    sse_key_id: str = ""  # the key of aws:kms; "": the account's own
    # An algorithm, "none" for servers that support none of them, or "":
    # AWS_REQUEST_CHECKSUM_CALCULATION decides (CRC32 if it is not set).
    checksum: str = doc("", "checksum of uploads", _CHECKSUM)

    def __post_init__(self) -> None:
        check_fields(self, prefix="")
        if self.sse_key_id and self.sse != "aws:kms":
            raise ValueError(f"sse_key_id is set, but sse is {self.sse!r}, not aws:kms")

    @classmethod
    def from_environment(cls) -> "StoreOptions":
        """The options that the environment sets; ValueError names an invalid variable."""
        fields: dict[str, Any] = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        options: dict[str, object] = {}
        for variable, text in os.environ.items():
            name = variable.removeprefix(ENVIRONMENT).lower()
            if not variable.startswith(ENVIRONMENT):
                continue
            if name not in fields:
                raise ValueError(f"{variable} is not an option; choose from {', '.join(fields)}")
            try:
                options[name] = fields[name](text)
            except ValueError:
                raise ValueError(f"{variable} is {text!r}, not a number") from None
        return cls(**options)  # type: ignore[arg-type]


class Store(ABC):
    """Objects named by keys such as `shards/ab12.arrow` below one `uri`."""

    uri: str

    @abstractmethod
    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:
        """Writes a whole object; False if `if_absent` and it exists already."""

    @abstractmethod
    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        """Replaces the object if it has this ETag; returns its new ETag, or None if it differs."""

    @abstractmethod
    def read(self, key: str) -> tuple[bytes, str]:
        """The whole object and its ETag; MissingObjectError if it does not exist."""

    @abstractmethod
    def read_range(self, key: str, offset: int, length: int) -> bytes | memoryview:
        """Exactly `length` bytes from `offset`; StoreError if the object ends earlier.

        All ranges that a store reads of one S3 object come from one version of it:
        ChangedObjectError if it was replaced in between.
        """

    @abstractmethod
    def listing(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the objects whose key begins with `prefix`, sorted by key.

        Folder markers (see `is_folder_marker`) are left out.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object, if it exists."""

    @abstractmethod
    def sweep(self, *prefixes: str) -> None:
        """Removes partial objects of killed writers whose keys begin with one of `prefixes`.

        No listing shows them. It also ends uploads in progress: only the job that holds the lease
        of this store may call it, and only for the keys that it writes itself.
        """

    def get(self, key: str) -> bytes:
        """The whole object; MissingObjectError if it does not exist."""
        return self.read(key)[0]

    def exists(self, key: str) -> bool:
        """Whether an object has exactly this key."""
        return key in self.listing(key)


def is_folder_marker(key: str, size: int) -> bool:
    """Whether an object only stands for a folder; consoles, mounts and Hadoop create them.

    Its key ends in `/`, equals the prefix itself (and is then empty here), or ends in `_$folder$`.
    """
    return not key or key.endswith("/") or (not size and key.endswith("_$folder$"))


def checked(key: str) -> str:
    """`key`; ValueError if it would lie outside its store."""
    if key.startswith("/") or ".." in key.split("/") or "//" in key:
        raise ValueError(f"{key!r} is not a key: it must stay below its store")
    return key
