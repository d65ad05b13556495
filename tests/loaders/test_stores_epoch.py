"""An epoch from object stores, with and without faults, gives the batches of the local corpus."""

import threading
import time
import traceback

import pytest
import torch
from faulty_proxy import KINDS, Faults
from object_stores import STORES, MakeFaulty, Store
from test_train_loader import config as usual_config

from loaders.config import CacheConfig, LoaderConfig, PerMedia
from loaders.prefetch import StalledError
from loaders.train import TrainLoader
from preprocessing.text import Tokenizer
from storage.limits import RemoteReads


def config(**settings) -> LoaderConfig:
    return usual_config(batch_size=PerMedia(6, 4), **settings)


def epoch_of(corpora: list[str], tokenizer: Tokenizer, settings: LoaderConfig):
    loader = TrainLoader(corpora, tokenizer, settings)
    try:
        return list(loader), loader.counters(), loader.quarantine
    finally:
        loader.close()


def assert_same(batches, expected) -> None:
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    assert all(torch.equal(mine.frames, theirs.frames) for mine, theirs in zip(batches, expected, strict=True))


@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
@pytest.mark.parametrize("store", STORES, indirect=True)
def test_an_epoch_through_all_faults_equals_that_of_the_local_corpus(
    store, faulty, shapes, tokenizer, tmp_path, cached
):
    names = ["images_train", "clips_train"]
    for name in names:
        store.fill(shapes.url(name), name)
    expected, _, _ = epoch_of([shapes.url(name) for name in names], tokenizer, config())
    # of small requests there are few when blocks are cached: the share is larger
    proxy = faulty(store, Faults.everywhere(0.4 if cached else 0.1, seed=5, slow_seconds=0.3))
    cache = CacheConfig(str(tmp_path / "cache"), 1.0, clips=True) if cached else CacheConfig()
    settings = config(cache=cache, remote=RemoteReads(gap_kb=0))
    batches, counters, quarantine = epoch_of([store.url(name, proxy) for name in names], tokenizer, settings)
    assert_same(batches, expected)
    assert not quarantine
    counts = proxy.counts()
    assert sum(counts[kind] for kind in KINDS) > 0
    if not cached:
        assert all(counts[kind] for kind in KINDS)
        assert counters["refetched"] > 0
    assert counters["retries"] > 0
    assert counters["requests"] >= counters["retries"]
    assert 0 <= counters["read_ready"] <= 1


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_with_a_cache_the_second_epoch_sends_no_requests(store, faulty, shapes, tokenizer, tmp_path):
    store.fill(shapes.url("images_train"), "images_train")
    proxy = faulty(store, Faults())
    once = RemoteReads(hedge_percentile=0)
    settings = config(cache=CacheConfig(str(tmp_path / "cache"), 1.0), remote=once)
    loader = TrainLoader([store.url("images_train", proxy)], tokenizer, settings)
    first = sorted(key for batch in loader for key in batch.keys)
    asked = len(proxy.log)
    second = sorted(key for batch in loader for key in batch.keys)
    assert first == second
    assert len(proxy.log) == asked
    assert loader.counters()["cache_hits"] > len(second)
    loader.close()


@pytest.mark.parametrize("status", [403, 404, 400])
@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_permanent_error_ends_the_epoch_within_the_deadline_and_names_the_url(
    store: Store, faulty: MakeFaulty, shapes, tokenizer: Tokenizer, status: int
) -> None:
    store.fill(shapes.url("images_train"), "images_train")
    proxy = faulty(store, Faults(permanent=r"\.tar", permanent_status=status))
    url = store.url("images_train", proxy)
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"{url}/images_train-00000\d\.tar"):
        epoch_of([url], tokenizer, config())
    assert time.monotonic() - began < RemoteReads().deadline / 2


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_store_that_goes_down_ends_the_epoch_at_the_deadline(store, faulty, shapes, tokenizer):
    store.fill(shapes.url("images_train"), "images_train")
    proxy = faulty(store, Faults())
    loader = TrainLoader([store.url("images_train")], tokenizer, config(remote=RemoteReads(deadline=5)))
    next(iter(loader))
    proxy.faults = Faults(error=1)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"s3://.*\.tar bytes .*remote\.deadline=5 s .*HTTP 503"):
        list(loader)
    assert time.monotonic() - began < 30
    loader.close()


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_a_stalled_epoch_is_an_error_with_its_pending_reads(store, faulty, shapes, tokenizer, caplog):
    store.fill(shapes.url("images_train"), "images_train")
    proxy = faulty(store, Faults())
    url = store.url("images_train", proxy)
    loader = TrainLoader([url], tokenizer, config(stall_timeout=2.5))
    proxy.faults = Faults(latency=60)
    with pytest.raises(StalledError, match=rf"stall_timeout=2\.5 s; waiting for: {url}/.* s, try 1"):
        next(iter(loader))
    assert "thread loader-read" in caplog.text
    assert "thread MainThread" in caplog.text
    loader.close()


@pytest.mark.parametrize("store", ["s3", "http"], indirect=True)
def test_leaving_an_epoch_cancels_its_reads_and_threads(store, faulty, shapes, tokenizer):
    store.fill(shapes.url("images_train"), "images_train")
    proxy = faulty(store, Faults())
    before = {thread.name for thread in threading.enumerate()}
    loader = TrainLoader([store.url("images_train", proxy)], tokenizer, config())
    batches = iter(loader)
    next(batches)
    proxy.faults = Faults(latency=60)
    time.sleep(0.2)
    began = time.monotonic()
    batches.close()
    loader.close()
    assert time.monotonic() - began < 30  # the store would answer after 60
    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if name.startswith(("loader", "step", "batch", "read", "decode"))}


def test_credentials_in_urls_and_options_are_refused_and_not_printed(tokenizer, caplog):
    for url, options in (
        ("https://user:hunter2@host/photos", {}),
        ("s3://AKIAEXAMPLE:hunter2@bucket/photos", {}),
        ("https://host/photos?X-Amz-Signature=hunter2", {}),
        ("s3://bucket/photos", {"secret": "hunter2"}),
    ):
        with pytest.raises(ValueError, match="environment") as raised:
            TrainLoader([url], tokenizer, config(storage=options))
        assert "hunter2" not in str(raised.value)
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_no_message_contains_a_secret(store, faulty, shapes, tokenizer, caplog):
    caplog.set_level("DEBUG", logger="loaders")
    store.fill(shapes.url("images_train"), "images_train")
    for faults in (Faults(permanent=r"\.tar"), Faults(error=1, only=r"\.tar"), Faults(cut=1, only=r"\.tar")):
        faulty(store, faults)
        with pytest.raises(OSError) as raised:
            epoch_of([store.url("images_train")], tokenizer, config(remote=RemoteReads(deadline=1)))
        output = "".join(traceback.format_exception(raised.value)) + caplog.text
        assert "testing-secret" not in output
        assert "Signature" not in output
        assert store.url("images_train") in output


def test_too_small_a_cache_is_refused(http, shapes, tokenizer, tmp_path):
    url = http.fill(shapes.url("images_train"), "images_train")
    with pytest.raises(ValueError, match=r"cache\.gb=1e-05 is too little: 8 stripes .* [\d.e-]+ GB at a time"):
        TrainLoader([url], tokenizer, config(cache=CacheConfig(str(tmp_path), 0.00001)))
    with pytest.raises(ValueError, match="set both, or neither"):
        TrainLoader([url], tokenizer, config(cache=CacheConfig(str(tmp_path))))


def test_a_damaged_cache_file_is_fetched_again(http, shapes, tokenizer, tmp_path):
    url = http.fill(shapes.url("images_train"), "images_train")
    settings = config(cache=CacheConfig(str(tmp_path), 1.0))
    expected, _, _ = epoch_of([url], tokenizer, settings)
    for path in tmp_path.glob("singularity-cache-1/items/*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3 :: 997] = b"\0" * len(data[len(data) // 3 :: 997])
        path.write_bytes(data)
    batches, counters, quarantine = epoch_of([url], tokenizer, settings)
    assert_same(batches, expected)
    assert not quarantine
    assert counters["refetched"] > 0
