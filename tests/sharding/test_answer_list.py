"""The list of answers that question answering ranks, from packed questions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.answers import main
from sharding.build import build_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    Image.fromarray(np.full((48, 64, 3), 9, np.uint8)).save(tmp_path / "a.jpg")
    given = ["red", "blue", "red", ["red", "dark red", "red"], "two", "blue"]
    records = [{"image": "a.jpg", "question": "what?", "answer": answer} for answer in given]
    (tmp_path / "qa.json").write_text(json.dumps([*records, {"image": "a.jpg", "caption": "x"}]))
    build_corpus([str(tmp_path / "qa.json")], str(tmp_path), "image", str(tmp_path / "out"), size=48, workers=1)
    return str(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["red", "blue", "dark red", "two"]),
        (["--size", "3"], ["red", "blue", "dark red"]),
        (["--least", "2"], ["red", "blue"]),
    ],
)
def test_answers_come_most_frequent_first(corpus: str, tmp_path: Path, flags: list[str], expected: list[str]) -> None:
    target = tmp_path / "lists" / "answers.json"
    assert main([corpus, "--output", str(target), *flags]) == 0
    assert json.loads(target.read_text()) == expected
    assert [path.name for path in target.parent.iterdir()] == ["answers.json"]


def test_missing_answers_and_corpora_are_reported_in_one_line(corpus: str, tmp_path: Path, capsys) -> None:
    assert main([corpus, "--output", str(tmp_path / "a.json"), "--least", "9"]) == 2
    assert "no answer of 9 questions or more" in capsys.readouterr().err
    assert main(["nowhere", "--output", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "a.json").exists()
