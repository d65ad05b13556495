"""Limits while a store is read: the size of a cache that several loaders share, and the prefetched bytes."""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from faulty_proxy import Faults
from object_stores import STORES
from places import ROOT

from loaders.config import CacheConfig, LoaderConfig, PerMedia
from loaders.train import TrainLoader
from loaders.vocab import corpus_texts, learn_vocabulary
from sharding.build import build_corpus
from sharding.shapes import write_shapes
from sharding.shards.schema import read_corpus, read_index
from storage.cache import FOLDER
from storage.limits import RemoteReads

BATCH = 32

# One of several loaders at work on the same folder: two epochs of an own order; prints what every batch held.
LOADER = f"""
import json, sys, zlib
sys.path.insert(0, {str(ROOT)!r})
from loaders.config import CacheConfig, LoaderConfig, PerMedia
from preprocessing.text import Tokenizer
from loaders.train import TrainLoader
url, vocab, cache, seed = json.loads(sys.argv[1])
config = LoaderConfig(batch_size=PerMedia({BATCH}, 8), image_res=32, decode="cpu", threads=1, stripes=2,
    window_shards=1, seed=seed, cache=CacheConfig(**cache))
loader = TrainLoader([url], Tokenizer.load(vocab), config)
print("ready", flush=True)
for _ in range(2):
    for batch in loader:
        print(json.dumps([batch.keys, zlib.crc32(batch.frames.numpy().tobytes())]), flush=True)
print(json.dumps(dict(loader.counters())))
assert not len(loader.quarantine)
loader.close()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in shards of a MiB, several times what one step shows."""
    root = tmp_path_factory.mktemp("large")
    drawn = write_shapes(root / "drawn", images=400, clips=1, test_items=1, size=224, seed=4)
    folder = root / "photos"
    annotations = [str(drawn / "images_train.json")]
    build_corpus(annotations, str(drawn / "media"), "image", str(folder), size=224, shard_mb=1, workers=2, quality=95)
    return folder


def start(url: str, vocab: Path, cache: CacheConfig, seed: int) -> subprocess.Popen:
    words = [sys.executable, "-c", LOADER, json.dumps([url, str(vocab), asdict(cache), seed])]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def results(process: subprocess.Popen) -> tuple[list, dict[str, float]]:
    """The batches of a loader and its counters."""
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    *batches, counters = map(json.loads, output.splitlines()[1:])  # the first line is "ready"
    return batches, counters


def test_two_loaders_share_one_cache_within_its_budget_and_without_damage(http, shapes, large, tmp_path):
    url = http.fill(large, "photos")
    size = sum(shard.bytes for shard in read_corpus(url).shards)
    assert len(read_corpus(url).shards) >= 6
    alone = [results(start(str(large), shapes.vocab, CacheConfig(), seed))[0] for seed in (1, 2)]
    cache = CacheConfig(str(tmp_path), 0.8 * size / 1e9)
    both = [start(url, shapes.vocab, cache, seed) for seed in (1, 2)]
    largest = 0
    while any(process.poll() is None for process in both):
        largest = max(largest, sum(bytes_of(path) for path in (tmp_path / FOLDER / "items").glob("*/*")))
        time.sleep(0.02)
    together = [results(process) for process in both]
    assert [batches for batches, _ in together] == alone
    assert 0 < largest <= cache.gb * 1e9
    assert sum(counters["cache_evictions"] for _, counters in together) > 0
    assert all(counters["refetched"] == 0 for _, counters in together)


def bytes_of(path: Path) -> int:
    """A file's size; 0 when it has just left."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("ahead_mb", [1, 2])
def test_prefetched_bytes_stay_within_ahead_mb(http, faulty, large, tokenizer, ahead_mb):
    http.fill(large, "photos")
    proxy = faulty(http, Faults())
    remote = RemoteReads(ahead_mb=ahead_mb, connections=1000, gap_kb=0, hedge_percentile=0)
    config = LoaderConfig(
        batch_size=PerMedia(2 * BATCH, 8), image_res=32, decode="cpu", threads=1, prefetch=1, remote=remote
    )
    corpus = read_corpus(str(large))
    step = 2 * BATCH * sum(shard.bytes for shard in corpus.shards) / corpus.samples
    assert 6 * step > 2.2 * 2**20  # with as many steps ahead as there are it would be more
    loader = TrainLoader([http.url("photos", proxy)], tokenizer, config)
    proxy.faults = Faults(latency=1.5)
    batches = iter(loader)
    next(batches)
    time.sleep(4)
    fetched, decoded = loader.counters()["bytes_fetched"], loader.counters()["samples"] / (2 * BATCH)
    frames = [(seen.at, *map(int, re.findall(r"\d+", seen.range))) for seen in proxy.log if ".tar" in seen.path]
    at_first = sum(last - begin + 1 for at, begin, last in frames if at < frames[0][0] + 1.4)  # before any answer
    loader.close()
    assert at_first <= max(1.15 * step, ahead_mb * 2**20)
    in_decoding = 2 * step  # taken, and not a batch yet
    assert fetched <= decoded * step * 1.1 + in_decoding + max(2 * step, ahead_mb * 2**20)


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_descriptions_and_texts_survive_transient_errors(store, faulty, shapes, tmp_path):
    store.fill(shapes.url("qa_train"), "questions")
    proxy = faulty(store, Faults(error=0.25, cut=0.15, seed=2))
    url = store.url("questions", proxy)
    config = LoaderConfig(cache=CacheConfig(index_mb=0))
    expected = list(corpus_texts(shapes.url("qa_train"), config))
    for _ in range(2):
        assert list(corpus_texts(url, config)) == expected
        assert read_index(read_corpus(url), 0).num_rows == read_corpus(url).shards[0].samples
    assert learn_vocabulary([url], 300, tmp_path / "vocab.txt") > 50
    assert proxy.counts()["error"] > 0
    assert proxy.counts()["cut"] > 0
