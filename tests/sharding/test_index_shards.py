"""Indexing shards that other tools wrote, or ours without their indices: in place, and nothing else is touched."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from sharding.index import index_shards, main
from sharding.schema import read_corpus, read_index
from sharding.verify import verify_corpus


@pytest.fixture
def corpus(shapes, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes.url("clips_train"), tmp_path / "clips"))


def test_a_lost_index_is_made_again(corpus: Path) -> None:
    before = [read_index(read_corpus(str(corpus)), 0).to_pylist()]
    for file in [*corpus.glob("*.parquet"), corpus / "corpus.json"]:
        file.unlink()
    again = index_shards(str(corpus))
    assert again.media_type == "video"
    assert [read_index(again, 0).to_pylist()] == before
    assert not verify_corpus(str(corpus), decode=True)


def test_shards_of_other_tools_are_indexed_in_place(shapes, tmp_path: Path) -> None:
    pictures = sorted((shapes.folder / "media" / "images").rglob("*.jpg"))[:30]
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=12, verbose=0) as sink:
        for number, path in enumerate(pictures):
            texts = (
                {"txt": f"caption {number}"} if number % 2 else {"json": json.dumps({"caption": f"caption {number}"})}
            )
            sink.write({"__key__": f"{number:09d}", "jpg": path.read_bytes(), **texts})
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert main([str(tmp_path)]) == 0
    corpus = read_corpus(str(tmp_path))
    rows = [row for shard in range(len(corpus.shards)) for row in read_index(corpus, shard).to_pylist()]
    assert [row["captions"] for row in rows] == [[f"caption {number}"] for number in range(30)]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert not verify_corpus(str(tmp_path), decode=True)


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


def test_indexing_our_own_corpus_again_changes_nothing_a_reader_sees(corpus: Path) -> None:
    before = read_corpus(str(corpus))
    (corpus / before.shards[0].index_name).unlink()
    after = index_shards(str(corpus))
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


def test_what_cannot_be_indexed_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \.tar files"):
        index_shards(str(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    with pytest.raises(ValueError, match="holds no pictures"):
        index_shards(str(tmp_path))
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(ValueError, match="no plain tar"):
        index_shards(str(tmp_path))
