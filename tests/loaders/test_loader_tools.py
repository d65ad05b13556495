"""The loader's commands: a vocabulary, a benchmark, a look at what the model will see."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from loaders import bench, preview, vocab
from loaders.bench import Results, advice
from sharding.build import build_corpus

RESULTS = Results(1000, 10.0, 100.0, 1.0, 0.4, 0.3, 0.2, 0.9, 0.0, 110.0, 0.9, 200.0, 0, 2, 2, "cpu", False, 224, 224)


@pytest.mark.parametrize(
    ("name", "with_texts"),
    [
        ("images_train", False),
        ("images_train", True),
        ("clips_train", False),
        ("qa_train", True),
        ("clips_test_motion", False),
    ],
)
def test_a_benchmark_says_how_fast_and_why(shapes, capsys, name: str, with_texts: bool) -> None:
    texts = ["--tokenizer", str(shapes.vocab)] if with_texts else []
    arguments = [shapes.url(name), *texts, "--seconds", "0.3", "--size", "32", "--threads", "1", "--batch-size", "16"]
    assert bench.main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] >= 16
    assert figures["samples_per_second"] > 0
    assert figures["backend"] == "cpu"
    assert not figures["remote"]
    assert bench.main(arguments) == 0
    text = capsys.readouterr().out
    assert "samples/s" in text
    assert "bottleneck" in text


def test_a_slow_step_hides_the_loading(shapes, capsys) -> None:
    arguments = [shapes.url("images_train"), "--seconds", "2", "--size", "32", "--batch-size", "8", "--step-ms", "150"]
    assert bench.main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["replayed_per_second"] <= 8 / 0.15
    assert figures["samples_per_second"] <= 8 / 0.15
    assert 0 <= figures["wait_share"] < 0.9


def test_advice_names_the_bottleneck() -> None:
    assert "all 2 cores" in advice(RESULTS)[0]
    assert "raise threads" in advice(replace(RESULTS, cores=8))[0]
    assert "pack them with --size 256" in advice(replace(RESULTS, stored_size=480))[1]
    slow = replace(RESULTS, decode_wait_share=0.8)
    assert advice(slow) == [
        "Reading is the bottleneck: decoding waits for it 80% of the time: use a faster disk. "
        "Decoding alone reaches 110 samples/s."
    ]
    assert advice(replace(RESULTS, wait_share=0.01)) == [
        "The loader is not a bottleneck: the loop has 50% of its speed with batches in memory."
    ]
    assert "local disk" in advice(replace(slow, remote=True))[0]


@pytest.mark.parametrize(
    ("name", "count", "shown"), [("clips_train", 6, 6), ("images_test", 500, 24), ("qa_test", 500, 24)]
)
def test_a_preview_shows_a_batch(shapes, tmp_path, capsys, name: str, count: int, shown: int) -> None:
    output = tmp_path / "sheet.png"
    arguments = ["--tokenizer", str(shapes.vocab), "--output", str(output), "--count", str(count), "--columns", "3"]
    assert preview.main([shapes.url(name), *arguments, "--size", "64", "--frames", "2"]) == 0
    with Image.open(output) as sheet:
        frames = 1 if name == "images_test" else 2
        assert sheet.width == 3 * (frames * 64 + (frames - 1) * 2 + 8) + 8
        assert len(sheet.convert("RGB").getcolors(10**6)) > 50
    assert capsys.readouterr().out == f"{output}: {shown} samples\n"


@pytest.fixture
def one_picture(tmp_path):
    (tmp_path / "media").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "media" / "a.jpg")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.jpg", "caption": "red"}]))
    build_corpus([str(tmp_path / "a.json")], str(tmp_path / "media"), "image", str(tmp_path / "one"), workers=1)
    return str(tmp_path / "one")


def test_the_tools_take_a_corpus_of_one_picture(one_picture, tmp_path, capsys) -> None:
    output = tmp_path / "new" / "vocab.txt"
    assert vocab.main([one_picture, "--size", "400", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: {len(output.read_text().splitlines())} entries\n"
    arguments = ["--tokenizer", str(output), "--output", str(tmp_path / "sheet.png")]
    assert preview.main([one_picture, *arguments]) == 0
    assert "sheet.png: 1 samples" in capsys.readouterr().out
    assert bench.main([one_picture, "--seconds", "0.2", "--size", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] >= 1


@pytest.mark.parametrize(
    "command",
    [
        lambda: bench.main(["/nowhere"]),
        lambda: bench.main(["/nowhere", "--storage", "anon"]),
        lambda: preview.main(["/nowhere", "--tokenizer", "/no/vocab.txt", "--output", "x.png"]),
        lambda: vocab.main(["/nowhere", "--output", "/tmp/vocab.txt"]),
    ],
)
def test_wrong_input_is_one_line(command, capsys) -> None:
    assert command() == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
