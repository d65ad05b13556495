"""Remote stores that are closed after each test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from storage.limits import RemoteReads
from storage.remote import RemoteStore


@pytest.fixture
def remote_store() -> Iterator[Callable[..., RemoteStore]]:
    """Opens a URL; keyword arguments are RemoteReads' settings."""
    with ExitStack() as opened:

        def make(url: str, options: dict[str, object] | None = None, **settings: object) -> RemoteStore:
            store = RemoteStore(url, options or {}, RemoteReads(**settings))
            opened.callback(store.close)
            return store

        yield make
