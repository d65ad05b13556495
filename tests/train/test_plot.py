"""`python -m train.plot` draws what runs have logged."""

import json

import pytest
from PIL import Image, ImageColor

from runtime.charts import COLORS
from train.plot import main, read_run, title


@pytest.fixture
def runs(tmp_path):
    for name, factor in (("first", 1.0), ("second", 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {"step": step, "epoch": 0, "media_type": "video", "loss": factor * 5 / step, "lr": 1e-4, "mfu": None}
            for step in range(1, 101)
        ]
        lines.insert(50, {"step": 50, "epoch": 1, "val/r_mean": 40 * factor, "val/txt_r1": 20.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
    return [str(tmp_path / name) for name in ("first", "second")]


def test_images_and_clips_have_a_curve_each_and_losses_their_weight(tmp_path):
    lines = [
        {"step": step, "media_type": medium, "loss": loss, "loss_itc": loss / 2, "lr": 1e-4}
        for step in range(1, 9)
        for medium, loss in [("image", 1.0) if step % 2 else ("video", 4.0)]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("loss_weight: {itc: 2.0, itm: 1.0, mlm: 0.0}\n")
    run = read_run(tmp_path)
    assert run.curves_of("loss") == {"images": ([1, 3, 5, 7], [1.0] * 4), "clips": ([2, 4, 6, 8], [4.0] * 4)}
    assert list(run.curves_of("lr")) == [""]
    assert run.last("loss") == "1 images, 4 clips"
    titles = [title(name, [run]) for name in ("loss", "loss_itc", "lr")]
    assert titles == ["loss (weighted sum)", "loss_itc (x 2)", "lr"]


def test_a_picture_and_a_page(runs, tmp_path, capsys):
    run = read_run(tmp_path / "second")
    assert (run.steps, run.curves_of("loss")[""][1][9]) == (100, 0.25)
    assert run.curves_of("val/r_mean") == {"": ([50], [20.0])}
    assert "mfu" not in run.metrics
    assert main([*runs, "--output", str(tmp_path / "out/curves.png")]) == 0
    assert capsys.readouterr().out.strip().endswith("curves.png: loss, lr, val/r_mean")
    with Image.open(tmp_path / "out/curves.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
        assert {ImageColor.getrgb(colour) for colour in COLORS[:2]} <= colours  # a line of each run
        assert picture.width > 1000
    words = ["--output", str(tmp_path / "page.html"), "--figures", "loss", "val/r_mean", "val/txt_r1"]
    assert main([runs[0], *words]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "<td>40" in page
    assert "<th>val/txt_r1" in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["nowhere"], "has no metrics.jsonl"),
        (["--figures", "los"], "no run has logged 'los': there are loss, lr"),
        (["--output", "x.pdf"], "ends in .png"),
    ],
)
def test_mistakes_are_reported(runs, capsys, words, reported):
    assert main([runs[0], *words]) == 2
    assert reported in capsys.readouterr().err
