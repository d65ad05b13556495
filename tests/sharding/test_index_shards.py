"""Indexing shards of other tools, and of ours without their indices, in place; other files are not changed."""

import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import webdataset
from object_stores import Store
from packed import contents, failures_of, rows_of
from places import ROOT

from loaders.samples import whole_sample
from loaders.shards import CorpusReader
from sharding.build import build_corpus
from sharding.index import main
from sharding.media.video import pack_video
from sharding.shards.indexing import index_shards
from sharding.shards.schema import read_corpus, read_index
from sharding.shards.verification import verify_corpus


def test_a_lost_index_is_rebuilt(clips: Path) -> None:
    before = [read_index(read_corpus(str(clips)), 0).to_pylist()]
    for file in [*clips.glob("*.parquet"), clips / "corpus.json"]:
        file.unlink()
    again = index_shards(str(clips))
    assert again.media_type == "video"
    assert [read_index(again, 0).to_pylist()] == before
    assert not verify_corpus(str(clips), decode=True)


def img2dataset(folder: Path, pictures: list[Path], each: int = 12) -> None:
    """Tars as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json; a table and figures of its own beside each."""
    folder.mkdir()
    for shard in range(-(-len(pictures) // each)):
        name = f"{shard:05d}"
        rows = []
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as sink:
            for place, path in enumerate(pictures[shard * each : shard * each + each]):
                key = f"{shard:05d}{place:04d}"
                row = {"caption": f"caption {key}", "url": f"http://x/{path.name}", "key": key, "status": "success"}
                row |= {"error_message": None, "width": 48, "height": 48, "exif": "{}", "sha256": "0" * 64}
                sink.write({"__key__": key, "jpg": path.read_bytes(), "txt": row["caption"], "json": row})
                rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        (folder / f"{name}_stats.json").write_text(json.dumps({"count": len(rows), "successes": len(rows)}))


def video2dataset(folder: Path, clips: list[Path], frames: bool) -> None:
    """Tars as video2dataset writes them: KEY.mp4, KEY.txt, KEY.json; or KEY.000.jpg ... where it took frames."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "00000.tar")) as sink:
        for number, path in enumerate(clips):
            meta = {"videoID": number, "url": f"http://x/{path.name}", "caption": f"clip {number}", "status": "success"}
            media = {"mp4": path.read_bytes()}
            if frames:
                jpegs = pack_video(path.read_bytes(), 48, 90, 4).jpegs
                media = {f"{place:03d}.jpg": jpeg for place, jpeg in enumerate(jpegs)}
            sink.write({"__key__": f"{number:08d}", **media, "txt": meta["caption"], "json": meta})
    pq.write_table(pa.table({"videoID": range(len(clips))}), folder / "00000.parquet")


@pytest.fixture
def pictures(shapes) -> list[Path]:
    return sorted((shapes.folder / "media" / "images").rglob("*.jpg"))[:30]


@pytest.fixture
def media(shapes) -> list[Path]:
    return sorted((shapes.folder / "media" / "clips").rglob("*.mp4"))[:5]


@pytest.mark.parametrize("where", ["local", "s3", "gcs"])
@pytest.mark.parametrize("layout", ["img2dataset", "video2dataset"])
def test_shards_of_other_tools_are_indexed_in_place(
    pictures, media, tmp_path: Path, where: str, layout: str, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / layout
    img2dataset(folder, pictures) if layout == "img2dataset" else video2dataset(folder, media, frames=True)
    before = contents(folder)
    url = str(folder) if where == "local" else request.getfixturevalue(where).fill(folder, "foreign")
    words = [sys.executable, "-m", "sharding.index", url, "--workers", "2", "--fps", "4"]
    subprocess.run(words, cwd=ROOT, check=True)
    rows = rows_of(url)
    if layout == "img2dataset":
        assert [row["captions"] for row in rows] == [[f"caption {n // 12:05d}{n % 12:04d}"] for n in range(30)]
        assert [row["source"] for row in rows] == [f"http://x/{path.name}" for path in pictures]
        assert {row["fps"] for row in rows} == {None}
    else:
        assert [row["captions"] for row in rows] == [[f"clip {n}"] for n in range(5)]
        assert {len(row["offsets"]) for row in rows} == {8}
        assert {(row["fps"], row["duration"], row["frame_times"][-1]) for row in rows} == {(4.0, 2.0, 1.75)}
    assert not verify_corpus(url, decode=True)
    filesystem, root = fsspec.url_to_fs(url)
    assert {name: filesystem.cat_file(f"{root}/{name}") for name in before} == before
    with CorpusReading(url) as reader:
        for record in reader.records():
            (sample,) = reader.read([whole_sample(record, np.arange(len(record.offsets)))])
            assert not sample.reason
            assert all(simplejpeg.decode_jpeg(frame).shape == (48, 48, 3) for frame in sample.jpegs)


class CorpusReading(CorpusReader):
    """The loaders' reader, over all of a corpus."""

    def records(self):
        for shard, info in enumerate(self.corpus.shards):
            index = self.index(shard)
            yield from (index.record(row) for row in range(info.samples))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def test_whole_videos_are_refused_with_a_remedy_that_works(media, tmp_path: Path, capsys) -> None:
    video2dataset(tmp_path / "v", media, frames=False)
    before = contents(tmp_path / "v")
    assert main([str(tmp_path / "v")]) == 2
    error = capsys.readouterr().err
    assert "contains whole videos (00000000.mp4)" in error
    assert '"00000.tar/00000000.mp4"' in error
    assert contents(tmp_path / "v") == before
    records = [{"video": f"00000.tar/{number:08d}.mp4", "caption": f"clip {number}"} for number in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    corpus = build_corpus([str(tmp_path / "a.json")], str(tmp_path / "v"), "video", str(tmp_path / "out"), size=48)
    assert (corpus.samples, sum(corpus.counts("frames"))) == (5, 20)


def test_existing_indices_are_kept(pictures, tmp_path: Path) -> None:
    img2dataset(tmp_path / "i", pictures, each=5)
    first = index_shards(str(tmp_path / "i"))
    (tmp_path / "i" / "corpus.json").unlink()
    (tmp_path / "i" / "00002.index.parquet").unlink()
    damaged = tmp_path / "i" / "00004.index.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 5] ^= 1  # in a page, which has a checksum
    damaged.write_bytes(data)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "i").glob("*.index.parquet")}
    assert index_shards(str(tmp_path / "i")) == first
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "i").glob("*.index.parquet")}
    again = {name for name in after if before.get(name) != after[name]}
    assert again == {"00002.index.parquet", "00004.index.parquet"}
    assert not verify_corpus(str(tmp_path / "i"))


def test_an_index_made_by_other_rules_is_rebuilt(pictures, tmp_path: Path) -> None:
    img2dataset(tmp_path / "i", pictures[:5])
    first = index_shards(str(tmp_path / "i"))
    index = tmp_path / "i" / "00000.index.parquet"
    table = pq.read_table(index)
    note = json.loads(table.schema.metadata[b"indexed"])
    del note["rules"]
    note["facts"] |= {"samples": 4, "frames": 4, "captions": 4}
    pq.write_table(table[:4].replace_schema_metadata({b"indexed": json.dumps(note)}), index)
    assert index_shards(str(tmp_path / "i")) == first
    assert read_index(first, 0).num_rows == 5


def test_tars_in_a_read_only_store_are_indexed_elsewhere(shapes, http: Store, tmp_path: Path, capsys) -> None:
    url = http.fill(shapes.url("clips_train"), "clips")
    assert main([url]) == 2
    assert "--output" in capsys.readouterr().err
    assert main([url, "--output", str(tmp_path / "index"), "--workers", "1"]) == 0
    assert not list((tmp_path / "index").glob("*.tar"))
    assert read_corpus(str(tmp_path / "index")).tars == url
    same = read_corpus(shapes.url("clips_train"))
    assert rows_of(str(tmp_path / "index")) == rows_of(same.url)
    assert not verify_corpus(str(tmp_path / "index"), decode=True)
    with CorpusReading(str(tmp_path / "index")) as reader:
        assert sum(1 for record in reader.records() if reader.read([whole_sample(record, np.arange(8))])[0].jpegs) == 40


def test_a_local_output_finds_the_tars_from_any_folder(shapes, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(shapes.url("clips_train"), tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    index_shards("clips", output="index")
    monkeypatch.chdir(tmp_path.parent)
    assert not verify_corpus(str(tmp_path / "index"))


def test_damage_is_reported_and_intact_samples_are_indexed(pictures, tmp_path: Path, capsys) -> None:
    img2dataset(tmp_path / "i", pictures, each=5)
    folder = tmp_path / "i"
    tar = folder / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])  # as a killed download leaves it
    (folder / "00003.tar").write_text("<html>403</html>")
    with webdataset.TarWriter(str(folder / "00009.tar")) as sink:
        sink.write({"__key__": "good", "jpg": pictures[0].read_bytes(), "txt": "fine"})
        sink.write({"__key__": "empty", "jpg": b"", "txt": "x"})
        sink.write({"__key__": "html", "jpg": b"<html>", "txt": "x"})
        sink.write({"__key__": "json", "jpg": pictures[0].read_bytes(), "json": b"{broken"})
        sink.write({"__key__": "questions", "jpg": pictures[0].read_bytes(), "json": b'{"questions": ["why?"]}'})
        sink.write({"__key__": "number", "jpg": pictures[0].read_bytes(), "json": b'{"caption": 7}'})
        sink.write({"__key__": "textonly", "txt": "no picture"})
    assert main([str(folder), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert "2 of 7 tars" in error
    rows = rows_of(str(folder))
    assert {row["key"] for row in rows if not row["key"].isdecimal()} == {"good"}
    assert 20 < len(rows) < 26
    failures = failures_of(folder)
    assert set(failures) == {"empty", "html", "json", "questions", "number", "textonly"}
    assert failures["textonly"] == "no picture among its files (txt)"
    assert failures["html"].startswith("unreadable picture")
    assert {(fault.file, fault.reason) for fault in verify_corpus(str(folder), decode=True)} == {
        ("00003.tar", "is not in corpus.json"),
        ("00001.tar", "the tar ends without an end mark: it was cut off"),
    }
    (folder / "00001.tar").unlink()
    (folder / "00003.tar").unlink()
    assert main([str(folder), "--workers", "1"]) == 1  # 6 of 27 samples
    assert "6 of 27 samples cannot be indexed" in capsys.readouterr().err
    assert main([str(folder), "--workers", "1", "--max-failures", "0.5"]) == 0


def test_pictures_and_clips_in_one_folder_are_refused(pictures, media, tmp_path: Path) -> None:
    img2dataset(tmp_path / "i", pictures[:5])
    video2dataset(tmp_path / "v", media, frames=True)
    shutil.copy(tmp_path / "v" / "00000.tar", tmp_path / "i" / "clips.tar")
    with pytest.raises(ValueError, match=r"holds pictures \(00000.tar\) and clips \(clips.tar\)"):
        index_shards(str(tmp_path / "i"))


def test_long_names_and_folders_in_a_tar(pictures, tmp_path: Path) -> None:
    for name, form in (("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT)):
        folder = tmp_path / name
        folder.mkdir()
        long = "a" * 60 + "/" + "b" * 90
        with tarfile.open(folder / "x.tar", "w", format=form) as tar:
            for key in (long, "deep/er/c", "./d"):
                for ending, data in (("jpg", pictures[0].read_bytes()), ("txt", key.encode())):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size, info.mtime = len(data), 1.5
                    tar.addfile(info, io.BytesIO(data))
        index_shards(str(folder))
        assert [(row["key"], row["captions"]) for row in rows_of(str(folder))] == [
            (long, [long]), ("deep/er/c", ["deep/er/c"]), ("d", ["./d"]),
        ]  # fmt: skip
        assert not verify_corpus(str(folder), decode=True)


def test_masks_beside_pictures_are_not_frames(pictures, tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as sink:
        data = pictures[0].read_bytes()
        sink.write({"__key__": "a", "jpg": data, "mask.png": b"not looked at", "cls": b"3", "txt": "x"})
    corpus = index_shards(str(tmp_path))
    assert (corpus.media_type, sum(corpus.counts("frames"))) == ("image", 1)


def test_files_of_other_tools_beside_the_shards_are_left_alone(shapes, tmp_path: Path) -> None:
    picture = next((shapes.folder / "media" / "images").rglob("*.jpg")).read_bytes()
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as sink:
        sink.write({"__key__": "000000000", "jpg": picture, "txt": "a caption"})
    pq.write_table(
        pa.table({"url": ["http://x"], "caption": ["a caption"], "status": ["success"]}), tmp_path / "00000.parquet"
    )
    before = (tmp_path / "00000.parquet").read_bytes()
    for _ in range(2):
        corpus = index_shards(str(tmp_path))
        assert corpus == read_corpus(str(tmp_path))
        assert corpus.shards[0].index_name == "00000.index.parquet"
        assert read_index(corpus, 0).num_rows == 1
        assert not verify_corpus(str(tmp_path))
    assert (tmp_path / "00000.parquet").read_bytes() == before


def test_reindexing_a_packed_corpus_keeps_its_description(clips: Path) -> None:
    before = read_corpus(str(clips))
    (clips / before.shards[0].index_name).unlink()
    after = index_shards(str(clips))
    assert (after.name, after.settings, after.samples) == (before.name, before.settings, before.samples)
    assert [shard.sha256 for shard in after.shards] == [shard.sha256 for shard in before.shards]


def test_long_clips_keep_the_order_of_their_frames(shapes, tmp_path: Path) -> None:
    picture = next((shapes.folder / "media" / "images").rglob("*.jpg")).read_bytes()
    frames = {f"{number:03d}.jpg": picture for number in range(1005)}
    with webdataset.TarWriter(str(tmp_path / "long.tar")) as sink:
        sink.write({"__key__": "clip", **frames, "json": json.dumps({"caption": "x"})})
    offsets = read_index(index_shards(str(tmp_path), fps=2), 0).to_pylist()[0]["offsets"]
    with tarfile.open(tmp_path / "long.tar") as tar:
        assert offsets == [tar.getmember(f"clip.{name}").offset_data for name in frames]


def test_folders_without_usable_tars_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no \.tar files"):
        index_shards(str(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    with pytest.raises(ValueError, match="has no pictures"):
        index_shards(str(tmp_path))
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(ValueError, match="no plain tar"):
        index_shards(str(tmp_path))


def test_a_killed_index_run_resumes_and_leaves_no_temporary_files(pictures, tmp_path: Path) -> None:
    img2dataset(tmp_path / "i", pictures * 20, each=10)
    shutil.copytree(tmp_path / "i", tmp_path / "whole")
    words = [sys.executable, "-m", "sharding.index", "--workers", "2"]
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([*words, str(tmp_path / "i")], cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(0.8 + 1.5 * rng.random())
        process.kill()
        process.wait()
    for name in ("i", "whole"):
        subprocess.run([*words, str(tmp_path / name)], cwd=ROOT, check=True)
    files = [contents(tmp_path / name) for name in ("i", "whole")]
    for found in files:
        del found["corpus.json"]  # its name is the folder's
    assert files[0] == files[1]
    assert read_corpus(str(tmp_path / "i")).shards == read_corpus(str(tmp_path / "whole")).shards
