"""The one door to boto3: a prefix in an S3 bucket, with our own bounded retries."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from random import SystemRandom
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
import botocore.parsers

from mdm.data.storage.base import (
    ChangedObjectError,
    MissingObjectError,
    Store,
    StoreError,
    StoreOptions,
    checked,
)

T = TypeVar("T")

# Jitter wants no reproducibility: ranks that fail together must not retry together.
_JITTER = SystemRandom()
_PIECE = 4 << 20  # bytes of a body read at a time: a broken one goes on behind the last piece
_PINS = 1 << 16  # objects whose version is remembered
_PARTS_AT_ONCE = 4
# Refusals that a later attempt may cure: a busy server, a body damaged on its way.
_PASSING = frozenset(
    (
        "ConditionalRequestConflict",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "TooManyRequests",
        "Throttling",
        "BadDigest",
        "IncompleteBody",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
    )
)
# A damaged header can look like a wrong key: worth two more attempts, not six.
_DOUBTFUL = frozenset(("SignatureDoesNotMatch", "InvalidDigest", "MalformedXML", "400"))


# Making a client costs a third of a second and many stores share a server: one a process. One
# inherited across a fork would share its sockets and stall, hence the process id.
@lru_cache(maxsize=8)
def _client(_pid: int, options: StoreOptions, _environment: tuple[tuple[str, str], ...]) -> Any:
    checks = {}
    if options.checksum:
        when = "when_required" if options.checksum == "none" else "when_supported"
        checks = {"request_checksum_calculation": when, "response_checksum_validation": when}
    config = botocore.config.Config(
        connect_timeout=options.connect_timeout,
        read_timeout=options.read_timeout,
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
        **checks,
    )
    session = boto3.session.Session()
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


_CLIENTS_LOCK = threading.Lock()


class S3Store(Store):
    """A prefix in a bucket."""

    def __init__(self, uri: str, options: StoreOptions) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        self.uri = uri.rstrip("/")
        self.options = options
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._pins: dict[str, str] = {}  # key -> ETag of the version that is being read

    @property
    def _client(self) -> Any:
        environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
        with _CLIENTS_LOCK:
            return _client(os.getpid(), self.options, environment)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked(key)}

    # ---- attempts

    def _call(self, operation: str, key: str, request: Callable[[float], T]) -> T:
        """`request(end)`, tried again after passing faults with full-jitter pauses.

        `end` is the deadline on the monotonic clock, for what takes long by itself.
        """
        what = f"{operation} s3://{self._bucket}/{self._prefix}{checked(key)}"
        began = time.monotonic()
        end = began + self.options.deadline
        for attempt in range(1, self.options.attempts + 1):
            try:
                return request(end)
            except botocore.exceptions.NoCredentialsError:
                raise StoreError(
                    f"{what}: no AWS credentials (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "a profile or a role)"
                ) from None
            except botocore.exceptions.ClientError as error:
                self._raise_if_final(what, error, attempt)
                reason = f"server answered {error.response.get('Error', {}).get('Code', '?')}"
            except (
                botocore.exceptions.ConnectionError,
                botocore.exceptions.HTTPClientError,
                botocore.exceptions.ResponseStreamingError,
                botocore.exceptions.IncompleteReadError,
                botocore.exceptions.FlexibleChecksumError,
                botocore.parsers.ResponseParserError,
                _BrokenBodyError,
            ) as error:
                reason = str(error) if isinstance(error, _BrokenBodyError) else type(error).__name__
            except botocore.exceptions.BotoCoreError as error:
                raise StoreError(f"{what}: {error}") from None
            except (ValueError, KeyError) as error:
                # Bits flipped in a header or in XML: nothing checks these.
                reason = f"the answer is garbled ({type(error).__name__})"
            pause = _JITTER.uniform(
                0, min(self.options.backoff_cap, self.options.backoff * 2**attempt)
            )
            if attempt == self.options.attempts or time.monotonic() + pause > end:
                break
            time.sleep(pause)
        raise StoreError(
            f"{what} at {self._client.meta.endpoint_url} failed after {attempt} attempts in "
            f"{time.monotonic() - began:.1f} s: {reason}"
        )

    @staticmethod
    def _raise_if_final(what: str, error: Any, attempt: int) -> None:
        """Pass over what a later attempt may cure; name the rest."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            raise StoreError(f"{what}: the bucket does not exist") from None
        if code == "PreconditionFailed" or status == 412:
            raise _OtherVersionError from None
        if status == 404:
            raise MissingObjectError(f"{what}: no such object") from None
        if code == "RequestTimeTooSkewed":
            there = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
            here = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
            raise StoreError(
                f"{what}: the server refused it ({code}): its clock says {there}, this machine's "
                f"{here}; set this one right (timedatectl set-ntp true)"
            ) from None
        if status < 500 and code not in _PASSING and not (code in _DOUBTFUL and attempt < 3):
            raise StoreError(f"{what}: the server refused it ({code or status})") from None

    # ---- writing

    def _asked_for(self) -> dict[str, str]:
        """What every upload asks for."""
        asked = {}
        if self.options.sse:
            asked["ServerSideEncryption"] = self.options.sse
        if self.options.sse_key_id:
            asked["SSEKMSKeyId"] = self.options.sse_key_id
        return asked | self._checksum()

    def _checksum(self) -> dict[str, str]:
        named = self.options.checksum not in ("", "none")
        return {"ChecksumAlgorithm": self.options.checksum} if named else {}

    def put(  # noqa: D102
        self, key: str, data: bytes | memoryview, *, if_absent: bool = False
    ) -> bool:
        self._pins.pop(key, None)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        try:
            view = memoryview(data).cast("B")
            if len(view) > self.options.part_bytes:
                self._put_in_parts(key, view, condition)
            else:
                self._put_whole(key, bytes(view), condition)  # botocore takes no views
        except _OtherVersionError:
            return False
        return True

    def replace(self, key: str, data: bytes, etag: str) -> str | None:  # noqa: D102
        self._pins.pop(key, None)
        try:
            answer = self._put_whole(key, data, {"IfMatch": etag})
        except (_OtherVersionError, MissingObjectError):
            return None
        return str(answer["ETag"])

    def _put_whole(self, key: str, data: bytes, condition: dict[str, str]) -> dict[str, Any]:
        more = condition | self._asked_for()
        return self._call(
            "write",
            key,
            lambda _: self._client.put_object(**self._at(key), Body=data, **more),
        )

    def _put_in_parts(self, key: str, data: memoryview, condition: dict[str, str]) -> None:
        """Parts, each with its own attempts; nothing of them stays if one fails for good."""
        if condition and self.exists(key):
            raise _OtherVersionError  # the server would only say so behind the last part
        begun = self._call(
            "write",
            key,
            lambda _: self._client.create_multipart_upload(**self._at(key), **self._asked_for()),
        )
        upload = self._at(key) | {"UploadId": begun["UploadId"]}
        size = max(self.options.part_bytes, -(-len(data) // 10_000))

        def send(number: int) -> dict[str, Any]:
            body = bytes(data[(number - 1) * size : number * size])
            answer = self._call(
                "write",
                f"{key} part {number}",
                lambda _: self._client.upload_part(
                    **upload, PartNumber=number, Body=body, **self._checksum()
                ),
            )
            sums = {
                k: v for k, v in answer.items() if k.startswith("Checksum") and k[-4:] != "Type"
            }
            return {"PartNumber": number, "ETag": answer["ETag"], **sums}

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                sent = [pool.submit(send, number) for number in range(1, -(-len(data) // size) + 1)]
                try:
                    parts = [part.result() for part in sent]
                except StoreError:
                    pool.shutdown(cancel_futures=True)
                    raise
            self._complete(key, upload, parts, condition, len(data))
        except BaseException:
            self._abort(upload)
            raise

    def _complete(
        self,
        key: str,
        upload: dict[str, str],
        parts: list[dict[str, Any]],
        condition: dict[str, str],
        size: int,
    ) -> None:
        try:
            self._call(
                "write",
                key,
                lambda _: self._client.complete_multipart_upload(
                    **upload, MultipartUpload={"Parts": parts}, **condition
                ),
            )
        except MissingObjectError:
            # Completed before, and the answer was lost: then it is there.
            if self.listing(key).get(key) != size:
                raise StoreError(f"write {self.uri}/{key}: the server lost the upload") from None

    def _abort(self, upload: dict[str, str]) -> None:
        """Give an upload's parts back, as far as the server can be reached."""
        try:
            self._call("abort", "", lambda _: self._client.abort_multipart_upload(**upload))
        except (StoreError, _OtherVersionError):
            return  # `sweep` finds it later

    def sweep(self) -> None:  # noqa: D102
        marker: dict[str, str] = {}
        while True:
            try:
                page = self._call(
                    "list uploads below",
                    "",
                    lambda _: self._client.list_multipart_uploads(
                        Bucket=self._bucket,
                        Prefix=self._prefix,
                        **marker,  # noqa: B023
                    ),
                )
            except StoreError as error:
                if "NotImplemented" in str(error):
                    return  # a server without uploads in parts
                raise
            for found in page.get("Uploads", ()):
                at = {"Bucket": self._bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
                self._abort(at)
            if not page.get("IsTruncated"):
                return
            marker = {
                "KeyMarker": page.get("NextKeyMarker", at["Key"]),
                "UploadIdMarker": page.get("NextUploadIdMarker", at["UploadId"]),
            }

    # ---- reading

    def read(self, key: str) -> tuple[bytes, str]:  # noqa: D102
        return self._download(key, None, "")

    def read_range(self, key: str, offset: int, length: int) -> bytes:  # noqa: D102
        if len(self._pins) >= _PINS:
            self._pins.clear()
        try:
            data, etag = self._download(key, (offset, length), self._pins.get(key, ""))
        except _OtherVersionError:
            self._pins.pop(key, None)
            raise ChangedObjectError(
                f"{self.uri}/{key} was replaced while it was being read: start again with the "
                "manifest that is there now"
            ) from None
        self._pins[key] = etag
        if len(data) != length:
            raise StoreError(
                f"{self.uri}/{key} ends at byte {offset + len(data)}, before {offset + length}"
            )
        return data

    def _download(self, key: str, span: tuple[int, int] | None, pinned: str) -> tuple[bytes, str]:
        """Bytes and ETag. What came before a break is kept, if the object is still the same."""
        start, size = span or (0, None)
        pieces: list[bytes] = []
        etag = pinned

        def request(end: float) -> None:
            nonlocal etag, size
            done = sum(map(len, pieces))
            if size is not None and done >= size:
                return  # the connection broke behind the last byte
            wanted = self._at(key)
            if span or done:
                last = "" if size is None else start + size - 1
                wanted["Range"] = f"bytes={start + done}-{last}"
            if pinned or done:
                wanted["IfMatch"] = etag
            try:
                answer = self._client.get_object(**wanted)
                if span is None and size is None:
                    size = answer["ContentLength"]
                etag = answer["ETag"]
                for piece in _pieces(answer, end):
                    pieces.append(piece)
            except botocore.exceptions.FlexibleChecksumError:
                pieces.clear()
                raise
            except botocore.exceptions.ClientError as error:
                if (
                    done
                    and not pinned
                    and error.response["ResponseMetadata"].get("HTTPStatusCode") in (404, 412)
                ):
                    # Replaced between two attempts: the new version, from its beginning.
                    pieces.clear()
                    etag = ""
                    size = None if span is None else size
                    raise _BrokenBodyError("the object was replaced meanwhile") from None
                raise

        self._call("read", key, request)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), etag

    def listing(self, prefix: str = "") -> dict[str, int]:  # noqa: D102
        found: dict[str, int] = {}
        token: dict[str, str] = {}
        while True:
            page, token = self._call("list", prefix, lambda _: self._page(prefix, token))  # noqa: B023
            found |= page
            if not token:
                return dict(sorted(found.items()))

    def _page(self, prefix: str, token: dict[str, str]) -> tuple[dict[str, int], dict[str, str]]:
        """Sizes by key, and how to ask for the next page."""
        page = self._client.list_objects_v2(
            Bucket=self._bucket, Prefix=self._prefix + prefix, **token
        )
        items = page.get("Contents", ())
        found = {item["Key"].removeprefix(self._prefix): item["Size"] for item in items}
        if page.get("IsTruncated"):
            return found, {"ContinuationToken": page["NextContinuationToken"]}
        return found, {}

    def delete(self, key: str) -> None:  # noqa: D102
        self._pins.pop(key, None)
        try:
            self._call("delete", key, lambda _: self._client.delete_object(**self._at(key)))
        except MissingObjectError:
            return

    def create_bucket(self) -> None:
        """Make the bucket unless it is there: for servers of one's own."""
        try:
            self._call("make", "", lambda _: self._client.create_bucket(Bucket=self._bucket))
        except StoreError as error:
            if "BucketAlready" not in str(error):
                raise


def _pieces(answer: dict[str, Any], end: float) -> Iterator[bytes]:
    """The body, piece by piece; _BrokenBodyError where it ends early or the time is up."""
    body, left = answer["Body"], answer["ContentLength"]
    while piece := body.read(_PIECE):
        left -= len(piece)
        yield piece
        if time.monotonic() > end:
            body.close()
            raise _BrokenBodyError("the deadline passed while the body was still coming")
    if left:
        raise _BrokenBodyError("the body ended before its announced length")


class _OtherVersionError(Exception):
    """If-None-Match found an object, or If-Match another version of it."""


class _BrokenBodyError(Exception):
    """A body that did not come whole."""
