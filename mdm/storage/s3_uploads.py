"""Uploads to S3: what each is asked for, and large objects in parts."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mdm.storage.base import MissingObjectError, StoreError, StoreOptions
from mdm.storage.s3_requests import OtherVersionError, S3Requests

_PARTS_AT_ONCE = 4


def asked_for(options: StoreOptions) -> dict[str, str]:
    """What every upload asks for."""
    asked = {}
    if options.sse:
        asked["ServerSideEncryption"] = options.sse
    if options.sse_key_id:
        asked["SSEKMSKeyId"] = options.sse_key_id
    return asked | _checksum(options)


def _checksum(options: StoreOptions) -> dict[str, str]:
    named = options.checksum not in ("", "none")
    return {"ChecksumAlgorithm": options.checksum} if named else {}


def put_in_parts(
    requests: S3Requests, key: str, data: memoryview, condition: dict[str, str]
) -> None:
    """Write an object in parts, each with its own attempts; OtherVersionError if it may not be.

    Nothing of them stays if one fails for good.
    """
    begun = requests.call(
        "write",
        key,
        lambda _: requests.client.create_multipart_upload(
            **requests.at(key), **asked_for(requests.options)
        ),
    )
    upload = requests.at(key) | {"UploadId": begun["UploadId"]}
    size = max(requests.options.part_bytes, -(-len(data) // 10_000))

    def send(number: int) -> dict[str, Any]:
        body = bytes(data[(number - 1) * size : number * size])
        answer = requests.call(
            "write",
            f"{key} part {number}",
            lambda _: requests.client.upload_part(
                **upload, PartNumber=number, Body=body, **_checksum(requests.options)
            ),
        )
        sums = {k: v for k, v in answer.items() if k.startswith("Checksum") and k[-4:] != "Type"}
        return {"PartNumber": number, "ETag": answer["ETag"], **sums}

    try:
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            sent = [pool.submit(send, number) for number in range(1, -(-len(data) // size) + 1)]
            try:
                parts = [part.result() for part in sent]
            except StoreError:
                pool.shutdown(cancel_futures=True)
                raise
        _complete(requests, key, upload, parts, condition, len(data))
    except BaseException:
        _abort(requests, upload)
        raise


def _complete(
    requests: S3Requests,
    key: str,
    upload: dict[str, str],
    parts: list[dict[str, Any]],
    condition: dict[str, str],
    size: int,
) -> None:
    try:
        requests.call(
            "write",
            key,
            lambda _: requests.client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, **condition
            ),
        )
    except MissingObjectError:
        # Completed before, and the answer was lost: then it is there.
        if _size(requests, key) != size:
            where = f"s3://{requests.bucket}/{requests.prefix}{key}"
            raise StoreError(f"write {where}: the server lost the upload") from None


def _size(requests: S3Requests, key: str) -> int | None:
    """Bytes of an object; None if it is not there."""
    try:
        found = requests.call(
            "check", key, lambda _: requests.client.head_object(**requests.at(key))
        )
    except MissingObjectError:
        return None
    return int(found["ContentLength"])


def _abort(requests: S3Requests, upload: dict[str, str]) -> None:
    """Give an upload's parts back, as far as the server can be reached."""
    try:
        requests.call("abort", "", lambda _: requests.client.abort_multipart_upload(**upload))
    except (StoreError, OtherVersionError):
        return  # `sweep` finds it later


def sweep(requests: S3Requests, prefix: str) -> None:
    """Give back the parts of all uploads under way of keys that begin with `prefix`."""
    marker: dict[str, str] = {}
    while True:
        try:
            page = requests.call(
                "list uploads below",
                "",
                lambda _: requests.client.list_multipart_uploads(
                    Bucket=requests.bucket,
                    Prefix=requests.prefix + prefix,
                    **marker,  # noqa: B023
                ),
            )
        except StoreError as error:
            if "NotImplemented" in str(error):
                return  # a server without uploads in parts
            raise
        for found in page.get("Uploads", ()):
            at = {"Bucket": requests.bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
            if found["Key"].startswith(requests.prefix + prefix):  # should a server not filter
                _abort(requests, at)
        if not page.get("IsTruncated"):
            return
        marker = {
            "KeyMarker": page.get("NextKeyMarker", at["Key"]),
            "UploadIdMarker": page.get("NextUploadIdMarker", at["UploadId"]),
        }
