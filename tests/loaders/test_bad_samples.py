"""Bad samples: left out with their reason, replaced whole by others of their stripes, and never too many."""

import shutil
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_train_loader import texts_by_key

from loaders.config import LoaderConfig, PerMedia, VideoInput
from loaders.text import Tokenizer
from loaders.train import TrainLoader
from sharding.shards.schema import INDEX_SCHEMA, read_corpus
from storage.limits import RemoteReads


def config(**settings) -> LoaderConfig:
    options = {"batch_size": PerMedia(12, 6), "image_res": 32, "decode": "cpu", "threads": 1, "stripes": 8}
    options |= {"video_input": VideoInput(num_frames=2), "max_bad_share": 0.9}
    return LoaderConfig(**options | settings)


def spoil(source: str, folder: Path, damage: dict[int, bytes], frame: int = 0) -> list[str]:
    """Copy a corpus and overwrite a frame of the given samples, in order, padded to its size; returns their names.

    The index agrees with the new bytes, so that only the decoder can find them.
    """
    shutil.copytree(source, folder)
    corpus = read_corpus(str(folder))
    names, number = [], 0
    for info in corpus.shards:
        rows = pq.read_table(folder / info.index_name).to_pylist()
        tar = bytearray((folder / info.name).read_bytes())
        for row in rows:
            if number in damage:
                size = row["sizes"][frame]
                data = damage[number].ljust(size, b"\0")[:size]
                tar[row["offsets"][frame] : row["offsets"][frame] + size] = data
                row["crc32s"][frame] = zlib.crc32(data)
                names.append(f"{corpus.name}/{row['key']}")
            number += 1
        (folder / info.name).write_bytes(tar)
        pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), folder / info.index_name)
    return names


def test_batches_wholly_bad_are_survived(shapes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = next(iter(TrainLoader([shapes.url("images_train")], tokenizer, config())))
    names = list(texts_by_key(shapes.url("images_train")))
    damage = {names.index(key): b"not an image" for key in first.keys}
    bad = spoil(shapes.url("images_train"), tmp_path / "bad", damage)
    batches = list(TrainLoader([str(tmp_path / "bad")], tokenizer, config()))
    assert len(batches) == 12
    assert len(batches[0].keys) == 12
    assert not {key for batch in batches for key in batch.keys} & set(bad)


def test_one_bad_frame_of_a_clip_does_not_make_the_order_depend_on_the_past(
    shapes, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    spoil(shapes.url("clips_train"), tmp_path / "bad", dict.fromkeys(range(0, 40, 3), b""), frame=1)
    settings = config(video_input=VideoInput(num_frames=1))
    loader = TrainLoader([str(tmp_path / "bad")], tokenizer, settings)
    epochs = [list(loader) for _ in range(3)]
    assert 0 < len(loader.quarantine) <= 14
    fresh = list(TrainLoader([str(tmp_path / "bad")], tokenizer, settings).epoch(2))
    assert [batch.keys for batch in fresh] == [batch.keys for batch in epochs[2]]
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(fresh, epochs[2], strict=True))


def test_too_many_bad_samples_end_the_run_naming_one(shapes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    spoil(shapes.url("images_train"), tmp_path / "bad", dict.fromkeys(range(0, 50, 5), b""))
    loader = TrainLoader([str(tmp_path / "bad")], tokenizer, config(max_bad_share=0.001))
    with pytest.raises(ValueError, match=r"unusable, more than max_bad_share=0.001; the last is images_train/"):
        [list(loader) for _ in range(4)]


def test_nothing_but_bad_samples_ends_the_run(shapes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    spoil(shapes.url("images_train"), tmp_path / "bad", dict.fromkeys(range(150), b""))
    with pytest.raises(ValueError, match=r"64 samples in a row are unusable, the last images_train/.*sharding.verify"):
        list(TrainLoader([str(tmp_path / "bad")], tokenizer, config()))


def test_a_shard_lost_on_the_way_ends_the_run_naming_it(shapes, tokenizer: Tokenizer) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(shapes.url("images_train"), "/photos", recursive=True)
    settings = config(batch_size=PerMedia(6), prefetch=1, remote=RemoteReads(ahead_steps=1))  # of 25 steps few ahead
    local = list(TrainLoader([shapes.url("images_train")], tokenizer, settings))
    loader = TrainLoader(["memory://photos"], tokenizer, settings)
    batches = iter(loader)
    for expected in local[:2]:
        batch = next(batches)
        assert batch.keys == expected.keys
        assert torch.equal(batch.frames, expected.frames)
    for tar in memory.glob("/photos/*.tar"):
        memory.rm(tar)
    with pytest.raises(FileNotFoundError, match=r"memory://photos/images_train-0000.*\.tar is missing"):
        list(batches)
    loader.close()


@pytest.mark.parametrize(("antialias", "largest", "mean"), [(False, 24, 0.5), (True, 8, 0.2)])
def test_both_back_ends_show_the_same_epoch(
    shapes, tokenizer: Tokenizer, antialias: bool, largest: int, mean: float
) -> None:
    """DALI's cubic kernel is Catmull-Rom, which is PyTorch's with antialiasing; without, PyTorch's is sharper."""
    corpora = [shapes.url("images_train"), shapes.url("clips_train")]
    cpu, dali = (TrainLoader(corpora, tokenizer, config(decode=way, antialias=antialias)) for way in ("cpu", "dali"))
    for one, other in zip(cpu, dali, strict=True):
        assert one.keys == other.keys
        difference = np.abs(one.frames.numpy().astype(int) - other.frames.numpy())
        assert difference.max() <= largest
        assert difference.mean() < mean
