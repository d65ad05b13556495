"""Many processes and nodes at one store: a node fetches what it needs once, within its limits."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import webdataset
from faulty_proxy import Faults, FaultyProxy
from object_stores import MakeFaulty, Store
from places import ROOT

from loaders.config import CacheConfig, LoaderConfig, PerMedia
from loaders.shards import CorpusReader, describe, open_corpus
from loaders.train import TrainLoader
from preprocessing.text import Tokenizer
from runtime.ranks import Ranks, ranks_of
from sharding.shards.indexing import index_shards
from storage import limits
from storage.cache import DiskCache
from storage.limits import RemoteReads
from storage.ranges import ByteRange

SHARDS, EACH = 64, 4

# A process of a node: after a line of input it opens a corpus and reads every index and some frames.
RANK = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from loaders.config import CacheConfig, LoaderConfig
from loaders.samples import whole_sample
from storage.limits import RemoteReads
from loaders.shards import open_corpus
url, cache, remote, frames = json.loads(sys.argv[1])
config = LoaderConfig(cache=CacheConfig(**cache), remote=RemoteReads(**remote))
print("ready", flush=True)
sys.stdin.readline()
reader = open_corpus(url, config)
indices = [reader.index(shard) for shard in range(len(reader.corpus.shards))]
if frames:
    records = [index.record(row) for index in indices[:frames] for row in range(len(index))]
    assert all(x.jpegs for x in reader.read([whole_sample(record, np.zeros(1, int)) for record in records]))
print(json.dumps([sum(map(len, indices)), dict(reader.counters())]))
reader.close()
"""


@pytest.fixture(scope="module")
def many(shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of many small shards."""
    folder = tmp_path_factory.mktemp("many")
    tars = sorted(str(path) for path in Path(shapes.url("images_train")).glob("*.tar"))
    samples = [sample["jpg"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"many-{shard:06d}.tar"), mtime=0) as tar:
            for row in range(EACH):
                number = shard * EACH + row
                text = f"picture {number}".encode()
                tar.write({"__key__": f"{number:06d}", "jpg": samples[number % len(samples)], "txt": text})
    index_shards(str(folder))
    return folder


class Processes:
    """The processes of one node, started together."""

    def __init__(
        self, url: str, count: int, cache: CacheConfig, remote: RemoteReads, temporary: Path, frames: int = 0
    ) -> None:
        words = [sys.executable, "-c", RANK, json.dumps([url, asdict(cache), asdict(remote), frames])]
        temporary.mkdir(exist_ok=True)
        job = {**os.environ, "TMPDIR": str(temporary), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        self.all = [
            subprocess.Popen(
                words, env={**job, "RANK": str(rank)}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for rank in range(count)
        ]
        for process in self.all:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in self.all:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.all:
            process.kill()
            process.communicate()

    def counters(self) -> list[Counter[str]]:
        """The counters of each process, after all have read every row of every index."""
        found = []
        for process in self.all:
            told, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            rows, counters = json.loads(told)
            assert rows == SHARDS * EACH
            found.append(Counter(counters))
        return found


def request_counts(proxy: FaultyProxy) -> Counter[str]:
    """Number of requests for each file."""
    return Counter(seen.path.partition("?")[0].rsplit("/", 1)[-1] for seen in proxy.log)


@pytest.mark.parametrize(("store", "cached"), [("s3", True), ("http", True), ("http", False)], indirect=["store"])
def test_several_processes_of_a_node_send_as_many_requests_as_one(
    store: Store, faulty: MakeFaulty, many: Path, tmp_path: Path, cached: bool
) -> None:
    store.fill(many, "many")
    proxy = faulty(store, Faults(latency=0.02))
    seen = []
    for count in (1, 4):
        proxy.log.clear()
        folder = tmp_path / str(count)
        cache = CacheConfig(str(folder / "cache"), 1.0) if cached else CacheConfig()
        remote = RemoteReads(hedge_percentile=0)
        with Processes(store.url("many", proxy), count, cache, remote, folder) as processes:
            counters = processes.counters()
        seen.append(request_counts(proxy))
        assert sum(each["requests"] for each in counters) == 1 + SHARDS
        assert bool(sum(each["files_shared"] for each in counters)) == (count > 1)
    assert seen[0] == seen[1] == Counter(path.name for path in many.iterdir() if path.suffix in (".json", ".parquet"))


def test_without_a_cache_each_process_fetches_its_own_files(
    http: Store, faulty: MakeFaulty, many: Path, tmp_path: Path
) -> None:
    http.fill(many, "many")
    proxy = faulty(http, Faults())
    remote = RemoteReads(hedge_percentile=0)
    with Processes(http.url("many", proxy), 2, CacheConfig(index_mb=0), remote, tmp_path) as processes:
        processes.counters()
    assert set(request_counts(proxy).values()) == {2}
    assert not list(tmp_path.iterdir())


def test_after_a_kill_another_process_fetches_the_file(
    http: Store, faulty: MakeFaulty, many: Path, tmp_path: Path
) -> None:
    http.fill(many, "many")
    proxy = faulty(http, Faults(latency=60))
    arguments = CacheConfig(), RemoteReads(hedge_percentile=0, try_seconds=300), tmp_path
    with Processes(http.url("many", proxy), 2, *arguments) as processes:
        while not proxy.log:
            time.sleep(0.02)
        time.sleep(0.5)
        assert len(proxy.log) == 1  # one process fetches, the other one waits for it
        proxy.faults = Faults()
        fetching = next(process for process in processes.all if connected(process.pid, proxy.port))
        os.kill(fetching.pid, signal.SIGKILL)
        processes.all.remove(fetching)
        began = time.monotonic()
        processes.counters()
        assert time.monotonic() - began < 30
        fetching.communicate()


def connected(process: int, port: int) -> bool:
    """Whether a process has a connection to that port."""
    import psutil

    return any(link.raddr and link.raddr.port == port for link in psutil.Process(process).net_connections())


DESCRIBE = """
import sys
from loaders.config import CacheConfig, LoaderConfig
from loaders.shards import describe

print("begun", flush=True)
sys.stdin.readline()
print(describe(sys.argv[1], LoaderConfig(cache=CacheConfig(sys.argv[2], 1.0))).name)
"""


def test_a_process_started_later_sees_a_corpus_that_was_packed_again(http: Store, many: Path, tmp_path: Path) -> None:
    url, cache = http.fill(many, "many"), str(tmp_path / "cache")
    config = LoaderConfig(cache=CacheConfig(cache, 1.0))
    description = Path(http.folder or "") / "files" / "many" / "corpus.json"
    command = [sys.executable, "-c", DESCRIBE, url, cache]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as older:
        assert older.stdout is not None
        assert older.stdout.readline() == "begun\n"
        corpus = describe(url, config)
        description.write_text(replace(corpus, name="another", url="").to_json())
        assert describe(url, config).name == "another"
        description.write_text(replace(corpus, name="a third", url="").to_json())
        assert older.communicate("now\n", timeout=60)[0] == "another\n"  # fetched after it began: fresh enough
    later = subprocess.run(command, input="now\n", capture_output=True, text=True, timeout=60, check=True)
    assert later.stdout == "begun\na third\n"


def test_without_locks_in_the_cache_processes_only_share_less(
    http: Store, many: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = http.fill(many, "many")
    config = LoaderConfig(cache=CacheConfig(str(tmp_path), 1.0))
    (DiskCache(str(tmp_path), 10**9).folder / "locks").write_text("in the way")
    assert describe(url, config).name == "many0"
    assert "processes do not share this work" in caplog.text


def test_a_damaged_description_is_fetched_again_and_refused_if_it_stays_damaged(
    http: Store, faulty: MakeFaulty, many: Path
) -> None:
    url = http.fill(many, "many")
    proxy = faulty(http, Faults(corrupt=0.5, corrupt_only="corpus.json", seed=1))
    refetched = 0
    for _ in range(4):
        reader = CorpusReader(http.url("many", proxy))
        assert reader.corpus.samples == SHARDS * EACH
        refetched += reader.counters()["refetched"]
        reader.close()
    assert refetched == proxy.counts()["corrupt"] > 0
    description = Path(http.folder or "") / "files" / "many" / "corpus.json"
    description.write_text(description.read_text().replace('"captions": 4', '"captions": 5', 1))
    for where in (url, str(description.parent)):
        with pytest.raises(ValueError, match=r"corpus\.json is damaged \(it does not match its own checksum\)"):
            CorpusReader(where)


def begin(url: str, ranks: Ranks, folder: str, config: LoaderConfig, go) -> None:
    """The first process of a node: opens the corpus at the same time as the others."""
    limits._waited.clear()
    go.wait()
    reader = open_corpus(url, replace(config, cache=CacheConfig(folder, 1.0)), ranks=ranks)
    reader.index(ranks.node_rank)
    reader.close()


def test_64_nodes_that_start_at_once_begin_to_read_in_turn(
    http: Store, faulty: MakeFaulty, many: Path, tmp_path: Path
) -> None:
    http.fill(many, "many")
    proxy = faulty(http, Faults())
    config = LoaderConfig(remote=RemoteReads(starts_per_second=16, hedge_percentile=0))
    context = multiprocessing.get_context("fork")
    go = context.Event()
    nodes = [
        context.Process(
            target=begin,
            args=(http.url("many", proxy), ranks_of(8 * n, 64 * 8, 8), str(tmp_path / f"{n}"), config, go),
        )
        for n in range(64)
    ]
    for each in nodes:
        each.start()
    began = time.monotonic()
    go.set()
    for each in nodes:
        each.join(120)
        assert each.exitcode == 0
    names = [path.name for path in many.iterdir() if path.suffix == ".parquet"]
    assert request_counts(proxy) == Counter({"corpus.json": 64} | dict.fromkeys(names, 1))
    arrivals = sorted(seen.at - began for seen in proxy.log if "corpus.json" in seen.path)
    assert all(arrival >= number / 16 - 0.05 for number, arrival in enumerate(arrivals))


def test_processes_that_need_all_indices_start_at_different_ones(
    http: Store, faulty: MakeFaulty, many: Path, tmp_path: Path
) -> None:
    http.fill(many, "many")
    proxy = faulty(http, Faults(latency=0.2))
    begins = []
    for rank in (0, 5):
        proxy.log.clear()
        config = LoaderConfig(cache=CacheConfig(str(tmp_path / str(rank)), 1.0))
        reader = open_corpus(http.url("many", proxy), config)
        reader.bring_indices(ranks_of(rank, 8, 2).offset)
        first = [int(re.findall(r"-(\d+)\.parquet", seen.path)[0]) for seen in proxy.log[1:9]]
        begins.append(first)
        reader.close()
    assert set(begins[0]) <= set(range(12))  # eight at a time; a lock that two share delays one of them
    assert set(begins[1]) <= set(range(40, 52))


@pytest.mark.parametrize(
    ("latency", "limit", "seconds", "most"),
    [
        (0.08, {"connections": 8}, 0.075, 8),  # each takes longer: as many are concurrent
        (0.0, {"requests_per_second": 60}, 2.0, 2 * 60 + 12),  # a few were delayed by a busy machine
    ],
)
def test_the_limits_of_a_node_are_shared_by_its_processes(
    http: Store, faulty: MakeFaulty, many: Path, tmp_path: Path, latency: float, limit: dict, seconds: float, most: int
) -> None:
    http.fill(many, "many")
    proxy = faulty(http, Faults(latency=latency))
    remote = RemoteReads(gap_kb=0, **limit)
    with Processes(http.url("many", proxy), 4, CacheConfig(), remote, tmp_path, frames=16) as processes:
        processes.counters()
    times = [seen.at for seen in proxy.log if seen.path.endswith(".tar")]
    assert len(times) >= 4 * 16 * EACH
    assert most_within(times, seconds) <= most


def most_within(times: list[float], seconds: float) -> int:
    """The largest number of times within that many seconds."""
    times = sorted(times)
    return max(sum(first <= at < first + seconds for at in times[n:]) for n, first in enumerate(times))


def test_the_limits_hold_for_all_corpora_of_a_process_together(
    http: Store, faulty: MakeFaulty, many: Path, tokenizer: Tokenizer
) -> None:
    for name in ("one", "two"):
        http.fill(many, name)
    proxy = faulty(http, Faults(latency=0.06))
    config = LoaderConfig(
        batch_size=PerMedia(16, 16), image_res=32, decode="cpu", threads=1, stripes=4,
        remote=RemoteReads(connections=3, gap_kb=0, hedge_percentile=0),
    )  # fmt: skip
    loader = TrainLoader([http.url(name, proxy) for name in ("one", "two")], tokenizer, config)
    batches = iter(loader)
    next(batches)
    log = list(proxy.log)  # closing cancels requests, and others start instead
    loader.close()
    assert {seen.path.split("/")[2] for seen in log} == {"one", "two"}
    assert most_within([seen.at for seen in log], 0.055) <= 3


def test_waiting_for_the_rate_limiter_does_not_count_towards_the_deadline(http: Store, many: Path) -> None:
    url = http.fill(many, "many")
    remote = RemoteReads(connections=1, requests_per_second=16, deadline=1.5, hedge_percentile=0)
    reader = CorpusReader(url, remote=remote)
    spans = reader.read_ranges([ByteRange(shard.name, 0, 100) for shard in reader.corpus.shards[:48]])
    assert [len(data) for data in spans] == [100] * 48  # the last one's turn comes after 3 seconds
    reader.close()


def test_each_node_reads_only_its_own_samples(
    http: Store, faulty: MakeFaulty, many: Path, tokenizer: Tokenizer
) -> None:
    http.fill(many, "many")
    config = LoaderConfig(
        batch_size=PerMedia(16, 16), image_res=32, decode="cpu", threads=1, stripes=4, window_shards=2,
        remote=RemoteReads(gap_kb=0, hedge_percentile=0, starts_per_second=0),
    )  # fmt: skip
    keys: list[str] = []
    seen: list[list[tuple[str, str]]] = []
    with ExitStack() as stack:
        for first in (0, 2):  # two nodes of two processes
            proxy = faulty(http, Faults())
            for rank in (first, first + 1):
                loader = TrainLoader([http.url("many", proxy)], tokenizer, config, rank, 4, local_world_size=2)
                stack.callback(loader.close)
                keys += [key for batch in loader for key in batch.keys]
            seen.append([(item.path.rsplit("/", 1)[-1], item.range) for item in proxy.log])
    assert sorted(keys) == sorted(f"{many.name}/{number:06d}" for number in range(SHARDS * EACH))  # each sample once
    frames = [Counter(item for item in items if item[0].endswith(".tar")) for items in seen]
    assert sum(map(len, frames)) == SHARDS * EACH == sum(map(Counter.total, frames))  # and the bytes of each frame
    for kind in (".tar", ".parquet"):
        one, two = ({name for name, _ in items if name.endswith(kind)} for items in seen)
        assert len(one | two) == SHARDS
        assert one.isdisjoint(two)


@pytest.mark.parametrize("name", ["requests_per_second", "starts_per_second", "connections"])
def test_impossible_limits_are_named(name: str, shapes, tokenizer: Tokenizer) -> None:
    config = LoaderConfig(remote=RemoteReads(**{name: -1}))
    with pytest.raises(ValueError, match=rf"remote\.{name} is -1: must be"):
        TrainLoader([shapes.url("images_train")], tokenizer, config)
