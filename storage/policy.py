"""What can go wrong between here and a store or a web server: tried again where that helps, named where it does not."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp
import fsspec
from aiohttp.http_exceptions import HttpProcessingError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

from runtime.errors import AccessError, MissingError, UserError

ATTEMPTS = 4
LONGEST_PAUSE = 30.0  # seconds between two attempts
AGAIN = {408, 425, 429, 500, 502, 503, 504, 509}  # HTTP statuses that may be another one the next time
PASSING = {
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ESTALE,
}
# Classes of the stores' clients, which are optional, by name: connections that failed or broke off, no credentials.
BROKEN_OFF = {"HTTPClientError", "ConnectionError", "ResponseParserError", "TransportError", "ChecksumError"}
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}
CLIENTS = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "s3fs"}  # packages of the stores' clients
REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401"}

BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # stores whose addresses begin with a bucket

Result = TypeVar("Result")


class BucketError(MissingError):
    """A bucket does not exist."""


class WebError(Exception):
    """A web server did not give what was asked for; the message is the reason that the report shows.

    status: of its answer, 0 where there was none, and then `passing` says whether another attempt may go better.
    after: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, status: int = 0, passing: bool = False, after: int = 0) -> None:
        super().__init__(reason)
        self.status, self.passing, self.after = status, passing, after


def again(
    function: Callable[..., Result], *arguments: Any, attempts: int = ATTEMPTS, stop: threading.Event | None = None
) -> Result:
    """`function(*arguments)`, tried again after a growing, random pause (or the one the server asks for) when an error
    is transient; `stop` ends the trying.
    """
    enough = stop_after_attempt(attempts)
    retrying = Retrying(
        stop=enough | stop_when_event_set(stop) if stop else enough,
        sleep=sleep_using_event(stop or threading.Event()),
        **policy(),
    )
    return retrying(function, *arguments)


def policy() -> dict[str, Any]:
    """What is tried again, and after which pause."""
    return {"wait": pause, "retry": retry_if_exception(is_transient), "reraise": True}


def pause(state: RetryCallState) -> float:
    """`pause_after` for tenacity."""
    error = state.outcome.exception() if state.outcome else None
    return pause_after(error, state.attempt_number)


def pause_after(error: BaseException | None, attempt: int) -> float:
    """Seconds until the next attempt: what the server's Retry-After says, else exponential with jitter."""
    asked = str((getattr(error, "headers", None) or {}).get("Retry-After", "")) or str(getattr(error, "after", ""))
    if asked.isdigit() and int(asked):
        return min(float(asked), LONGEST_PAUSE)
    return min(0.3 * 2 ** (attempt - 1) + random.uniform(0, 0.3), LONGEST_PAUSE)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors behind it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def answer_of(error: BaseException) -> tuple[int, Mapping[str, str]] | None:
    """(status, headers) of the HTTP answer behind an error of aiohttp, s3fs, gcsfs; None where there is none."""
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientConnectionError) or is_garbled(error):
        return None  # aiohttp gives these a status of its own making
    for cause in causes(error):
        response = getattr(cause, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = metadata.get("HTTPStatusCode")
        for value in (status, getattr(cause, "status", None), getattr(cause, "code", None)):
            if str(value).isdecimal() and 100 <= int(str(value)) < 600:
                return int(str(value)), metadata.get("HTTPHeaders") or getattr(cause, "headers", None) or {}
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, as `answer_of`."""
    answer = answer_of(error)
    return None if answer is None else answer[0]


def is_garbled(error: BaseException) -> bool:
    """Whether aiohttp could not make out an answer."""
    return isinstance(error.__cause__, HttpProcessingError)


def class_names(error: BaseException) -> set[str]:
    """Names of the classes of an error and of those behind it."""
    return {kind.__name__ for cause in causes(error) for kind in type(cause).__mro__}


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return False
    status = status_of(error)
    if status is not None and status >= 400:
        return status in AGAIN
    if isinstance(error, WebError):
        return error.passing
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return error.os_error.errno == socket.EAI_AGAIN
    if isinstance(error, aiohttp.ClientSSLError):
        return False
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | asyncio.TimeoutError):
        return True
    if is_garbled(error):
        return True
    names = class_names(error)
    if names & NO_CREDENTIALS:
        return False
    return bool(names & BROKEN_OFF) or (isinstance(error, OSError) and error.errno in PASSING)


def reason_of(error: BaseException) -> str:
    """A short reason why something could not be read, for the report of failures."""
    if isinstance(error, WebError):
        return str(error)
    status = status_of(error)
    if status is not None and status >= 400:
        phrase = getattr(error, "message", "") if isinstance(error, aiohttp.ClientResponseError) else ""
        return f"HTTP {status} {phrase}".strip()
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"host not found: {error.host}"
    if isinstance(error, aiohttp.ClientSSLError):
        return f"no valid certificate: {error.host}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect to {error.host}:{error.port}"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | ConnectionError):
        return "connection broke off"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"unreadable file: {text}"


def is_of_store(error: BaseException) -> bool:
    """Whether an error is the operating system's or a store's client's, and not one of this program."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | WebError) or bool(modules & CLIENTS) or status_of(error) is not None


def credentials_missing(error: BaseException) -> str:
    """What is wrong with the credentials, where an error is about them; else nothing."""
    if class_names(error) & NO_CREDENTIALS:
        return f"no credentials ({error})"
    codes = {
        str(response.get("Error", {}).get("Code"))
        for cause in causes(error)
        if isinstance(response := getattr(cause, "response", None), dict)
    }
    forbidden = str(error).startswith(("Forbidden", "Unauthorized"))  # gcsfs says it in words only
    denied = isinstance(error, PermissionError) and not error.filename
    if codes & REFUSED or status_of(error) in (401, 403) or forbidden or denied:
        return f"access refused ({' '.join(str(error).split())})"
    return ""


def check_bucket(url: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise BucketError where something at `url` was not found because its bucket does not exist.

    options: of fsspec. A bucket of which nothing can be learned is taken for one that exists.
    """
    scheme, _, path = url.partition("://")
    bucket = path.split("/")[0]
    if scheme not in BUCKETS or not bucket:
        return
    try:
        found = fsspec.filesystem(scheme, **(options or {})).exists(bucket)
    except Exception:  # each store has errors of its own
        return
    if not found:
        raise BucketError(f"{url}: bucket {bucket} does not exist: create it, or check the name")


@contextmanager
def naming(url: str, doing: str) -> Iterator[None]:
    """Errors of a store inside the block become a UserError that names `url`, what was being done, and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not isinstance(error, BucketError):
            check_bucket(url)
        if isinstance(error, UserError) or not is_of_store(error):
            raise
        if "://" not in url or url.startswith("file://"):
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                raise OSError(error.errno, error.strerror, url) from None
            raise
        if isinstance(error, FileNotFoundError):
            raise MissingError(f"cannot {doing} {url}: it does not exist; check the name") from error
        if problem := credentials_missing(error):
            remedy = "check the credentials in the environment (see docs/packing.md) and the rights on the bucket"
            raise AccessError(f"cannot {doing} {url}: {' '.join(problem.split())}; {remedy}") from error
        remedy = "nothing is lost: run the same command again to go on"
        raise AccessError(f"cannot {doing} {url}: {' '.join(reason_of(error).split())}; {remedy}") from error
