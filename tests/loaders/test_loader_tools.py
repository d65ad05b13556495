"""The loader's commands: a vocabulary, a benchmark, a look at what the model will see."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from loaders import bench, preview, vocab
from loaders.bench import Figures, Setup, advice
from loaders.text import SPECIAL, Tokenizer

FIGURES = Figures(1000, 10.0, 100.0, 1.0, 0.4, 0.3, 0.2, 0.9, 0.0, 110.0, 0.9, 200.0, 0)
SETUP = Setup(threads=2, cores=2, backend="cpu", remote=False, stored_size=224, shown_size=224)


def test_a_vocabulary_is_learned_from_captions_and_questions(shapes, tmp_path, capsys) -> None:
    output = tmp_path / "new" / "vocab.txt"
    assert (
        vocab.main([shapes.url("images_train"), shapes.url("qa_train"), "--size", "400", "--output", str(output)]) == 0
    )
    words = output.read_text().splitlines()
    assert capsys.readouterr().out == f"{output}: {len(words)} entries\n"
    assert tuple(words[:5]) == SPECIAL
    assert len(set(words)) == len(words) <= 400
    ids, mask = Tokenizer.load(str(output)).encode(["a large red star"], 8)
    assert mask.sum() == 5
    assert not (ids == 1).any()


@pytest.mark.parametrize("name", ["images_train", "clips_train", "qa_train"])
def test_a_benchmark_says_how_fast_and_why(shapes, capsys, name: str) -> None:
    arguments = [shapes.url(name), "--seconds", "0.3", "--size", "32", "--threads", "1", "--batch-size", "16"]
    assert bench.main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] >= 16
    assert figures["samples_per_second"] > 0
    assert figures["backend"] == "cpu"
    assert not figures["remote"]
    assert bench.main(arguments) == 0
    text = capsys.readouterr().out
    assert "samples/s" in text
    assert "Decoding" in text


def test_a_slow_step_hides_the_loading(shapes, capsys) -> None:
    arguments = [shapes.url("images_train"), "--seconds", "2", "--size", "32", "--batch-size", "8", "--step-ms", "150"]
    assert bench.main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["replayed_per_second"] <= 8 / 0.15
    assert figures["samples_per_second"] <= 8 / 0.15
    assert 0 <= figures["wait_share"] < 0.9


def test_advice_names_the_guilty_stage() -> None:
    assert "all 2 cores" in advice(FIGURES, SETUP)[0]
    assert "raise threads" in advice(FIGURES, replace(SETUP, cores=8))[0]
    assert "packed with --size 256" in advice(FIGURES, replace(SETUP, stored_size=480))[1]
    slow = replace(FIGURES, decode_wait_share=0.8)
    assert advice(slow, SETUP) == [
        "Decoding waits for reading 80% of the time: use a faster disk. "
        "With the bytes at hand it would reach 110 samples/s."
    ]
    assert advice(replace(FIGURES, wait_share=0.01), SETUP) == [
        "Loading holds nothing up: the steps get 50% of what batches kept in memory would give."
    ]
    assert "local disk" in advice(slow, replace(SETUP, remote=True))[0]


def test_a_preview_shows_a_batch(shapes, tmp_path, capsys) -> None:
    arguments = ["--tokenizer", str(shapes.vocab), "--count", "6", "--columns", "3", "--size", "64", "--frames", "2"]
    output = tmp_path / "sheet.png"
    assert preview.main([shapes.url("clips_train"), *arguments, "--output", str(output)]) == 0
    with Image.open(output) as sheet:
        assert sheet.width == 3 * (2 * 64 + 8) + 8
        assert len(sheet.convert("RGB").getcolors(10**6)) > 50
    assert "6 samples" in capsys.readouterr().out


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
