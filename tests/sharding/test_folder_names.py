"""Folders with special characters of patterns, shells and URLs in their names."""

import json
import shutil
from pathlib import Path

import pytest
from object_stores import Store
from PIL import Image

from loaders.bench import main as bench
from sharding.answers import main as answers
from sharding.build import main as build
from sharding.inspect import main as inspect
from sharding.shards.indexing import index_shards
from sharding.shards.verification import verify_corpus
from sharding.verify import main as verify

NAMES = ["a[b] 100%20#é", "[0-9]*?", "it's {a,b}", "a{0..2}.tars"]


def annotated(folder: Path) -> Path:
    """Eight photos, some with a question, and their annotations in two files."""
    (folder / "media").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (48, 32), (30 * number, 80, 80)).save(folder / "media" / f"{number}.jpg")
    photos = [{"image": f"{number}.jpg", "question": "what?", "answer": ["red", "blue"]} for number in range(8)]
    (folder / "1.json").write_text(json.dumps(photos[:4]))
    (folder / "2.json").write_text(json.dumps(photos[4:]))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = annotated(tmp_path / name / "drawn")
    packed, tars = tmp_path / name / "packed", tmp_path / name / "tars"
    how = ["--media-root", str(folder / "media"), "--media-type", "image", "--size", "32", "--workers", "1"]
    assert build(["--annotations", str(folder / "*.json"), *how, "--name", "x", "--output", str(packed)]) == 0
    tars.mkdir()
    for tar in packed.glob("*.tar"):
        shutil.copy(tar, tars)
    assert index_shards(str(tars)).samples == 8
    assert index_shards(str(tars / "x-{000000..000000}.tar"), output=str(tmp_path / name / "indices")).samples == 8
    (packed / "x-000000.parquet").unlink()
    assert verify([str(packed), "--repair", "--workers", "1"]) == 0
    assert inspect([str(packed), "--stats", "--html", str(tmp_path / name / "page.html")]) == 0
    assert answers([str(packed), "--output", str(tmp_path / name / "answers.json")]) == 0
    assert bench([str(packed), "--batch", "2", "--size", "32", "--decode", "cpu", "--seconds", "0.2"]) == 0


def test_patterns_match_below_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sharding.annotations.reading import expanded

    folder = annotated(tmp_path / "a[b]" / "drawn")
    (folder / "[1].json").write_text("[]")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "3.json").write_text("[]")

    def names(*parts: str) -> list[str]:
        return [path.rsplit("/", 1)[-1] for path in expanded([str(Path(tmp_path, *parts))])]

    assert names("a[b]", "drawn", "[12].json") == ["1.json", "2.json"]
    assert names("a[b]", "drawn", "[1].json") == ["[1].json"]
    assert names("a[b]", "d*", "?.json") == ["1.json", "2.json"]
    assert names("a*", "drawn", "*.json") == ["1.json", "2.json", "[1].json"]
    assert names("a[b]", "drawn", "**", "3.json") == ["3.json"]
    with pytest.raises(FileNotFoundError, match="no annotation file matches"):
        names("a[b]", "drawn", "[89].json")


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_stores_accept_folders_of_any_name(store: Store, tmp_path: Path) -> None:
    folder = annotated(tmp_path / "drawn")
    how = ["--media-root", str(folder / "media"), "--media-type", "image", "--size", "32", "--workers", "1"]
    assert build(["--annotations", str(folder / "*.json"), *how, "--output", str(tmp_path / "packed")]) == 0
    for name in ("packed-000000.parquet", "corpus.json", "build.json", "failures.parquet"):
        (tmp_path / "packed" / name).unlink()
    url = store.fill(tmp_path / "packed", "a[b]")
    assert index_shards(url).samples == 8
    assert not verify_corpus(url)
