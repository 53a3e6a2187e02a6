"""The one door to boto3: requests below a prefix of a bucket, with our own bounded retries."""

import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from random import SystemRandom
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
import botocore.parsers

from mdm.storage.base import MissingObjectError, StoreError, StoreOptions, checked

T = TypeVar("T")

# Deliberately not reproducible: ranks that fail together must not retry together.
_JITTER = SystemRandom()
# Refusals that may be transient: a busy server, a body damaged in transit.
_TRANSIENT = frozenset(
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

# What a request may raise itself, besides the errors below.
RefusedError = botocore.exceptions.ClientError
DamagedBodyError = botocore.exceptions.FlexibleChecksumError


class OtherVersionError(Exception):
    """If-None-Match found an object, or If-Match another version of it."""


class BrokenBodyError(Exception):
    """A body that did not arrive whole."""


# Creating a client takes a third of a second and many stores share a server: one per process. A
# client inherited across a fork would share its sockets and stall, hence the process id.
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


class S3Requests:
    """Requests for the objects below one prefix of a bucket.

    `uri` is `s3://bucket` or `s3://bucket/prefix`; ValueError if it names no bucket.
    """

    def __init__(self, uri: str, options: StoreOptions) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError(f"{uri!r} names no bucket; write s3://bucket/prefix")
        self.options = options
        self.bucket = bucket
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""

    @property
    def client(self) -> Any:
        """boto3's client, shared by all stores of this process with these options and variables."""
        environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
        with _CLIENTS_LOCK:
            return _client(os.getpid(), self.options, environment)

    def at(self, key: str) -> dict[str, str]:
        """How a request names an object; ValueError if its key would lie outside the prefix."""
        return {"Bucket": self.bucket, "Key": self.prefix + checked(key)}

    def ask(self, operation: str, key: str, method: str, **arguments: Any) -> dict[str, Any]:
        """The answer of the client's `method` about the object at `key`; errors as in `call`."""
        about = self.at(key) | arguments
        return self.call(operation, key, lambda _: getattr(self.client, method)(**about))

    def call(self, operation: str, key: str, request: Callable[[float], T]) -> T:
        """The result of `request(end)`, retried after transient errors with full-jitter pauses.

        `end` is the deadline on the monotonic clock, for requests that take long themselves.

        Raises:
            MissingObjectError: the object does not exist.
            OtherVersionError: a condition of the request does not hold.
            StoreError: the last attempt failed, or a retry would not help.
        """
        what = f"{operation} s3://{self.bucket}/{self.prefix}{checked(key)}"
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
                botocore.exceptions.IncompleteReadError,
                botocore.exceptions.FlexibleChecksumError,
                botocore.parsers.ResponseParserError,
                BrokenBodyError,
            ) as error:
                reason = str(error) if isinstance(error, BrokenBodyError) else type(error).__name__
            except botocore.exceptions.BotoCoreError as error:
                raise StoreError(f"{what}: {error}") from None
            except (ValueError, KeyError) as error:
                # Bits flipped in a header or in XML, which have no checksum.
                reason = f"the answer is garbled ({type(error).__name__})"
            pause = _JITTER.uniform(
                0, min(self.options.backoff_cap, self.options.backoff * 2**attempt)
            )
            if attempt == self.options.attempts or time.monotonic() + pause > end:
                break
            time.sleep(pause)
        raise StoreError(
            f"{what} at {self.client.meta.endpoint_url} failed after {attempt} attempts in "
            f"{time.monotonic() - began:.1f} s: {reason}"
        )

    @staticmethod
    def _raise_if_final(what: str, error: Any, attempt: int) -> None:
        """Raises unless a later attempt may succeed."""
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            raise StoreError(f"{what}: the bucket does not exist") from None
        if code == "PreconditionFailed" or status == 412:
            raise OtherVersionError from None
        if status == 404:
            raise MissingObjectError(f"{what}: no such object") from None
        if code == "RequestTimeTooSkewed":
            there = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
            here = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
            raise StoreError(
                f"{what}: the server refused it ({code}): its clock says {there}, this machine's "
                f"{here}; set this one right (timedatectl set-ntp true)"
            ) from None
        if status < 500 and code not in _TRANSIENT and not (code in _DOUBTFUL and attempt < 3):
            raise StoreError(f"{what}: the server refused it ({code or status})") from None
