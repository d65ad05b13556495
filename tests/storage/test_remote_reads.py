"""Reading stores through bad days: what passes is tried again, what stays is said at once, with the URL."""

import asyncio
import base64
import multiprocessing
import re
import threading
import time
from concurrent.futures import CancelledError
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
def test_parts_come_whole_through_every_fault(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults.everywhere(0.4, seed=3, slow_seconds=0.3, corrupt_only="none"))
    reading = remote_store(store.url(folder, proxy), hedge_percentile=0)
    assert reading.read_ranges(PARTS) == WANTED
    counts = proxy.counts()
    assert min(counts[kind] for kind in ("error", "throttle", "cut", "slow")) > 0
    assert reading.counters["retries"] == counts["error"] + counts["throttle"] + counts["cut"]
    assert reading.counters["requests"] == len(PARTS) + reading.counters["retries"]
    assert reading.pending() == []


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_retry_after_of_a_store_is_honoured(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
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
    assert time.monotonic() - began < 25  # it cannot be in time: said without waiting


@pytest.mark.parametrize(("status", "error"), [(403, PermissionError), (404, FileNotFoundError), (400, OSError)])
@pytest.mark.parametrize("store", STORES, indirect=True)
def test_what_stays_is_said_at_once_with_the_url(
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


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_store_that_stays_down_ends_within_the_deadline(
    store: Store, folder: str, faulty: MakeFaulty, remote_store
) -> None:
    proxy = faulty(store, Faults(error=1))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"shard\.tar .* was not read within .*HTTP 503"):
        remote_store(store.url(folder, proxy), deadline=2).read_ranges(PARTS[:4])
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_a_server_that_is_not_there_is_named(store: Store, folder: str, remote_store) -> None:
    with pytest.raises(TimeoutError, match=r"http://127\.0\.0\.1:9/things/shard\.tar"):
        remote_store("http://127.0.0.1:9/things", deadline=1).read_ranges(PARTS[:1])


def test_an_unreachable_store_is_logged_while_reading_is_retried(monkeypatch, caplog, remote_store) -> None:
    monkeypatch.setattr("storage.remote.WARN_SECONDS", 0.2)  # by chance the tries may end soon after half a second
    with pytest.raises(TimeoutError, match=r"the last: cannot connect to 127\.0\.0\.1:9$"):
        remote_store("http://127.0.0.1:9/things", deadline=3).read_ranges(PARTS)
    told = [record.getMessage() for record in caplog.records if record.name == "storage.remote"]
    assert 1 <= len(told) <= 15  # for all parts together
    assert re.fullmatch(
        r"http://127\.0\.0\.1:9/things/shard\.tar bytes \d+-\d+: \d+ tries in \d s, the last: cannot connect to "
        r"127\.0\.0\.1:9; retrying until remote\.deadline=3 s",
        told[0],
    )


@pytest.mark.parametrize("store", ["s3", "http"], indirect=True)
def test_stragglers_are_asked_for_twice(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults(latency=0.5))
    hedging = remote_store(store.url(folder, proxy))
    assert hedging.read_ranges(PARTS) == WANTED  # learns how long it takes: longer than any but the stragglers will
    proxy.faults = Faults(slow=0.06, slow_seconds=8, seed=1)
    assert hedging.read_ranges(PARTS) == WANTED
    assert proxy.counts()["slow"] > 0
    assert hedging.counters["hedges_won"] > 0
    assert hedging.counters["hedges"] <= 0.1 * hedging.counters["requests"] + 17


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_without_hedging_the_straggler_is_waited_for(
    store: Store, folder: str, faulty: MakeFaulty, remote_store
) -> None:
    proxy = faulty(store, Faults())
    reading = remote_store(store.url(folder, proxy), hedge_percentile=0)
    reading.read_ranges(PARTS)
    proxy.faults = Faults(slow=1, slow_seconds=0.5)
    reading.read_ranges(PARTS)
    assert reading.counters["hedges"] == 0
    assert len(proxy.log) == 2 * len(PARTS)


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_a_try_that_takes_too_long_is_given_up(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults(slow=0.5, slow_seconds=20, seed=2))
    reading = remote_store(store.url(folder, proxy), try_seconds=0.5, hedge_percentile=0)
    assert reading.read_ranges(PARTS[:10]) == WANTED[:10]
    assert reading.counters["retries"] > 0


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_few_connections_are_open_at_a_time(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults(latency=0.05))
    reading = remote_store(store.url(folder, proxy), connections=4, hedge_percentile=0)
    began = time.monotonic()
    reading.read_ranges(PARTS[:20])
    assert time.monotonic() - began >= 0.05 * 20 / 4


def read_in_child(reading: RemoteStore, queue) -> None:
    queue.put(reading.read_ranges(PARTS[:3]) == WANTED[:3])
    reading.close()


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_forked_child_makes_clients_of_its_own(store: Store, folder: str, remote_store) -> None:
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


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_what_is_waited_for_can_be_told_and_ended(store: Store, folder: str, faulty: MakeFaulty, remote_store) -> None:
    proxy = faulty(store, Faults(latency=60))
    reading = remote_store(store.url(folder, proxy))
    told, seconds = end_while_waiting(reading)
    assert f"{store.url(folder, proxy)}/shard.tar bytes 0-1499: " in told[0]
    assert seconds < 30


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_a_read_that_has_only_just_begun_is_ended_too(
    store: Store, folder: str, faulty: MakeFaulty, monkeypatch, remote_store
) -> None:
    """Its thread has given it to the event loop, where it runs, and has come no further."""
    submit = asyncio.run_coroutine_threadsafe

    def submit_and_be_slow(coroutine, loop):
        call = submit(coroutine, loop)
        time.sleep(1)
        return call

    proxy = faulty(store, Faults(latency=60))
    reading = remote_store(store.url(folder, proxy))
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", submit_and_be_slow)
    _, seconds = end_while_waiting(reading)
    assert seconds < 30


def end_while_waiting(reading: RemoteStore) -> tuple[list[str], float]:
    """Begin a read, end it as soon as it is waited for; what was told of it, and the seconds that ending took."""
    ended: list[BaseException] = []

    def read() -> None:
        try:
            reading.read_ranges(PARTS[:1])
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not (told := reading.pending()):
        time.sleep(0.01)
    began = time.monotonic()
    reading.cancel()
    thread.join()
    assert isinstance(ended[0], CancelledError)
    return told, time.monotonic() - began


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_an_object_that_ends_early_gives_what_there_is(store: Store, folder: str, remote_store) -> None:
    reading = remote_store(store.url(folder))
    end = len(DATA)
    found = reading.read_ranges(
        [ByteRange("shard.tar", end - 10, end + 10), ByteRange("shard.tar", end + 50, end + 60)]
    )
    assert found == [DATA[-10:], b""]
    assert reading.read_ranges([ByteRange("shard.tar")]) == [DATA]


class Guarded(Handler):
    """Answers byte ranges to whoever gives the password; as a proxy as well, that of the proxy's user."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        header = "Proxy-Authorization" if self.path.startswith("http") else "Authorization"
        allowed = self.headers.get(header) == "Basic " + base64.b64encode(b"jane:open sesame").decode()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        self.say(*((206, DATA[int(first) : int(last) + 1]) if allowed else (401,)))


@pytest.fixture
def guarded():
    with serving(Guarded, asked=[]) as server:
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


def test_the_proxy_of_the_environment_is_gone_through(guarded, monkeypatch, remote_store) -> None:
    monkeypatch.setenv("http_proxy", f"http://jane:open%20sesame@127.0.0.1:{guarded.server_port}")
    monkeypatch.setenv("no_proxy", "elsewhere.test")
    reading = remote_store("http://store.test/things")
    assert reading.read_ranges(PARTS[:5]) == WANTED[:5]
    assert set(guarded.asked) == {"http://store.test/things/shard.tar"}
    with pytest.raises(OSError, match=r"elsewhere\.test/things"):
        remote_store("http://elsewhere.test/things", deadline=1).read_ranges(PARTS[:1])
    assert len(guarded.asked) == 5
