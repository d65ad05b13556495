"""Reading frames: the packed bytes from any storage, or a reason."""

import shutil
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from loaders.samples import whole_sample
from loaders.shards import CorpusReader


@pytest.fixture
def in_memory(shapes):
    """A packed corpus of clips behind an fsspec URL that is not a local path."""
    memory = fsspec.filesystem("memory")
    memory.put(shapes.url("clips_train"), "/clips", recursive=True)
    yield "memory://clips"
    memory.rm("/clips", recursive=True)


def everything(reader: CorpusReader) -> dict[str, list[bytes]]:
    found = {}
    for shard in range(len(reader.corpus.shards)):
        index = reader.index(shard)
        records = [index.record(row) for row in range(len(index))]
        samples = reader.read([whole_sample(record, np.arange(len(record.sizes))) for record in records])
        found |= {sample.spec.record.key: sample.jpegs for sample in samples}
    return found


def test_frames_are_those_that_webdataset_reads(shapes) -> None:
    reader = CorpusReader(shapes.url("clips_train"))
    ours = everything(reader)
    tars = sorted(str(path) for path in Path(shapes.url("clips_train")).glob("*.tar"))
    theirs = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        names = sorted(name for name in sample if name.endswith("jpg"))
        theirs[sample["__key__"]] = [sample[name] for name in names]
    assert ours == theirs
    assert len(ours) == 40


def test_any_storage_gives_the_same_bytes(shapes, in_memory: str) -> None:
    assert everything(CorpusReader(in_memory)) == everything(CorpusReader(shapes.url("clips_train")))


def test_frames_come_in_the_requested_order_and_are_read_once(shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CorpusReader(shapes.url("clips_train"))
    record = reader.index(0).record(2)
    asked = []
    ranges = reader.read_ranges
    monkeypatch.setattr(reader, "read_ranges", lambda wanted: asked.extend(wanted) or ranges(wanted))
    (sample,) = reader.read([whole_sample(record, np.array([3, 1, 1, 3]))])
    assert [zlib.crc32(data) for data in sample.jpegs] == record.crc32s[[3, 1, 1, 3]].tolist()
    assert len(asked) == 2


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_an_impossible_index_entry_is_a_bad_sample(shapes, in_memory: str, where: str) -> None:
    reader = CorpusReader(in_memory if where == "memory" else shapes.url("clips_train"))
    good = reader.index(0).record(0)
    wrong = {
        "CRC-32": good._replace(crc32s=good.crc32s + np.uint32(1)),
        "has 0 bytes": good._replace(sizes=good.sizes * 0),
        "has -5 bytes": good._replace(sizes=good.sizes * 0 - 5),
        "of a tar of": good._replace(offsets=good.offsets + 10**12),
        "does not match the index": good._replace(offsets=good.offsets + 100),
    }
    *bad, sound = reader.read([whole_sample(record, np.array([0])) for record in [*wrong.values(), good]])
    assert sound.jpegs
    assert not sound.reason
    for message, sample in zip(wrong, bad, strict=True):
        assert not sample.jpegs
        assert message in sample.reason


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_missing_tar_is_an_error(shapes, tmp_path: Path, where: str) -> None:
    shutil.copytree(shapes.url("clips_train"), tmp_path / "clips")
    for tar in (tmp_path / "clips").glob("*.tar"):
        tar.unlink()
    url = str(tmp_path / "clips")
    if where == "memory":
        fsspec.filesystem("memory").put(url, "/without", recursive=True)
        url = "memory://without"
    reader = CorpusReader(url)
    with pytest.raises(FileNotFoundError, match=r"\.tar is missing, though .*corpus\.json lists it"):
        reader.read([whole_sample(reader.index(0).record(0), np.array([0]))])


def test_few_files_stay_open(shapes) -> None:
    reader = CorpusReader(shapes.url("images_train"), open_shards=1)
    expected = everything(CorpusReader(shapes.url("images_train")))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert everything(reader) == expected
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
