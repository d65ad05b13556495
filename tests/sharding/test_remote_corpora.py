"""Verifying, repairing and indexing in object stores with failing requests."""

from pathlib import Path

import fsspec
import pytest
from faulty_proxy import Faults
from object_stores import MakeFaulty, Store

from sharding.inspect import main as inspect_main
from sharding.shards.indexing import index_shards
from sharding.shards.schema import read_corpus
from sharding.shards.verification import verify_corpus
from sharding.verify import main

FAILING = Faults(error=0.08, throttle=0.04, cut=0.08, seed=3)


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_a_damaged_byte_in_a_store_is_found_and_an_index_is_repaired_there(clips: Path, store: Store, capsys) -> None:
    url = store.fill(clips, "clips")
    assert not verify_corpus(url, decode=True)
    known = read_corpus(url)
    filesystem, root = fsspec.url_to_fs(url)
    tar = f"{root}/{known.shards[1].name}"
    whole = filesystem.cat_file(tar)
    filesystem.pipe_file(tar, whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    (fault,) = verify_corpus(url)
    assert (fault.file, fault.offset <= 5000) == (known.shards[1].name, True)
    filesystem.pipe_file(tar, whole)
    filesystem.rm_file(f"{root}/{known.shards[0].index_name}")
    filesystem.pipe_file(f"{root}/corpus.json", b"{}")
    filesystem.invalidate_cache()
    assert main([url, "--repair", "--workers", "1", "--log-every", "0"]) == 0
    out = capsys.readouterr().out
    assert f"repaired: {known.shards[0].index_name} rebuilt" in out
    assert not verify_corpus(url, decode=True)
    assert [shard.sha256 for shard in read_corpus(url).shards] == [shard.sha256 for shard in known.shards]


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_failing_requests_are_not_reported_as_faults(clips: Path, store: Store, faulty: MakeFaulty) -> None:
    url = store.fill(clips, "clips")
    proxy = faulty(store, FAILING)
    assert not verify_corpus(url, decode=True)
    assert inspect_main([url, "--stats", "--log-every", "0"]) == 0
    spoiled = proxy.counts()
    assert spoiled["error"] + spoiled["cut"] + spoiled["throttle"] > 0


def test_shards_are_indexed_when_requests_fail(clips: Path, s3: Store, faulty: MakeFaulty) -> None:
    known = read_corpus(str(clips))
    for path in [*clips.glob("*.parquet"), *clips.glob("*.json")]:
        path.unlink()
    url = s3.fill(clips, "tars")
    faulty(s3, FAILING)
    corpus_there = index_shards(url)
    assert [shard.sha256 for shard in corpus_there.shards] == [shard.sha256 for shard in known.shards]
    assert not verify_corpus(url, decode=True)


def test_bytes_corrupted_in_transit_are_found(clips: Path, s3: Store, faulty: MakeFaulty) -> None:
    url = s3.fill(clips, "clips")
    faulty(s3, Faults(corrupt=1, corrupt_only=r"000002\.tar"))
    faults = verify_corpus(url)
    assert faults
    assert {fault.file for fault in faults} == {"clips_train-000002.tar"}
