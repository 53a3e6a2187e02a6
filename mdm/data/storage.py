"""Objects under a prefix, in an S3 bucket or a local folder: the one door to boto3.

An object appears whole or not at all. Credentials and endpoint come from the standard AWS chain
(environment, profile, instance role; `AWS_ENDPOINT_URL`, and `AWS_REQUEST_CHECKSUM_CALCULATION=
when_required` for servers that do not know the newer checksums); none is ever printed.
"""

import contextlib
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import SystemRandom
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions

T = TypeVar("T")

# Jitter wants no reproducibility: ranks that fail together must not retry together.
_JITTER = SystemRandom()
_TEMPORARY = ".tmp-"


class StoreError(RuntimeError):
    """Storage failed for good; the message is one line for the user."""


class MissingObjectError(StoreError):
    """The object is not there."""


@dataclass(frozen=True)
class StoreOptions:
    """How long to try. Times in seconds."""

    attempts: int = 6
    backoff: float = 0.2  # the n-th pause is drawn from [0, min(backoff_cap, backoff * 2**n))
    backoff_cap: float = 5.0
    deadline: float = 60.0  # of one operation with all its attempts
    connect_timeout: float = 3.0
    read_timeout: float = 20.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; at least one is needed")


class Store(ABC):
    """Objects named by keys such as `shards/ab12.arrow` below one `uri`."""

    uri: str

    @abstractmethod
    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:
        """Write an object whole; False if `if_absent` and it was there already."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object; MissingObjectError if it is not there."""

    @abstractmethod
    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; StoreError if the object ends before."""

    @abstractmethod
    def listing(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the objects whose key begins with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; removing one that is not there is no error."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what killed writers left half-written, which no listing shows."""

    def exists(self, key: str) -> bool:
        """Whether there is an object with exactly this key."""
        return key in self.listing(key)


def open_store(uri: str, options: StoreOptions | None = None) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain folder.

    Nothing is contacted or created yet. ValueError for another scheme or a missing bucket name.
    """
    if uri.startswith("s3://"):
        return S3Store(uri, options or StoreOptions())
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{uri!r} names a host; write file:///absolute/folder")
        return LocalStore(Path(parts.path))
    if "://" in uri:
        raise ValueError(f"{uri!r} is no store; use s3://bucket/prefix, file:///folder or a folder")
    return LocalStore(Path(uri))


def join(uri: str, name: str) -> str:
    """The URI of `name` below `uri`."""
    return f"{uri.rstrip('/')}/{name}"


def _checked(key: str) -> str:
    if key.startswith("/") or ".." in key.split("/") or "//" in key:
        raise ValueError(f"{key!r} is not a key: it must stay below its store")
    return key


class LocalStore(Store):
    """A folder. Objects are written aside, flushed to disk, then linked to their name."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:  # noqa: D102
        path = self.root / _checked(key)
        if if_absent and path.exists():
            return False
        aside = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            made = [parent for parent in path.parents if not parent.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                # A link, unlike a rename, fails if the name was taken in the meantime.
                os.link(aside, path) if if_absent else os.replace(aside, path)
            except FileExistsError:
                return False
            finally:
                aside.unlink(missing_ok=True)
            for folder in (path.parent, *(parent.parent for parent in made)):
                _sync_folder(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)  # a full disk needs the room
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
        return True

    def get(self, key: str) -> bytes:  # noqa: D102
        path = self.root / _checked(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObjectError(f"{path} does not exist") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error

    def read_range(self, key: str, offset: int, length: int) -> bytes:  # noqa: D102
        path = self.root / _checked(key)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(length)
                while len(data) < length and (more := file.read(length - len(data))):
                    data += more
        except FileNotFoundError:
            raise MissingObjectError(f"{path} does not exist") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        if len(data) != length:
            raise StoreError(f"{path} ends at byte {offset + len(data)}, before {offset + length}")
        return data

    def listing(self, prefix: str = "") -> dict[str, int]:  # noqa: D102
        folder = self.root / _checked(prefix).rpartition("/")[0]
        found: dict[str, int] = {}
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(_TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                        found[key] = path.stat().st_size
        return dict(sorted(found.items()))

    def delete(self, key: str) -> None:  # noqa: D102
        path = self.root / _checked(key)
        path.unlink(missing_ok=True)
        # S3 has no folders: none stays behind empty here either.
        for parent in path.parents:
            if parent == self.root or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()

    def sweep(self) -> None:  # noqa: D102
        for parent, _, names in os.walk(self.root):
            for name in names:
                if name.startswith(_TEMPORARY):
                    Path(parent, name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Making a client costs a third of a second and many stores share a server: one a process. One
# inherited across a fork would share its sockets and stall, hence the process id.
@lru_cache(maxsize=8)
def _client(_pid: int, options: StoreOptions, _environment: tuple[tuple[str, str], ...]) -> Any:
    config = botocore.config.Config(
        connect_timeout=options.connect_timeout,
        read_timeout=options.read_timeout,
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
    )
    session = boto3.session.Session()
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


_CLIENTS_LOCK = threading.Lock()


class S3Store(Store):
    """A prefix in a bucket, with our own bounded retries instead of botocore's."""

    def __init__(self, uri: str, options: StoreOptions) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        self.uri = uri.rstrip("/")
        self.options = options
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""

    @property
    def _client(self) -> Any:
        environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
        with _CLIENTS_LOCK:
            return _client(os.getpid(), self.options, environment)

    def _name(self, key: str) -> str:
        return self._prefix + _checked(key)

    def _call(self, operation: str, key: str, request: Callable[[], T]) -> T:
        """`request()`, tried again after passing faults with full-jitter pauses."""
        what = f"{operation} s3://{self._bucket}/{self._prefix}{key}"
        began = time.monotonic()
        for attempt in range(1, self.options.attempts + 1):
            try:
                return request()
            except botocore.exceptions.NoCredentialsError:
                raise StoreError(
                    f"{what}: no AWS credentials (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "a profile or a role)"
                ) from None
            except botocore.exceptions.ClientError as error:
                self._raise_if_final(what, error)
                reason = f"server answered {error.response.get('Error', {}).get('Code', '?')}"
            except (
                botocore.exceptions.ConnectionError,
                botocore.exceptions.HTTPClientError,
                botocore.exceptions.ResponseStreamingError,
                botocore.exceptions.IncompleteReadError,
                _ShortBodyError,
            ) as error:
                reason = type(error).__name__
            except botocore.exceptions.BotoCoreError as error:
                raise StoreError(f"{what}: {error}") from None
            pause = _JITTER.uniform(
                0, min(self.options.backoff_cap, self.options.backoff * 2**attempt)
            )
            spent = time.monotonic() - began
            if attempt == self.options.attempts or spent + pause > self.options.deadline:
                break
            time.sleep(pause)
        raise StoreError(
            f"{what} at {self._client.meta.endpoint_url} failed after {attempt} attempts in "
            f"{time.monotonic() - began:.1f} s: {reason}"
        )

    @staticmethod
    def _raise_if_final(what: str, error: Any) -> None:
        """Pass over what a later attempt may cure; name the rest."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            raise StoreError(f"{what}: the bucket does not exist") from None
        if status == 404:
            raise MissingObjectError(f"{what}: no such object") from None
        if code == "PreconditionFailed" or status == 412:
            raise _TakenError from None
        if status < 500 and code not in (
            "ConditionalRequestConflict",
            "RequestTimeout",
            "SlowDown",
            "TooManyRequests",
            "Throttling",
        ):
            raise StoreError(f"{what}: the server refused it ({code or status})") from None

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:  # noqa: D102
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        body = bytes(data)  # botocore takes no views
        try:
            self._call(
                "write",
                key,
                lambda: self._client.put_object(
                    Bucket=self._bucket, Key=self._name(key), Body=body, **condition
                ),
            )
        except _TakenError:
            return False
        return True

    def get(self, key: str) -> bytes:  # noqa: D102
        return self._call("read", key, lambda: self._body(key, None))

    def read_range(self, key: str, offset: int, length: int) -> bytes:  # noqa: D102
        data = self._call("read", key, lambda: self._body(key, (offset, length)))
        if len(data) != length:
            raise StoreError(
                f"{self.uri}/{key} ends at byte {offset + len(data)}, before {offset + length}"
            )
        return data

    def _body(self, key: str, span: tuple[int, int] | None) -> bytes:
        wanted = {} if span is None else {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
        answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key), **wanted)
        data: bytes = answer["Body"].read()
        if len(data) != answer["ContentLength"]:
            raise _ShortBodyError
        return data

    def listing(self, prefix: str = "") -> dict[str, int]:  # noqa: D102
        found: dict[str, int] = {}
        token: dict[str, str] = {}
        while True:
            page = self._call(
                "list",
                prefix,
                lambda: self._client.list_objects_v2(
                    Bucket=self._bucket,
                    Prefix=self._name(prefix),
                    **token,  # noqa: B023
                ),
            )
            for item in page.get("Contents", ()):
                found[item["Key"].removeprefix(self._prefix)] = item["Size"]
            if not page.get("IsTruncated"):
                return dict(sorted(found.items()))
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:  # noqa: D102
        self._call(
            "delete",
            key,
            lambda: self._client.delete_object(Bucket=self._bucket, Key=self._name(key)),
        )

    def sweep(self) -> None:  # noqa: D102
        return  # a PUT that did not finish leaves nothing

    def create_bucket(self) -> None:
        """Make the bucket unless it is there: for servers of one's own."""
        try:
            self._call("make", "", lambda: self._client.create_bucket(Bucket=self._bucket))
        except StoreError as error:
            if "BucketAlready" not in str(error):
                raise


class _TakenError(Exception):
    """If-None-Match found an object."""


class _ShortBodyError(Exception):
    """The body ended before its announced length."""
