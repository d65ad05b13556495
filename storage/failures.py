"""What went wrong with a remote read: whether another try may help, and words for it that hold no secrets."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from runtime.errors import UserError
from storage.policy import AGAIN, WebError, answer_of, is_transient, reason_of

SECRET_OPTIONS = re.compile(r"secret|password|passwd|token|key|credential|sas|authorization", re.I)
HARMLESS_TOKENS = ("anon", "cloud", "google_default", "cache", "browser")  # gcsfs: how to find one, not one itself


class TransientError(Exception):
    """Something that another try may not meet again; retry_after: seconds that the server asked to wait."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class GoneError(Exception):
    """Something that another try would meet again; `kind` is the error that users get."""

    def __init__(self, reason: str, kind: type[OSError] = OSError) -> None:
        super().__init__(reason)
        self.kind = kind

    def told_of(self, url: str) -> OSError:
        """The error for the user."""
        return self.kind(f"{url} is missing" if self.kind is FileNotFoundError else f"{url} cannot be read: {self}")


def failure_of_status(status: int, wait: float = 0.0) -> TransientError | GoneError | PermissionError:
    """The error that an HTTP status means; PermissionError where the credentials may have grown old.

    wait: seconds that the server asked for.
    """
    if status in AGAIN:
        return TransientError(f"status {status}", wait)
    if status == 404:
        return GoneError("there is no such object (status 404)", FileNotFoundError)
    if status in (401, 403):
        return PermissionError(f"status {status}")
    return GoneError(f"status {status}")


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 without one."""
    value = next((headers[name] for name in headers if name.lower() == "retry-after"), "")
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def explain(error: Exception) -> TransientError | GoneError:
    """What a client's exception means. Its own text is not passed on: it may hold a signed address."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return GoneError("there is no such object", FileNotFoundError)
    answer = answer_of(error)
    if answer is not None and answer[0] >= 400:
        found = failure_of_status(answer[0], retry_after(answer[1]))
        return denied(str(found)) if isinstance(found, PermissionError) else found
    if isinstance(error, PermissionError):
        return denied(str(error) if str(error).startswith("status ") else name)
    if isinstance(error, WebError | aiohttp.ClientConnectorError):  # cannot connect; no such host, no valid certificate
        reason = hide_secrets(reason_of(error))
        return TransientError(reason) if is_transient(error) else GoneError(reason)
    if is_transient(error):
        return TransientError(name)
    if isinstance(error, aiohttp.ClientError):
        return GoneError(name)  # its text may hold the address
    return GoneError(f"{name}: {hide_secrets(str(error))}")


def denied(reason: str) -> GoneError:
    """The store does not let us read."""
    return GoneError(
        f"access is denied ({reason}): check the credentials in the environment (docs/streaming.md)", PermissionError
    )


def public_url(url: str) -> str:
    """A URL as it may stand in logs: without user, password, query and fragment."""
    parts = urlsplit(url)
    if "://" not in url:
        return url
    return parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], query="", fragment="").geturl()


def hide_secrets(text: str) -> str:
    """A text as it may stand in logs: its URLs without users, passwords and queries."""
    return re.sub(r"\w+://[^\s'\"<>]+", lambda match: public_url(match[0]), text)


def check_no_credentials(url: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError, without repeating them, where a URL or its options hold credentials.

    They would be written to logs and to a run's folder.
    """
    where = "take credentials from the environment instead (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, ~/.aws, ~/.netrc)"
    parts = urlsplit(url) if "://" in url else None
    if parts is not None and ("@" in parts.netloc or parts.query):
        raise UserError(f"the URL of {public_url(url)} holds a user, a password or a signature: {where}")
    for name, value in options.items():
        if SECRET_OPTIONS.search(name) and value not in HARMLESS_TOKENS:
            raise UserError(f"storage.{name} holds credentials: {where}")
