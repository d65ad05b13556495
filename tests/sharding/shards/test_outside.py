"""Commands that write pages, pictures and weights refuse to write into packed corpora."""

import pytest

from eval.report.__main__ import main as report
from eval.search.__main__ import main as search
from loaders import preview
from model import export
from runtime.errors import UserError
from sharding.shards.outside import check_outside_corpora
from train import plot


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (report, ["none", "--output", "FILE.html"]),
        (search, ["none", "none", "a star", "--output", "FILE.jpg"]),
        (search, ["none", "none", "a star", "--cache", "FILE"]),
        (preview.main, ["none", "--tokenizer", "none", "--output", "FILE.png"]),
        (plot.main, ["none", "--output", "FILE.png"]),
        (export.main, ["none", "FILE"]),
    ],
)
def test_each_command_refuses_in_one_line(shapes, capsys, main, arguments):
    corpus = shapes.shards / "images_test"
    before = sorted(corpus.iterdir())
    assert main([word.replace("FILE", str(corpus / "file")) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert f"lies in the packed corpus {corpus}: choose a folder outside of it" in error
    assert error.count("\n") == 1
    assert sorted(corpus.iterdir()) == before


def test_other_outputs_are_accepted(shapes, tmp_path, monkeypatch):
    check_outside_corpora(shapes.shards / "page.html", "--output")  # beside corpora
    (tmp_path / "corpus.json").write_text('{"text": "of somebody else"}')
    check_outside_corpora(tmp_path / "page.html", "--output")
    check_outside_corpora("s3://bucket/photos", "output_dir")
    monkeypatch.chdir(shapes.shards / "images_test")
    with pytest.raises(UserError, match=r"--output report\.html lies in the packed corpus"):
        check_outside_corpora("report.html", "--output")
