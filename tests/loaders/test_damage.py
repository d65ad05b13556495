"""One sample in a hundred damaged in every way there is: each is written down with its reason, all others arrive."""

import json
import shutil
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_train_loader import texts_by_key

from loaders.config import LoaderConfig, PerMedia
from loaders.text import Tokenizer
from loaders.train import TrainLoader
from sharding.build import build_corpus
from sharding.shapes import write_shapes
from sharding.shards.schema import INDEX_SCHEMA, read_corpus

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

    def write(data: bytes, agree: bool) -> None:
        """Other bytes in place; the index agrees with them where only a decoder is to find out."""
        data = data.ljust(size, b"\0")[:size]
        tar[offset : offset + size] = data
        row["crc32s"] = [zlib.crc32(data)] if agree else row["crc32s"]

    good = bytes(tar[offset : offset + size])
    match way:
        case "flipped bytes":
            write(good[:-40] + bytes(byte ^ 255 for byte in good[-40:]), agree=False)
        case "cut short":
            row["sizes"] = [size // 2]
        case "zeros":
            write(b"", agree=True)
        case "not a JPEG":
            write(b"\x89PNG\r\n\x1a\n broken", agree=True)
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
            write(b"<html>403 Forbidden</html>", agree=True)
        case "a lost end":
            write(good[:120], agree=True)


@pytest.fixture
def damaged(large: Path, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A corpus of which every hundredth sample is spoiled, and how each of those is."""
    folder = tmp_path / "packed"
    shutil.copytree(large, folder)
    corpus, spoiled, number = read_corpus(str(folder)), {}, 0
    for info in corpus.shards:
        rows = pq.read_table(folder / info.index_name).to_pylist()
        tar = bytearray((folder / info.name).read_bytes())
        for row in rows:
            if number % 100 == 50:
                way = WAYS[number // 100]
                damage(row, tar, way)
                spoiled[f"{corpus.name}/{row['key']}"] = way
            number += 1
        (folder / info.name).write_bytes(tar)
        pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), folder / info.index_name)
    return str(folder), spoiled


@pytest.mark.parametrize("decode", ["cpu", "dali"])
def test_all_bad_samples_are_written_down_and_all_others_arrive(
    large: Path, damaged, tokenizer: Tokenizer, tmp_path: Path, decode: str
) -> None:
    url, spoiled = damaged
    own = texts_by_key(url)
    assert set(spoiled.values()) == set(WAYS)
    notes = tmp_path / "run" / "quarantine-{rank}.jsonl"
    settings = {"batch_size": PerMedia(48), "image_res": 32, "decode": decode, "threads": 2, "max_bad_share": 0.02}
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
    for batch, expected in zip(batches, sound, strict=True):
        for row, key in enumerate(expected.keys):
            if key in spoiled:
                assert batch.keys[row] not in spoiled
                assert tokenizer.decode(batch.input_ids[row].tolist()) in own[batch.keys[row]]
            else:
                assert batch.keys[row] == key
                assert torch.equal(batch.frames[row], expected.frames[row])
                assert torch.equal(batch.input_ids[row], expected.input_ids[row])
    sound.close()


def test_a_replacement_comes_from_the_same_stripe(damaged, tokenizer: Tokenizer) -> None:
    """So that a rank that owns a stripe reads no other rank's shards."""
    url, spoiled = damaged
    config = LoaderConfig(batch_size=PerMedia(48), image_res=32, decode="cpu", threads=1, max_bad_share=0.02, stripes=8)
    loader = TrainLoader([url], tokenizer, config)
    mixture = loader.mixtures["image"]
    plan = mixture.plan(0)
    names = [spec.name for spec in mixture.specs(plan, torch.arange(plan.units).numpy())]
    checked = 0
    for batch in loader:
        for row, key in enumerate(batch.keys):
            position = batch.step * 48 + row
            if names[position] != key:
                assert names[position] in spoiled
                assert names.index(key) % 8 == position % 8
                checked += 1
    loader.close()
    assert checked == len(spoiled)


def test_a_few_bad_samples_early_on_end_no_run(damaged, tokenizer: Tokenizer) -> None:
    """One in a hundred is what max_bad_share permits; that chance put some more of them first is no reason to stop."""
    url, spoiled = damaged
    for seed in range(3):
        config = LoaderConfig(batch_size=PerMedia(100), image_res=32, decode="cpu", threads=1, seed=seed)
        loader = TrainLoader([url], tokenizer, config)
        assert len(list(loader)) == 12
        assert len(loader.quarantine) == len(spoiled)
        loader.close()
