"""The object stores and the fault-injecting proxy that tests use do what they promise."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest
from faulty_proxy import KINDS, Dealer, Faults, FaultyProxy
from needs import module
from object_stores import STORES, MakeFaulty, Store

if TYPE_CHECKING:
    import requests

DATA = bytes(range(256)) * 400


@pytest.fixture
def filled(store: Store, tmp_path: Path) -> Store:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard.tar").write_bytes(DATA)
    store.fill(tmp_path / "data", "things")
    return store


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_requests_pass_through_a_proxy(filled: Store, faulty: MakeFaulty) -> None:
    proxy = faulty(filled, Faults(latency=0.02))
    filesystem, path = fsspec.url_to_fs(filled.url("things/shard.tar", proxy))
    assert filesystem.cat_file(path, start=5, end=4000) == DATA[5:4000]
    assert proxy.log[-1].range == "bytes=5-3999"
    assert set(proxy.counts()) == {""}


def fetch(proxy: FaultyProxy, path: str, first: int) -> "requests.Response":
    headers = {"Range": f"bytes={first}-{first + 999}"}
    return module("requests", "requests").get(f"{proxy.endpoint}/{path}", headers=headers, timeout=10)


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_faults_are_what_they_say(filled: Store, faulty: MakeFaulty) -> None:
    path = "files/things/shard.tar"
    proxy = faulty(filled, Faults(error=1))
    assert fetch(proxy, path, 0).status_code == 503
    proxy.faults = Faults(throttle=1, retry_after=3)
    assert fetch(proxy, path, 0).headers["Retry-After"] == "3"
    proxy.faults = Faults(cut=1)
    with pytest.raises(module("requests", "requests").exceptions.ChunkedEncodingError):
        fetch(proxy, path, 0)
    proxy.faults = Faults(corrupt=1)
    assert sum(a != b for a, b in zip(fetch(proxy, path, 0).content, DATA)) == 1
    proxy.faults = Faults(slow=1, slow_seconds=0.3)
    answer = fetch(proxy, path, 0)
    assert answer.content == DATA[:1000]
    proxy.faults = Faults(permanent="shard", permanent_status=403)
    assert fetch(proxy, path, 0).status_code == 403
    assert proxy.counts() == Counter(["error", "throttle", "cut", "corrupt", "slow", "permanent"])


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_faults_come_in_their_share_whatever_the_requests(filled: Store, faulty: MakeFaulty) -> None:
    drawn = []
    for seed in (1, 1, 2):
        proxy = faulty(filled, Faults(error=0.3, cut=0.02, seed=seed, only="shard"))
        statuses = []
        for first in range(100):
            try:
                statuses.append(fetch(proxy, "files/things/shard.tar", first).status_code)
            except module("requests", "requests").exceptions.ChunkedEncodingError:
                statuses.append(0)
        assert statuses.count(503) in (30, 31)
        assert statuses.count(0) in (2, 3)
        drawn.append(statuses)
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_kinds_of_faults_come_soon() -> None:
    dealer = Dealer(Faults.everywhere(0.1))
    dealt = Counter(dealer.deal("GET", "/a.tar") for _ in range(50))
    assert all(dealt[kind] in (1, 2) for kind in KINDS)
    assert "corrupt" not in {dealer.deal("GET", "/corpus.json") for _ in range(500)}
    assert {dealer.deal("HEAD", "/a.tar") for _ in range(500)} == {"", "error", "throttle"}
