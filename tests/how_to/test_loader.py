"""docs/how-to/loader.md, word for word: the loader in a loop, in Lightning and in Hugging Face's Trainer."""

import ast
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from blocks import blocks
from needs import leave_out
from places import ROOT

from loaders import TrainLoader

# Each trains 2 steps, then goes on to 5 from the checkpoint; an epoch has 4.
ONE_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
LIGHTNING = """
import lightning
from with_lightning import Module
class Noting(Module):
    def training_step(self, batch, number):
        seen.append(batch.keys)
        return super().training_step(batch, number)
for steps, checkpoint in ((2, None), (5, "part.ckpt")):
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Noting(), ckpt_path=checkpoint)
    trainer.save_checkpoint("part.ckpt")
"""
TRANSFORMERS = """
from transformers import TrainingArguments
from with_transformers import Model, OwnTrainer, Position
class Noting(OwnTrainer):
    def compute_loss(self, model, inputs, **others):
        seen.append(inputs["batch"].keys)
        return super().compute_loss(model, inputs, **others)
for steps in (2, 5):
    arguments = TrainingArguments("out", max_steps=steps, save_steps=steps, ignore_data_skip=True, report_to="none")
    trainer = Noting(Model(3 * 64 * 64, 1), arguments, callbacks=[Position()])
    trainer.train(resume_from_checkpoint=steps == 5)
"""


@pytest.fixture
def folder(tmp_path: Path, shapes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: the files of the page, beside what `make demo` makes."""
    for name, content in blocks("loader").items():
        (tmp_path / name).write_text(content)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/shards").symlink_to(shapes.shards)
    (tmp_path / "demo/vocab.txt").symlink_to(shapes.vocab)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_loop_of_your_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    names = runpy.run_path("plain.py")
    state = torch.load("state.pt")
    assert state["loader"] == {"epoch": 2, "step": 0}
    assert names["batch"].frames.shape == (32, 1, 64, 64, 3)
    with names["make_loader"](1, 2) as loader:
        assert isinstance(loader, TrainLoader)
        assert len(loader) == len(list(loader)) == 4
        loader.set_epoch(1)  # it is there already
        next(iter(loader))
        loader.set_epoch(1)
        assert loader.state_dict() == {"epoch": 1, "step": 1}
        loader.set_epoch(0)
        assert loader.state_dict() == {"epoch": 0, "step": 0}


@pytest.mark.parametrize(
    ("package", "example"), [("lightning", LIGHTNING), ("accelerate", TRANSFORMERS)], ids=["lightning", "transformers"]
)
def test_trainers_of_others_go_on_within_an_epoch(folder: Path, package: str, example: str) -> None:
    if find_spec(package) is None:
        leave_out(f"{package} not installed: `pip install {package}`, or `make install`")
    result = subprocess.run(
        [sys.executable, "-c", f"seen = []{example}print(seen)"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **ONE_CPU},
    )  # fmt: skip
    if "operator torchvision::nms does not exist" in result.stderr:
        leave_out("torchvision is not of the same build as PyTorch, so neither trainer can be imported")
    assert result.returncode == 0, result.stderr
    with runpy.run_path("own_data.py")["make_loader"]() as loader:
        whole = [batch.keys for batch in [*loader, next(iter(loader))]]
    assert ast.literal_eval(result.stdout.splitlines()[-1]) == whole
