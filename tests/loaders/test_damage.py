"""Bad samples of every kind: recorded with their reason, and replaced by others of their stripes up to a limit."""

import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_train_loader import config, texts_by_key

from loaders.config import LoaderConfig, PerMedia, VideoInput
from loaders.train import TrainLoader
from preprocessing.text import Tokenizer
from sharding.build import build_corpus
from sharding.shapes import write_shapes
from sharding.shards.schema import INDEX_SCHEMA, read_corpus
from storage.limits import RemoteReads

SAMPLES = 1200
WAYS = (
    "flipped bytes", "cut short", "zeros", "not a JPEG", "a wrong offset", "an offset past the end", "no bytes",
    "no frame", "no caption", "another size", "a page instead", "a lost end",
)  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large")
    drawn = write_shapes(root / "drawn", images=SAMPLES, clips=2, test_items=2, size=32, seed=5)
    annotations = [str(drawn / "images_train.json")]
    build_corpus(annotations, str(drawn / "media"), "image", str(root / "packed"), size=32, workers=1)
    return root / "packed"


def damage(row: dict, tar: bytearray, way: str) -> None:
    """Spoil one sample in its tar or its index row."""
    offset, size = row["offsets"][0], row["sizes"][0]
    good = bytes(tar[offset : offset + size])
    match way:
        case "flipped bytes":
            put(row, tar, good[:-40] + bytes(byte ^ 255 for byte in good[-40:]), agree=False)
        case "cut short":
            row["sizes"] = [size // 2]
        case "zeros":
            put(row, tar, b"")
        case "not a JPEG":
            put(row, tar, b"\x89PNG\r\n\x1a\n broken")
        case "a wrong offset":
            row["offsets"] = [offset + 7]
        case "an offset past the end":
            row["offsets"] = [10**12]
        case "no bytes":
            row["sizes"] = [0]
        case "no frame":
            row |= {"offsets": [], "sizes": [], "crc32s": []}
        case "no caption":
            row["captions"] = []
        case "another size":
            row["width"] += 8
        case "a page instead":
            put(row, tar, b"<html>403 Forbidden</html>")
        case "a lost end":
            put(row, tar, good[:120])


def rewritten(source: str | Path, folder: Path, damage: Callable[[int, dict, bytearray], bool]) -> list[str]:
    """Copy a corpus and damage samples by number, index row and tar; returns the names of those that were damaged."""
    shutil.copytree(source, folder)
    corpus, names, numbers = read_corpus(str(folder)), [], itertools.count()
    for info in corpus.shards:
        rows = pq.read_table(folder / info.index_name).to_pylist()
        tar = bytearray((folder / info.name).read_bytes())
        for row in rows:
            names += [f"{corpus.name}/{row['key']}"] if damage(next(numbers), row, tar) else []
        (folder / info.name).write_bytes(tar)
        pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), folder / info.index_name)
    return names


def put(row: dict, tar: bytearray, data: bytes, agree: bool = True, frame: int = 0) -> None:
    """Other bytes in a frame's place; the index agrees with them where only a decoder is to find out."""
    offset, size = row["offsets"][frame], row["sizes"][frame]
    data = data.ljust(size, b"\0")[:size]
    tar[offset : offset + size] = data
    if agree:
        row["crc32s"][frame] = zlib.crc32(data)


@pytest.fixture
def damaged(large: Path, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A corpus of which every hundredth sample is spoiled, and how each of those is."""

    def spoil(number: int, row: dict, tar: bytearray) -> bool:
        if number % 100 == 50:
            damage(row, tar, WAYS[number // 100])
        return number % 100 == 50

    names = rewritten(large, tmp_path / "packed", spoil)
    return str(tmp_path / "packed"), dict(zip(names, WAYS, strict=True))


@pytest.mark.parametrize("decode", ["cpu", "dali"])
def test_all_bad_samples_are_quarantined_and_all_others_arrive(large, damaged, tokenizer, tmp_path, decode):
    url, spoiled = damaged
    own = texts_by_key(url)
    assert set(spoiled.values()) == set(WAYS)
    notes = tmp_path / "run" / "quarantine-{rank}.jsonl"
    settings = {"batch_size": PerMedia(48), "image_res": 32, "decode": decode, "threads": 2, "max_bad_share": 0.02}
    settings["stripes"] = 8
    loader = TrainLoader([url], tokenizer, LoaderConfig(**settings, quarantine_file=str(notes)))
    batches = list(loader)
    loader.close()
    written = [json.loads(line) for line in Path(str(notes).format(rank=0)).read_text().splitlines()]
    assert {line["sample"] for line in written} == set(spoiled) == set(loader.quarantine.reasons)
    assert len(written) == len(spoiled) == loader.counters()["quarantined"]
    assert all(line["tar"].endswith(".tar") and line["epoch"] == 0 for line in written)
    found_by_crc = {"flipped bytes", "cut short", "a wrong offset"}
    assert all(
        line["reason"] and ("CRC-32" in line["reason"]) == (spoiled[line["sample"]] in found_by_crc) for line in written
    )

    sound = TrainLoader([str(large)], tokenizer, LoaderConfig(**settings))
    expected_batches = list(sound)
    order = [key for batch in expected_batches for key in batch.keys]
    for batch, expected in zip(batches, expected_batches, strict=True):
        for row, key in enumerate(expected.keys):
            if key in spoiled:
                assert batch.keys[row] not in spoiled
                same_stripe = (order.index(batch.keys[row]) - order.index(key)) % 8 == 0
                assert same_stripe  # a rank that owns a stripe reads no other rank's shards
                assert tokenizer.decode(batch.input_ids[row].tolist()) in own[batch.keys[row]]
            else:
                assert batch.keys[row] == key
                assert torch.equal(batch.frames[row], expected.frames[row])
                assert torch.equal(batch.input_ids[row], expected.input_ids[row])
    sound.close()


def test_a_few_bad_samples_at_the_start_do_not_end_the_run(damaged, tokenizer: Tokenizer) -> None:
    """One in a hundred is what max_bad_share permits; that chance put some more of them first is no reason to stop."""
    url, spoiled = damaged
    for seed in range(3):
        config = LoaderConfig(batch_size=PerMedia(100), image_res=32, decode="cpu", threads=1, seed=seed)
        loader = TrainLoader([url], tokenizer, config)
        assert len(list(loader)) == 12
        assert len(loader.quarantine) == len(spoiled)
        loader.close()


def spoil(source: str, folder: Path, numbers: Iterable[int], frame: int = 0) -> list[str]:
    """Copy a corpus and overwrite a frame of the samples of these numbers; returns their names."""
    chosen = set(numbers)

    def overwrite(number: int, row: dict, tar: bytearray) -> bool:
        if number in chosen:
            put(row, tar, b"not an image", frame=frame)
        return number in chosen

    return rewritten(source, folder, overwrite)


def test_a_batch_of_bad_samples_only_is_replaced(shapes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = next(iter(TrainLoader([shapes.url("images_train")], tokenizer, config(max_bad_share=0.9))))
    names = list(texts_by_key(shapes.url("images_train")))
    bad = spoil(shapes.url("images_train"), tmp_path / "bad", map(names.index, first.keys))
    batches = list(TrainLoader([str(tmp_path / "bad")], tokenizer, config(max_bad_share=0.9)))
    assert len(batches) == 12
    assert len(batches[0].keys) == 12
    assert not {key for batch in batches for key in batch.keys} & set(bad)


def test_a_bad_frame_does_not_make_the_order_depend_on_earlier_epochs(shapes, tokenizer, tmp_path):
    spoil(shapes.url("clips_train"), tmp_path / "bad", range(0, 40, 3), frame=1)
    settings = config(video_input=VideoInput(num_frames=1), max_bad_share=0.9)
    loader = TrainLoader([str(tmp_path / "bad")], tokenizer, settings)
    epochs = [list(loader) for _ in range(3)]
    assert 0 < len(loader.quarantine) <= 14
    fresh = list(TrainLoader([str(tmp_path / "bad")], tokenizer, settings).epoch(2))
    assert [batch.keys for batch in fresh] == [batch.keys for batch in epochs[2]]
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(fresh, epochs[2], strict=True))


def test_too_many_bad_samples_end_the_run(shapes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    spoil(shapes.url("images_train"), tmp_path / "bad", range(0, 50, 5))
    loader = TrainLoader([str(tmp_path / "bad")], tokenizer, config(max_bad_share=0.001))
    with pytest.raises(ValueError, match=r"unusable, more than max_bad_share=0.001; the last is images_train/"):
        [list(loader) for _ in range(4)]


def test_a_corpus_of_bad_samples_only_ends_the_run(shapes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    spoil(shapes.url("images_train"), tmp_path / "bad", range(150))
    with pytest.raises(ValueError, match=r"64 samples in a row are unusable, the last images_train/.*sharding.verify"):
        list(TrainLoader([str(tmp_path / "bad")], tokenizer, config(max_bad_share=0.9)))


def test_a_shard_deleted_during_the_run_is_an_error(shapes, tokenizer: Tokenizer) -> None:
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
