"""Packing: what goes in comes out, byte-identical however it was built, and nothing is lost silently."""

import io
import json
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import webdataset
from packed import contents, pack, write_photos
from PIL import Image
from places import ROOT

from sharding.build import build_corpus
from sharding.shards.schema import read_corpus, read_index


def photo(path: Path, seed: int, size: tuple[int, int] = (90, 70)) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=92)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path, 200, (8, 8), (90, 70))


def test_offsets_and_checksums_are_those_of_the_tar(photos: Path, tmp_path: Path) -> None:
    corpus = pack(photos, tmp_path / "out")
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


def test_any_number_of_workers_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "one", name="x", workers=1)
    pack(photos, tmp_path / "three", name="x", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_broken_files_are_counted_with_their_reasons_and_the_rest_is_packed(photos: Path, tmp_path: Path) -> None:
    (photos / "3.jpg").write_bytes((photos / "3.jpg").read_bytes()[:-300])
    (photos / "5.jpg").write_text("<html>404</html>")
    (photos / "7.jpg").unlink()
    (photos / "9.jpg").write_bytes(b"")
    corpus = pack(photos, tmp_path / "out")
    failures = {
        row["source"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    }
    assert corpus.samples == 196
    assert set(failures) == {"3.jpg", "5.jpg", "7.jpg", "9.jpg"}
    assert failures["7.jpg"] == "file not found"
    assert failures["9.jpg"] == "empty file"
    with pytest.raises(ValueError, match=r"4 of 200 media failed \(2.0%, at most 1.0% allowed\)"):
        pack(photos, tmp_path / "strict", max_failures=0.01)
    assert not (tmp_path / "strict" / "corpus.json").exists()


def test_rows_about_one_video_become_one_sample(shapes) -> None:
    corpus = read_corpus(shapes.url("qa_test"))
    assert sum(corpus.counts("questions")) == corpus.samples == 24
    row = read_index(corpus, 0).to_pylist()[0]
    assert row["questions"][0]["weights"] == [1.0]
    assert row["captions"] == []
    choice = read_index(read_corpus(shapes.url("mc_test")), 0).to_pylist()[0]["choices"][0]
    assert len(choice["options"]) == 5


def test_answers_are_merged_with_their_shares(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg", 0)
    answers = ["red", "blue", "red", "red"]
    record = {"question_id": 7, "image": "a.jpg", "question": "what color?", "answer": answers}
    (tmp_path / "qa.json").write_text(json.dumps([record, {"image": "a.jpg", "caption": "noise"}]))
    corpus = build_corpus([str(tmp_path / "qa.json")], str(tmp_path), "image", str(tmp_path / "out"), size=48)
    row = read_index(corpus, 0).to_pylist()[0]
    assert row["questions"][0]["answers"] == ["red", "blue"]
    assert row["questions"][0]["weights"] == [0.75, 0.25]
    assert row["captions"] == ["noise"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--annotations": "nowhere.json"}, "annotation file nowhere.json does not exist"),
        ({"--media-root": "nowhere"}, "media root nowhere does not exist"),
        ({"--size": "4"}, "--size must be at least 16"),
    ],
)
def test_wrong_input_gets_one_line(photos: Path, tmp_path: Path, change: dict[str, str], message: str) -> None:
    options = {"--annotations": str(photos.parent / "photos.json"), "--media-root": str(photos)}
    options |= {"--media-type": "image", "--output": str(tmp_path / "out"), **change}
    command = [sys.executable, "-m", "sharding.build", *(word for pair in options.items() for word in pair)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_output_with_other_settings_or_other_files_is_refused(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    assert pack(photos, tmp_path / "out").samples == 200
    with pytest.raises(ValueError, match="built with another size"):
        pack(photos, tmp_path / "out", size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a corpus"):
        pack(photos, tmp_path / "mine")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"image": "a.jpg"}, "must be a JSON list of records, but is an object with image"),
        ([{"caption": "x"}], 'record 1: no "image" or "video"; its columns are caption'),
        ([{"image": "a.jpg", "caption": 3}], '"caption" must be a text'),
        ([], "nothing to pack"),
        ([{"image": "a.jpg", "start": 5, "end": 2, "caption": "x"}], "must be seconds, start first"),
        ([{"image": "a.jpg", "start": "soon", "caption": "x"}], "must be seconds, start first"),
    ],
)
def test_annotations_that_are_none_name_the_record(tmp_path: Path, records, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        build_corpus([str(tmp_path / "a.json")], str(tmp_path), "image", str(tmp_path / "out"))


def test_another_version_is_named(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    file = tmp_path / "out" / "corpus.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="shards of version 9, this program reads version 1"):
        read_corpus(str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="is not a packed corpus"):
        read_corpus(str(tmp_path / "nothing"))
