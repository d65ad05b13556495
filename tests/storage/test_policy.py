"""The policy for transient errors, pauses and messages, which name the URL and have no secrets."""

import math
import threading
import time
from email.utils import formatdate

import pytest

from runtime.errors import AccessError, MissingError
from storage.policy import RetryPolicy, StoreError, describe_error, retry, retry_after, status_error, storage_errors


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_transient_statuses(status: int) -> None:
    assert status_error(status).transient


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, OSError), (401, PermissionError), (403, PermissionError), (404, FileNotFoundError), (501, OSError)],
)
def test_permanent_statuses(status: int, kind: type[OSError]) -> None:
    assert not status_error(status).transient
    assert status_error(status).kind is kind
    assert type(status_error(status).with_url("s3://a/b")) is kind
    assert "s3://a/b" in str(status_error(status).with_url("s3://a/b"))


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(16, "Device or resource busy"), True),
        (OSError(5, "Input/output error"), False),
        (FileNotFoundError("x"), False),
        (PermissionError(13, "x", "file"), False),
        (ValueError("x"), False),
    ],
)
def test_errors_of_clients_and_of_the_system(error: Exception, transient: bool) -> None:
    assert describe_error(error).transient == transient


def test_messages_contain_no_signature_of_a_url() -> None:
    error = ValueError("GET https://jane:sesame@store.test/things/x?Signature=sesame failed")
    assert str(describe_error(error)) == "unreadable file: GET https://store.test/things/x failed"


def test_backoff_grows_with_jitter_and_retry_after_is_added() -> None:
    policy, busy = RetryPolicy(attempts=4), StoreError("busy", transient=True, retry_after=7)
    for attempt, longest in ((1, 0.6), (2, 1.2), (3, 2.4)):
        assert longest / 2 <= policy.pause(StoreError("timed out", transient=True), attempt) <= longest
        assert 7 + longest / 2 <= policy.pause(busy, attempt) <= 7 + longest
    assert policy.pause(busy, 4) == math.inf
    assert policy.pause(StoreError("no such host"), 1) == math.inf
    assert RetryPolicy(attempts=0).pause(busy, 10**6) < 30


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert 8 < retry_after({"Retry-After": formatdate(time.time() + 10, usegmt=True)}) <= 10
    assert retry_after({}) == 0
    assert retry_after({"Retry-After": "soon"}) == 0


def test_retries_end_with_a_result_the_last_attempt_or_when_stopped() -> None:
    errors: list[Exception] = [ConnectionResetError(), TimeoutError()]

    def read() -> str:
        if errors:
            raise errors.pop()
        return "data"

    assert retry(read) == "data"
    errors += [TimeoutError(), TimeoutError()]
    with pytest.raises(TimeoutError):
        retry(read, attempts=1)
    stop = threading.Event()
    stop.set()
    with pytest.raises(TimeoutError):
        retry(read, stop=stop)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError(), MissingError, "cannot read memory://a: it does not exist; check the name"),
        (PermissionError("no"), AccessError, r"access refused \(no\); check the credentials"),
        (ConnectionResetError(), AccessError, "connection closed early; run the same command again"),
        (KeyError("a bug"), KeyError, "a bug"),
    ],
)
def test_errors_of_a_store_become_user_errors_with_the_url(
    error: Exception, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), storage_errors("memory://a", "read"):
        raise error
