"""`python -m model.export`: what it writes, where, and its errors."""

import os
import subprocess
import sys

import pytest
import torch
from small_models import small_config, small_model

from model.building import build_model
from model.checkpoints.loading import load_weights, save_model
from model.config import AnswerDecoderConfig, LossWeights
from model.export import main as export
from preprocessing.text import SPECIAL

WORDS = [*SPECIAL, *(f"word{i}" for i in range(small_config().text_encoder.vocab_size - len(SPECIAL)))]


def write_vocabulary(folder, words=WORDS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))


@pytest.fixture
def weights(tmp_path, model):
    write_vocabulary(tmp_path / "weights")
    save_model(model, model.config, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("source", ["weights", "run"])
def test_a_folder_gets_the_vocabulary_of_its_source(tmp_path, weights, source, capsys):
    (tmp_path / "run" / "checkpoints" / "best").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best" / "weights").symlink_to(weights)
    assert export([str(tmp_path / source), str(tmp_path / "new" / "copy")]) == 0
    assert sorted(os.listdir(tmp_path / "new" / "copy")) == ["model.json", "model.safetensors", "vocab.txt"]
    assert (tmp_path / "new" / "copy" / "vocab.txt").read_bytes() == (weights / "vocab.txt").read_bytes()
    assert (tmp_path / "new" / "copy" / "model.json").read_bytes() == (weights / "model.json").read_bytes()
    assert capsys.readouterr().out.count("\n") == 1
    assert os.listdir(tmp_path / "new") == ["copy"]


def test_an_export_without_a_vocabulary_prints_a_hint(tmp_path, weights, capsys):
    pth, folder = tmp_path / "x.pth", tmp_path / "copy"
    assert export([str(weights), str(pth)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        f"{pth} has no vocabulary; where it is used name the one that it was trained with ({weights}/vocab.txt): "
        "tokenizer=FILE for training and evaluation, --tokenizer FILE for eval.search"
    )
    assert export([str(pth), str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        f"{folder} has no vocabulary; where it is used copy it to {folder}/vocab.txt, or name the one that it was "
        "trained with: tokenizer=FILE for training and evaluation, --tokenizer FILE for eval.search"
    )
    assert sorted(os.listdir(folder)) == ["model.json", "model.safetensors"]


def test_a_vocabulary_beside_an_official_file_is_used_if_its_size_matches(tmp_path, weights):
    assert export([str(weights), str(tmp_path / "x.pth")]) == 0
    write_vocabulary(tmp_path)
    assert export([str(tmp_path / "x.pth"), str(tmp_path / "with")]) == 0
    assert (tmp_path / "with" / "vocab.txt").is_file()
    assert load_weights(tmp_path / "x.pth").special_ids
    write_vocabulary(tmp_path, [*WORDS, "another"])
    assert export([str(tmp_path / "x.pth"), str(tmp_path / "without")]) == 0
    assert not (tmp_path / "without" / "vocab.txt").exists()
    assert not load_weights(tmp_path / "x.pth").special_ids


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x.safetensors", ".safetensors is not a format, give NAME.pth for an official checkpoint or a folder such"),
        ("X.CKPT", ".CKPT is not a format"),
        ("x.pth/", "is a folder with the suffix of a file"),
        ("folder.pth", "is a folder with the suffix of a file"),
        ("file", "exists already and is not an export: remove it, or choose another name"),
        ("full", "exists already"),
        ("weights", "is the model to be exported: choose another name"),
        ("run/weights", "would be taken for a checkpoint of the run"),
        ("run/checkpoints/step_00000100", "would be taken for a checkpoint of the run"),
        ("file/x.pth", "is a file, choose another path"),
    ],
)
def test_an_unusable_output_is_a_one_line_error(tmp_path, weights, output, message, capsys):
    for folder in ("folder.pth", "full", "run/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("file", "old.pth", "full/notes"):
        (tmp_path / file).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert export([str(weights), f"{tmp_path}/{output}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert message in line
    assert line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("output", ["X.PTH", "x.Pt", "empty", "v1.2", "run/first.pth"])
def test_a_free_output_or_an_earlier_export_is_written(tmp_path, weights, output, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = tmp_path / output
    for _ in range(2):
        assert export([str(weights), str(path)]) == 0
        assert load_weights(path).config == model.config
        (path if path.is_file() else path / "model.safetensors").write_bytes(b"of an earlier model")
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_exported_files_follow_the_umask(tmp_path, weights, umask):
    before = os.umask(umask)
    try:
        assert export([str(weights), str(tmp_path / "copy")]) == 0
        assert export([str(weights), str(tmp_path / "x.pth")]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "x.pth", *(tmp_path / "copy").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o777 & ~umask


FULL_DISK = """
import resource, sys
from model.export import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(sum(main([sys.argv[1], output]) == 2 for output in sys.argv[2:]))
"""


def test_a_full_disk_is_a_one_line_error_and_leaves_no_file(tmp_path, weights):
    outputs = [str(tmp_path / "new" / name) for name in ("copy", "x.pth")]
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(weights), *outputs], capture_output=True, text=True, timeout=300
    )
    lines = result.stderr.splitlines()
    assert result.returncode == len(lines) == 2, result.stderr
    assert lines == [f"error: File too large: {output!r}" for output in outputs]
    assert not os.listdir(tmp_path / "new")


def test_qa_and_bfloat16_models_survive_the_export(tmp_path):
    asking = small_config(answer_decoder=AnswerDecoderConfig(True, 2), loss_weight=LossWeights(mlm=0.0))
    half = {name: tensor.bfloat16() for name, tensor in small_model().state_dict().items()}
    for name, state, config in (("qa", build_model(asking).state_dict(), asking), ("bf16", half, small_config())):
        save_model(state, config, tmp_path / name)
        source = tmp_path / name
        for output in (f"{name}.pth", f"{name}.again"):
            assert export([str(source), str(tmp_path / output)]) == 0
            back, source = load_weights(tmp_path / output), tmp_path / output
            assert back.config == config
            assert all(torch.equal(back.state[key], tensor) for key, tensor in state.items())


def test_a_timm_backbone_has_no_official_format(tmp_path, capsys):
    config = small_config()
    config.vision_encoder.type, config.vision_encoder.patch_size = "vit_tiny_patch16_224", 16
    save_model({}, config, tmp_path / "named")
    assert export([str(tmp_path / "named"), str(tmp_path / "x.pth")]) == 2
    message = "vision_encoder.type=vit_tiny_patch16_224 has no official format, give a folder to write to"
    assert capsys.readouterr().err == f"error: {tmp_path}/x.pth: {message}\n"


def test_a_mean_of_the_text_states_has_no_official_format(tmp_path, capsys):
    config = small_config()
    config.text_encoder.pooling = "mean"
    save_model({}, config, tmp_path / "mean")
    assert export([str(tmp_path / "mean"), str(tmp_path / "x.pth")]) == 2
    message = "text_encoder.pooling=mean has no official format, give a folder to write to"
    assert capsys.readouterr().err == f"error: {tmp_path}/x.pth: {message}\n"


def test_pixels_that_the_official_code_would_normalise_otherwise_have_no_official_format(tmp_path, capsys):
    config = small_config()
    config.vision_encoder.mean = [0.1, 0.2, 0.3]
    save_model({}, config, tmp_path / "own")
    assert export([str(tmp_path / "own"), str(tmp_path / "x.pth")]) == 2
    assert "vision_encoder.mean is [0.1, 0.2, 0.3], the official code has [0.5, 0.5, 0.5]" in capsys.readouterr().err
