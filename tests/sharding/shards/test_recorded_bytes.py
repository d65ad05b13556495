"""Shards have the same bytes as in version 0.1.0. Bytes of corpora depend on the versions in constraints.txt."""

import hashlib
from pathlib import Path

import pytest

from sharding.shards.writing import ShardWriter

# SHA-256 of corpus.json, which holds those of every tar, every index, build.json and failures.parquet.
RECORDED = {
    "images_train": "6b857a61b158a422d4979135b01a1a7144167fc1f27a3b9ad7492df11f705bf0",
    "clips_train": "349e4fffdc59852cc753e694fc57ef3d964ddf7e277cf9d74f8a2a20459085c5",
    "qa_train": "173d48aa5463b60de5598d3913240f3a249d7b3afa8f1dd2e0db5d1c61d6b5da",
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RECORDED)
def test_a_corpus_of_shapes_has_the_recorded_bytes(shapes, name: str) -> None:
    assert digest(Path(shapes.url(name)) / "corpus.json") == RECORDED[name]


def test_a_tar_of_given_frames_has_the_recorded_bytes(tmp_path: Path) -> None:
    row = {"width": 4, "height": 3, "fps": None, "duration": None, "frame_times": [], "source": "a/ä.jpg"}
    row |= {"captions": ["é"], "questions": [], "choices": []}
    clip = {**row, "fps": 2.0, "duration": 1.5, "frame_times": [0.0, 0.5, 1.0]}
    with ShardWriter(str(tmp_path), "fixed-000000.tar", tmp_path) as writer:
        writer.add("000000000000", [b"\xff\xd8first\xff\xd9"], row)
        writer.add("000000000001", [b"x" * 512, b"", b"y" * 1025], clip)
        writer.add("k" * 90, [b"z" * 700], row)
        writer.close(3, [])
    recorded = "7ccc9b7089ffeaed3ec701e11b094c14e25a985c486c8d3bef52408690480077"
    assert digest(tmp_path / "fixed-000000.tar") == recorded
