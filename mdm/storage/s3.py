"""A prefix in an S3 bucket as a store."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from mdm.storage.base import (
    ChangedObjectError,
    MissingObjectError,
    Store,
    StoreError,
    StoreOptions,
    is_folder_marker,
)
from mdm.storage.s3_requests import (
    BrokenBodyError,
    DamagedBodyError,
    OtherVersionError,
    RefusedError,
    S3Requests,
)

_READ_BYTES = 4 << 20  # of a body read at a time: a broken download continues after the last read
_PARTS_AT_ONCE = 4
_PINS = 1 << 16  # objects whose version is remembered


class S3Store(Store):
    """A prefix in a bucket."""

    def __init__(self, uri: str, options: StoreOptions) -> None:
        self.requests = S3Requests(uri, options)
        self.uri = uri.rstrip("/")
        self.options = options
        self._pins: dict[str, str] = {}  # key -> ETag of the version that is being read

    def put(  # noqa: D102
        self, key: str, data: bytes | memoryview, *, if_absent: bool = False
    ) -> bool:
        self._pins.pop(key, None)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        try:
            view = memoryview(data).cast("B")
            if len(view) > self.options.part_bytes:
                if if_absent and self.exists(key):
                    return False  # the server would say so only after the last part
                _put_in_parts(self.requests, key, view, condition)
            else:
                self._put_whole(key, bytes(view), condition)  # botocore takes no views
        except OtherVersionError:
            return False
        return True

    def replace(self, key: str, data: bytes, etag: str) -> str | None:  # noqa: D102
        self._pins.pop(key, None)
        try:
            answer = self._put_whole(key, data, {"IfMatch": etag})
        except (OtherVersionError, MissingObjectError):
            return None
        return str(answer["ETag"])

    def _put_whole(self, key: str, data: bytes, condition: dict[str, str]) -> dict[str, Any]:
        more = condition | _upload_options(self.options)
        return self.requests.ask("write", key, "put_object", Body=data, **more)

    def sweep(self, *prefixes: str) -> None:  # noqa: D102
        for prefix in prefixes:
            _sweep(self.requests, prefix)

    def read(self, key: str) -> tuple[bytes, str]:  # noqa: D102
        return self._download(key, None, "")

    def read_range(self, key: str, offset: int, length: int) -> bytes:  # noqa: D102
        if len(self._pins) >= _PINS:
            self._pins.clear()
        try:
            data, etag = self._download(key, (offset, length), self._pins.get(key, ""))
        except OtherVersionError:
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
        """Bytes and ETag. Bytes from before a break are kept if the object is still the same."""
        start, size = span or (0, None)
        parts: list[bytes] = []
        etag = pinned

        def request(end: float) -> None:
            nonlocal etag, size
            done = sum(map(len, parts))
            if size is not None and done >= size:
                return  # the connection broke after the last byte
            wanted = self.requests.at(key)
            if span or done:
                last = "" if size is None else start + size - 1
                wanted["Range"] = f"bytes={start + done}-{last}"
            if pinned or done:
                wanted["IfMatch"] = etag
            try:
                answer = self.requests.client.get_object(**wanted)
                if span is None and size is None:
                    size = answer["ContentLength"]
                etag = answer["ETag"]
                for part in _body(answer, end):
                    parts.append(part)  # one by one: an error keeps those before it
            except DamagedBodyError:
                parts.clear()
                raise
            except RefusedError as error:
                status = error.response["ResponseMetadata"].get("HTTPStatusCode")
                if done and not pinned and status in (404, 412):
                    # Replaced between two attempts: read the new version from its beginning.
                    parts.clear()
                    etag = ""
                    size = None if span is None else size
                    raise BrokenBodyError("the object was replaced meanwhile") from None
                raise

        self.requests.call("read", key, request)
        return parts[0] if len(parts) == 1 else b"".join(parts), etag

    def listing(self, prefix: str = "") -> dict[str, int]:  # noqa: D102
        sizes: dict[str, int] = {}
        token: dict[str, str] = {}
        while True:
            page, token = self.requests.call("list", prefix, lambda _: self._page(prefix, token))  # noqa: B023
            sizes |= page
            if not token:
                return dict(sorted(sizes.items()))

    def _page(self, prefix: str, token: dict[str, str]) -> tuple[dict[str, int], dict[str, str]]:
        """Sizes by key, and the arguments that request the next page."""
        page = self.requests.client.list_objects_v2(
            Bucket=self.requests.bucket, Prefix=self.requests.prefix + prefix, **token
        )
        items = page.get("Contents", ())
        sizes = {item["Key"].removeprefix(self.requests.prefix): item["Size"] for item in items}
        sizes = {k: size for k, size in sizes.items() if not is_folder_marker(k, size)}
        if page.get("IsTruncated"):
            return sizes, {"ContinuationToken": page["NextContinuationToken"]}
        return sizes, {}

    def delete(self, key: str) -> None:  # noqa: D102
        self._pins.pop(key, None)
        with suppress(MissingObjectError):
            self.requests.ask("delete", key, "delete_object")

    def create_bucket(self) -> None:
        """Creates the bucket unless it exists: for servers of your own."""
        bucket = self.requests.bucket
        try:
            self.requests.call(
                "make", "", lambda _: self.requests.client.create_bucket(Bucket=bucket)
            )
        except StoreError as error:
            if "BucketAlready" not in str(error):
                raise


def _body(answer: dict[str, Any], end: float) -> Iterator[bytes]:
    """The body in parts; BrokenBodyError if it ends early or the deadline passes."""
    body, left = answer["Body"], answer["ContentLength"]
    while part := body.read(_READ_BYTES):
        left -= len(part)
        yield part
        if time.monotonic() > end:
            body.close()
            raise BrokenBodyError("the deadline passed while the body was still coming")
    if left:
        raise BrokenBodyError("the body ended before its announced length")


def _upload_options(options: StoreOptions) -> dict[str, str]:
    """The encryption and checksum that every upload requests."""
    encryption = {"ServerSideEncryption": options.sse, "SSEKMSKeyId": options.sse_key_id}
    return {k: v for k, v in encryption.items() if v} | _checksum(options)


def _checksum(options: StoreOptions) -> dict[str, str]:
    named = options.checksum not in ("", "none")
    return {"ChecksumAlgorithm": options.checksum} if named else {}


def _put_in_parts(
    requests: S3Requests, key: str, data: memoryview, condition: dict[str, str]
) -> None:
    """Writes an object in parts, each with its own attempts. If one fails, all are removed.

    Raises:
        OtherVersionError: `condition` does not hold.
        StoreError: a part failed for good.
    """
    options = requests.options
    begun = requests.ask("write", key, "create_multipart_upload", **_upload_options(options))
    upload = {"UploadId": begun["UploadId"]}
    size = max(options.part_bytes, -(-len(data) // 10_000))

    def send(number: int) -> dict[str, Any]:
        part = {"PartNumber": number, "Body": bytes(data[(number - 1) * size : number * size])}
        more = upload | part | _checksum(options)
        answer = requests.ask(f"write part {number} of", key, "upload_part", **more)
        sums = {k: v for k, v in answer.items() if k.startswith("Checksum") and k[-4:] != "Type"}
        return {"PartNumber": number, "ETag": answer["ETag"], **sums}

    try:
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            # After an error, `map` cancels the parts that wait.
            parts = {"Parts": list(pool.map(send, range(1, -(-len(data) // size) + 1)))}
        more = upload | condition
        try:
            requests.ask("write", key, "complete_multipart_upload", MultipartUpload=parts, **more)
        except MissingObjectError:
            # If only the answer to an earlier attempt was lost, the object is complete.
            with suppress(MissingObjectError):
                if requests.ask("check", key, "head_object")["ContentLength"] == len(data):
                    return
            where = f"s3://{requests.bucket}/{requests.prefix}{key}"
            raise StoreError(f"write {where}: the server lost the upload") from None
    except BaseException:
        _abort(requests, requests.at(key) | upload)
        raise


def _abort(requests: S3Requests, upload: dict[str, str]) -> None:
    """Removes the parts of an upload if the server can be reached; if not, `sweep` will."""
    with suppress(StoreError, OtherVersionError):
        requests.call("abort", "", lambda _: requests.client.abort_multipart_upload(**upload))


def _sweep(requests: S3Requests, prefix: str) -> None:
    """Removes the parts of all uploads in progress of keys that begin with `prefix`."""
    begin = requests.prefix + prefix
    marker: dict[str, str] = {}
    while True:
        try:
            wanted = {"Bucket": requests.bucket, "Prefix": begin} | marker
            page = requests.call(
                "list uploads below",
                "",
                lambda _: requests.client.list_multipart_uploads(**wanted),  # noqa: B023
            )
        except StoreError as error:
            if "NotImplemented" in str(error):
                return  # a server without multipart uploads
            raise
        for upload in page.get("Uploads", ()):
            at = {"Bucket": requests.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            if upload["Key"].startswith(begin):  # in case a server does not filter
                _abort(requests, at)
        if not page.get("IsTruncated"):
            return
        marker = {
            "KeyMarker": page.get("NextKeyMarker", at["Key"]),
            "UploadIdMarker": page.get("NextUploadIdMarker", at["UploadId"]),
        }
