"""Uploads to S3: the options of each, and large objects in parts."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from mdm.storage.base import MissingObjectError, StoreError, StoreOptions
from mdm.storage.s3_requests import OtherVersionError, S3Requests

_PARTS_AT_ONCE = 4


def upload_options(options: StoreOptions) -> dict[str, str]:
    """The encryption and checksum that every upload requests."""
    encryption = {"ServerSideEncryption": options.sse, "SSEKMSKeyId": options.sse_key_id}
    return {k: v for k, v in encryption.items() if v} | _checksum(options)


def _checksum(options: StoreOptions) -> dict[str, str]:
    named = options.checksum not in ("", "none")
    return {"ChecksumAlgorithm": options.checksum} if named else {}


def put_in_parts(
    requests: S3Requests, key: str, data: memoryview, condition: dict[str, str]
) -> None:
    """Writes an object in parts, each with its own attempts. If one fails, all are removed.

    Raises:
        OtherVersionError: `condition` does not hold.
        StoreError: a part failed for good.
    """
    options = requests.options
    begun = requests.ask("write", key, "create_multipart_upload", **upload_options(options))
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
            sent = [pool.submit(send, number) for number in range(1, -(-len(data) // size) + 1)]
            try:
                parts = {"Parts": [part.result() for part in sent]}
            except StoreError:
                pool.shutdown(cancel_futures=True)
                raise
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


def sweep(requests: S3Requests, prefix: str) -> None:
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
