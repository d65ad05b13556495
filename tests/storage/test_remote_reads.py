"""Reads from remote stores: transient errors are retried, permanent ones are raised at once with the URL."""

import asyncio
import base64
import multiprocessing
import re
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import Faults
from object_stores import STORES, MakeFaulty, Store
from web_servers import Handler, serving

from storage.limits import RemoteReads
from storage.ranges import ByteRange
from storage.remote import RemoteStore

DATA = np.random.default_rng(1).bytes(400_000)
PARTS = [ByteRange("shard.tar", first, first + 1500) for first in range(0, 300_000, 5000)]
WANTED = [DATA[part.start : part.end] for part in PARTS]


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> str:
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "shard.tar").write_bytes(DATA)
    store.fill(tmp_path / "things", "things")
    return "things"


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_ranges_are_complete_through_every_fault(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults.everywhere(0.4, seed=3, slow_seconds=0.3, corrupt_only="none"))
    reading = remote_store(store.url(folder, proxy), hedge_percentile=0)
    assert reading.read_ranges(PARTS) == WANTED
    counts = proxy.counts()
    assert min(counts[kind] for kind in ("error", "throttle", "cut", "slow")) > 0
    assert reading.counters["retries"] == counts["error"] + counts["throttle"] + counts["cut"]
    assert reading.counters["requests"] == len(PARTS) + reading.counters["retries"]
    assert reading.pending() == []


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_retry_after_is_honoured(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults(throttle=1, retry_after=1))
    with pytest.raises(TimeoutError, match=r"things/shard\.tar bytes 0-1499 .*deadline=4 s .*the last: HTTP 429"):
        remote_store(store.url(folder, proxy), deadline=4).read_ranges(PARTS[:1])
    times = [seen.at for seen in proxy.log]
    assert 2 <= len(times) <= 4
    assert all(later - earlier >= 1 for earlier, later in pairwise(times))
    proxy.faults = Faults(throttle=1, retry_after=60)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"429"):
        remote_store(store.url(folder, proxy), deadline=30).read_ranges(PARTS[:1])
    assert time.monotonic() - began < 25  # longer than the deadline: raised without waiting


@pytest.mark.parametrize(("status", "error"), [(403, PermissionError), (404, FileNotFoundError), (400, OSError)])
@pytest.mark.parametrize("store", STORES, indirect=True)
def test_permanent_errors_are_raised_at_once_with_the_url(
    store: Store, folder: str, faulty: MakeFaulty, status: int, error: type[OSError], remote_store
) -> None:
    proxy = faulty(store, Faults(permanent="shard", permanent_status=status))
    url = store.url(folder, proxy)
    began = time.monotonic()
    with pytest.raises(error) as raised:
        remote_store(url).read_ranges(PARTS)
    assert time.monotonic() - began < RemoteReads().deadline / 2
    assert f"{url}/shard.tar" in str(raised.value)
    assert "Signature" not in str(raised.value)
    assert "testing" not in str(raised.value)


def test_an_unreachable_store_is_logged_while_reading_is_retried(monkeypatch, caplog, remote_store) -> None:
    monkeypatch.setattr("storage.remote.WARN_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match=r"the last: cannot connect to 127\.0\.0\.1:9$"):
        remote_store("http://127.0.0.1:9/things", deadline=3).read_ranges(PARTS)
    logged = [record.getMessage() for record in caplog.records if record.name == "storage.remote"]
    assert 1 <= len(logged) <= 15  # for all ranges together
    assert re.fullmatch(
        r"http://127\.0\.0\.1:9/things/shard\.tar bytes \d+-\d+: \d+ tries in \d s, the last: cannot connect to "
        r"127\.0\.0\.1:9; retrying until remote\.deadline=3 s",
        logged[0],
    )


@pytest.mark.parametrize("store", ["s3", "http"], indirect=True)
def test_slow_requests_are_hedged(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults(latency=0.5))
    hedging = remote_store(store.url(folder, proxy))
    assert hedging.read_ranges(PARTS) == WANTED  # measures latencies
    proxy.faults = Faults(slow=0.06, slow_seconds=8, seed=1)
    assert hedging.read_ranges(PARTS) == WANTED
    assert proxy.counts()["slow"] > 0
    assert hedging.counters["hedges_won"] > 0
    assert hedging.counters["hedges"] <= 0.1 * hedging.counters["requests"] + 17


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_hedging_can_be_disabled(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults())
    reading = remote_store(store.url(folder, proxy), hedge_percentile=0)
    reading.read_ranges(PARTS)
    proxy.faults = Faults(slow=1, slow_seconds=0.5)
    reading.read_ranges(PARTS)
    assert reading.counters["hedges"] == 0
    assert len(proxy.log) == 2 * len(PARTS)


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_a_request_that_exceeds_try_seconds_is_retried(
    store: Store, folder: str, faulty: MakeFaulty, remote_store
) -> None:
    proxy = faulty(store, Faults(slow=0.5, slow_seconds=20, seed=2))
    reading = remote_store(store.url(folder, proxy), try_seconds=0.5, hedge_percentile=0)
    assert reading.read_ranges(PARTS[:10]) == WANTED[:10]
    assert reading.counters["retries"] > 0


def read_in_child(reading: RemoteStore, queue) -> None:
    queue.put(reading.read_ranges(PARTS[:3]) == WANTED[:3])
    reading.close()


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_forked_child_opens_its_own_connections(store: Store, folder: str, remote_store) -> None:
    reading = remote_store(store.url(folder))
    assert reading.read_ranges(PARTS[:3]) == WANTED[:3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(reading, queue))
    child.start()
    assert queue.get(timeout=60)
    child.join(30)
    assert child.exitcode == 0
    assert reading.read_ranges(PARTS[:3]) == WANTED[:3]


@pytest.mark.parametrize("seconds", [0, 1], ids=["waiting", "just submitted"])
@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_a_read_is_listed_as_pending_and_can_be_cancelled(
    store: Store, folder: str, faulty: MakeFaulty, monkeypatch, remote_store, seconds: float
) -> None:
    """Also while its thread has only just given it to the event loop."""
    submit = asyncio.run_coroutine_threadsafe

    def submit_slowly(coroutine, loop):
        call = submit(coroutine, loop)
        time.sleep(seconds)
        return call

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", submit_slowly)
    url = store.url(folder, faulty(store, Faults(latency=60)))
    reading = remote_store(url)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(reading.read_ranges, PARTS[:1])
        while not (pending := reading.pending()):
            time.sleep(0.01)
        reading.cancel()
        with pytest.raises(CancelledError):
            read.result(30)
    assert pending[0].startswith(f"{url}/shard.tar bytes 0-1499: ")


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_range_beyond_the_end_is_cut_short(store: Store, folder: str, remote_store) -> None:
    reading = remote_store(store.url(folder))
    end = len(DATA)
    found = reading.read_ranges(
        [ByteRange("shard.tar", end - 10, end + 10), ByteRange("shard.tar", end + 50, end + 60)]
    )
    assert found == [DATA[-10:], b""]
    assert reading.read_ranges([ByteRange("shard.tar")]) == [DATA]


class Guarded(Handler):
    """Serves byte ranges, directly and as a proxy, to clients that send the password."""

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        header = "Proxy-Authorization" if self.path.startswith("http") else "Authorization"
        allowed = self.headers.get(header) == "Basic " + base64.b64encode(b"jane:open sesame").decode()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        self.say(*((206, DATA[int(first) : int(last) + 1]) if allowed else (401,)))


@pytest.fixture
def guarded():
    with serving(Guarded, requested=[]) as server:
        yield server


def test_passwords_come_from_netrc(guarded, tmp_path: Path, monkeypatch, remote_store) -> None:
    url = f"http://127.0.0.1:{guarded.server_port}/things"
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    with pytest.raises(PermissionError, match=r"things/shard\.tar cannot be read: access is denied \(HTTP 401"):
        remote_store(url).read_ranges(PARTS[:1])
    (tmp_path / "netrc").write_text('machine 127.0.0.1 login jane password "open sesame"\n')
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    reading = remote_store(url)
    assert reading.read_ranges(PARTS[:5]) == WANTED[:5]


def test_the_proxy_of_the_environment_is_used(guarded, monkeypatch, remote_store) -> None:
    monkeypatch.setenv("http_proxy", f"http://jane:open%20sesame@127.0.0.1:{guarded.server_port}")
    monkeypatch.setenv("no_proxy", "elsewhere.test")
    reading = remote_store("http://store.test/things")
    assert reading.read_ranges(PARTS[:5]) == WANTED[:5]
    assert set(guarded.requested) == {"http://store.test/things/shard.tar"}
    with pytest.raises(OSError, match=r"elsewhere\.test/things"):
        remote_store("http://elsewhere.test/things", deadline=1).read_ranges(PARTS[:1])
    assert len(guarded.requested) == 5
