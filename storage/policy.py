"""One policy for all stores and web servers: which errors are transient, when to retry, which error users get."""

from __future__ import annotations

import email.utils
import errno
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import aiohttp
import fsspec
from aiohttp.http_exceptions import HttpProcessingError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

from runtime.errors import AccessError, MissingError, UserError
from storage.fetching import ATTEMPTS
from storage.urls import hide_secrets

LONGEST_BACKOFF = 20.0  # seconds
TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504, 509}
TRANSIENT_ERRNOS = {
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EBUSY, errno.EAGAIN, errno.ESTALE,
}  # fmt: skip
# Classes of the stores' clients, which are optional, by name: connections that failed or broke off, no credentials.
TRANSIENT_CLASSES = {"HTTPClientError", "ConnectionError", "ResponseParserError", "TransportError", "ChecksumError"}
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}
CLIENTS = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "s3fs"}  # packages of the stores' clients
REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401"}

BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # stores whose URLs begin with a bucket

Result = TypeVar("Result")


class BucketError(MissingError):
    """A bucket does not exist."""


class StoreError(Exception):
    """A failed request to a store or a web server; the message has no secrets.

    kind: the error that users get. retry_after: seconds.
    """

    def __init__(
        self, reason: str, kind: type[OSError] = OSError, transient: bool = False, retry_after: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.kind, self.transient, self.retry_after = kind, transient, retry_after

    def with_url(self, url: str) -> OSError:
        """The error for the user of a read."""
        if self.kind is FileNotFoundError:
            return self.kind(f"{url} is missing")
        if self.kind is PermissionError:
            remedy = "check the credentials in the environment (docs/streaming.md)"
            return self.kind(f"{url} cannot be read: access is denied ({self}): {remedy}")
        return self.kind(f"{url} cannot be read: {self}")


@dataclass(frozen=True)
class RetryPolicy:
    """Retries of transient errors, with exponential backoff and jitter, or after Retry-After."""

    attempts: int = ATTEMPTS  # 0: no limit
    first_backoff: float = 0.6  # seconds; half of it at least
    longest_retry_after: float = 30.0  # seconds: a longer Retry-After is cut short

    def pause(self, error: StoreError, attempts: int) -> float:
        """Seconds until the next attempt after `attempts` attempts; infinite if there is none."""
        if not error.transient or attempts == self.attempts:
            return math.inf
        backoff = min(self.first_backoff * 2.0 ** min(attempts - 1, 30), LONGEST_BACKOFF)
        return min(error.retry_after, self.longest_retry_after) + backoff * random.uniform(0.5, 1)


def retry(
    function: Callable[..., Result], *arguments: Any, attempts: int = ATTEMPTS, stop: threading.Event | None = None
) -> Result:
    """Call `function(*arguments)`, again after transient errors as RetryPolicy says; `stop` ends the attempts."""
    policy, stop = RetryPolicy(attempts), stop or threading.Event()

    def pause(state: RetryCallState) -> float:
        error = state.outcome and state.outcome.exception()
        return policy.pause(describe_error(error), state.attempt_number) if error else 0.0

    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and describe_error(error).transient),
        stop=stop_after_attempt(attempts) | stop_when_event_set(stop),
        wait=pause,
        sleep=sleep_using_event(stop),
        reraise=True,
    )
    return retrying(function, *arguments)


def describe_error(error: BaseException) -> StoreError:
    """The StoreError for an error of a store's client or of the operating system."""
    if isinstance(error, StoreError):
        return error
    response = response_of(error)
    if response is not None and response[0] >= 400:
        found = status_error(response[0], retry_after(response[1]))
    else:
        reason, transient = _without_status(error)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        kind = PermissionError if isinstance(error, PermissionError) else kind
        found = StoreError(hide_secrets(reason), kind, transient and kind is OSError)
    if not isinstance(error, aiohttp.ClientError) and (problem := _credentials_problem(error)):
        return StoreError(hide_secrets(problem), PermissionError)
    return found


def status_error(status: int, wait: float = 0.0) -> StoreError:
    """The error that an HTTP status means; wait: seconds of its Retry-After."""
    if status == HTTPStatus.NOT_FOUND:
        return StoreError("file not found", FileNotFoundError)
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    kind = PermissionError if status in (401, 403) else OSError
    return StoreError(f"HTTP {status} {phrase}".strip(), kind, status in TRANSIENT_STATUSES, wait)


def _without_status(error: BaseException) -> tuple[str, bool]:
    """The reason of an error that has no HTTP status, and whether it is transient."""
    match error:
        case FileNotFoundError():
            return "file not found", False
        case PermissionError():
            return "permission denied", False
        case aiohttp.ClientConnectorDNSError():
            return f"host not found: {error.host}", error.os_error.errno == socket.EAI_AGAIN
        case aiohttp.ClientSSLError():
            return f"no valid certificate: {error.host}", False
        case aiohttp.ClientConnectorError():
            return f"cannot connect to {error.host}:{error.port}", True
        case TimeoutError():
            return "timed out", True
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError() | ConnectionError():
            return "connection closed early", True
    if _is_garbled(error):
        return "connection closed early", True
    if isinstance(error, aiohttp.ClientError):
        return type(error).__name__, False  # its text may contain a signed URL
    names = {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}
    transient = bool(names & TRANSIENT_CLASSES) or (isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"unreadable file: {text}", transient


def _credentials_problem(error: BaseException) -> str:
    """The fault of the credentials if an error is about them; else ""."""
    if {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__} & NO_CREDENTIALS:
        return f"no credentials ({error})"
    codes = {
        str(response.get("Error", {}).get("Code"))
        for cause in causes(error)
        if isinstance(response := getattr(cause, "response", None), dict)
    }
    forbidden = str(error).startswith(("Forbidden", "Unauthorized"))  # gcsfs reports it only in the message
    denied = isinstance(error, PermissionError) and not error.filename
    if codes & REFUSED or status_of(error) in (401, 403) or forbidden or denied:
        return f"access refused ({' '.join(str(error).split())})"
    return ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors behind it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def response_of(error: BaseException) -> tuple[int, Mapping[str, str]] | None:
    """(status, headers) of the HTTP response behind an error of aiohttp, s3fs or gcsfs; None if there is none."""
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientConnectionError) or _is_garbled(error):
        return None  # aiohttp sets an invented status
    for cause in causes(error):
        response = getattr(cause, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = metadata.get("HTTPStatusCode")
        for value in (status, getattr(cause, "status", None), getattr(cause, "code", None)):
            if str(value).isdecimal() and 100 <= int(str(value)) < 600:
                return int(str(value)), metadata.get("HTTPHeaders") or getattr(cause, "headers", None) or {}
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, as `response_of`."""
    response = response_of(error)
    return None if response is None else response[0]


def _is_garbled(error: BaseException) -> bool:
    """Whether aiohttp could not parse a response."""
    return isinstance(error.__cause__, HttpProcessingError)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, given as a number or as a date; 0 without one."""
    value = next((headers[name] for name in headers if name.lower() == "retry-after"), "")
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def check_bucket(url: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise BucketError where something at `url` was not found because its bucket does not exist.

    options: of fsspec. Where the check itself fails, the bucket counts as existing.
    """
    scheme, _, path = url.partition("://")
    bucket = path.split("/")[0]
    if scheme not in BUCKETS or not bucket:
        return
    try:
        found = fsspec.filesystem(scheme, **(options or {})).exists(bucket)
    except Exception:  # each store has its own errors
        return
    if not found:
        raise BucketError(f"{url}: bucket {bucket} does not exist: create it, or check the name")


@contextmanager
def storage_errors(url: str, doing: str) -> Iterator[None]:
    """Errors of a store inside the block become a UserError that names `url`, what was being done, and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not isinstance(error, BucketError):
            check_bucket(url)
        if isinstance(error, UserError) or not _is_of_store(error):
            raise
        if "://" not in url or url.startswith("file://"):
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                raise OSError(error.errno, error.strerror, url) from None
            raise
        found = describe_error(error)
        if found.kind is FileNotFoundError:
            raise MissingError(f"cannot {doing} {url}: it does not exist; check the name") from error
        remedy = "run the same command again to continue"
        if found.kind is PermissionError:
            remedy = "check the credentials in the environment (see docs/packing.md) and the permissions on the bucket"
        raise AccessError(f"cannot {doing} {url}: {' '.join(str(found).split())}; {remedy}") from error


def _is_of_store(error: BaseException) -> bool:
    """Whether an error is of the operating system or a store's client, not a bug of this program."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | StoreError) or bool(modules & CLIENTS) or status_of(error) is not None
