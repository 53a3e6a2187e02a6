"""The interface of a store, its errors and its options."""

import dataclasses
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

ENVIRONMENT = "MDM_STORE_"  # MDM_STORE_DEADLINE=120, MDM_STORE_SSE=aws:kms, ...
# S3 refuses smaller parts, and more than ten thousand of them.
MIN_PART_BYTES = 5 << 20
CHECKSUMS = ("", "none", "CRC32", "SHA1", "SHA256", "CRC32C", "CRC64NVME")


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

    attempts: int = 6
    backoff: float = 0.2  # the n-th pause is drawn from [0, min(backoff_cap, backoff * 2**n))
    backoff_cap: float = 5.0
    deadline: float = 60.0  # of one request (one part of a large upload) with all its attempts
    connect_timeout: float = 3.0
    read_timeout: float = 20.0  # without a byte
    part_bytes: int = 16 << 20  # larger objects are uploaded in parts of this size
    sse: str = ""  # encryption at rest: AES256, aws:kms; "": the bucket's default
    sse_key_id: str = ""  # the key of aws:kms; "": the account's own
    # Checksum of uploads: an algorithm, "none" for servers that support none of them, or "":
    # AWS_REQUEST_CHECKSUM_CALCULATION decides (CRC32 if it is not set).
    checksum: str = ""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; at least 1 is needed")
        for name in ("deadline", "connect_timeout", "read_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.part_bytes < MIN_PART_BYTES:
            raise ValueError(f"part_bytes is {self.part_bytes}; S3 takes {MIN_PART_BYTES} or more")
        if self.sse not in ("", "AES256", "aws:kms"):
            raise ValueError(f"sse is {self.sse!r}; choose AES256, aws:kms or nothing")
        if self.sse_key_id and self.sse != "aws:kms":
            raise ValueError(f"sse_key_id is set, but sse is {self.sse!r}, not aws:kms")
        if self.checksum not in CHECKSUMS:
            raise ValueError(f"checksum is {self.checksum!r}; choose {', '.join(CHECKSUMS[1:])}")

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
