"""Packing: what goes in comes out, byte-identical however it was built, and nothing is lost silently."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import pytest
import simplejpeg
import webdataset
from packed import contents, pack, write_photos

from sharding.shards.schema import read_corpus, read_index


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path, 200, (8, 8), (90, 70))


def test_offsets_and_checksums_are_those_of_the_tar(photos: Path, tmp_path: Path) -> None:
    corpus = pack(photos, tmp_path / "out", workers=3)
    pack(photos, tmp_path / "alone", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert len(corpus.shards) == 4
    assert corpus == read_corpus(str(tmp_path / "out"))
    seen = []
    for number, shard in enumerate(corpus.shards):
        data = (tmp_path / "out" / shard.name).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for row in read_index(corpus, number).to_pylist():
            jpeg = data[row["offsets"][0] : row["offsets"][0] + row["sizes"][0]]
            assert jpeg == members[row["key"] + ".jpg"]
            assert zlib.crc32(jpeg) == row["crc32s"][0]
            assert simplejpeg.decode_jpeg(jpeg).shape[:2] == (row["height"], row["width"])
            assert json.loads(members[row["key"] + ".json"])["captions"] == row["captions"]
            seen.append(row["source"])
    assert seen == [f"{number}.jpg" for number in range(200)]


def test_the_webdataset_library_reads_the_shards(photos: Path, tmp_path: Path, shapes) -> None:
    pack(photos, tmp_path / "out")
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["source"] for sample in samples] == [f"{number}.jpg" for number in range(200)]
    assert all(sample["jpg"].shape == (48, 62, 3) for sample in samples)
    clips = sorted(str(path) for path in Path(shapes.url("clips_train")).glob("*.tar"))
    clip = next(iter(webdataset.WebDataset(clips, shardshuffle=False)))
    frames = sorted(name for name in clip if name.endswith(".jpg"))
    assert frames == [f"{number:03d}.jpg" for number in range(8)]
    assert json.loads(clip["json"])["frame_times"] == [number / 4 for number in range(8)]


def test_rows_about_one_video_become_one_sample(shapes) -> None:
    corpus = read_corpus(shapes.url("qa_test"))
    assert sum(corpus.counts("questions")) == corpus.samples == 24
    row = read_index(corpus, 0).to_pylist()[0]
    assert row["questions"][0]["weights"] == [1.0]
    assert row["captions"] == []
    choice = read_index(read_corpus(shapes.url("mc_test")), 0).to_pylist()[0]["choices"][0]
    assert len(choice["options"]) == 5


def test_an_output_with_other_settings_or_other_files_is_refused(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    assert pack(photos, tmp_path / "out").samples == 200
    with pytest.raises(ValueError, match="built with another size"):
        pack(photos, tmp_path / "out", size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a corpus"):
        pack(photos, tmp_path / "mine")


def test_another_version_is_named(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    file = tmp_path / "out" / "corpus.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="shards of version 9, this program reads version 1"):
        read_corpus(str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="is not a packed corpus"):
        read_corpus(str(tmp_path / "nothing"))
