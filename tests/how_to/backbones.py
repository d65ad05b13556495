"""What the pages of both backbones are tried with: the user's folder, and its model in DeepSpeed's engine."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blocks import blocks
from object_stores import free_port
from places import ROOT

sys.path.append(str(ROOT / "tests/train"))

from small_engine import make, numbers, step

from model.config import ModelConfig
from preprocessing.text import Tokenizer
from runtime.ranks import Ranks
from train.checkpoints.writing import CheckpointWriter, TrainingState, load_checkpoint
from train.config.architecture import fresh_architecture
from train.config.settings import Settings, load_settings
from train.deepspeed.state import WEIGHT
from train.job.devices import device_for, start_processes
from train.job.stopping import StopRequest

FEW = ["max_steps=3", "batch_size={image: 8, video: 8}", "batch_size_test={image: 8, video: 8}", "k_test=4"]


@pytest.fixture(scope="module")
def one_process():
    """A group of one process, as a plain `python` launch has it."""
    with pytest.MonkeyPatch.context() as patch:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for key, value in {**alone, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(key, value)
        patch.setattr(StopRequest, "__enter__", lambda request: request)  # signals remain pytest's
        start_processes(device_for(Ranks()), 0.0)
        yield


def write_files(page: str, folder: Path) -> None:
    """Write the files that a page shows."""
    for name, content in blocks(page).items():
        (folder / name).write_text(content)


def overrides(shapes) -> list[str]:
    """The page's overrides, for the corpora of the tests, and those that make it short."""
    return [f"data_root={shapes.shards}", f"tokenizer={shapes.vocab}", *FEW]


def launch(entry: Callable[[Settings, Ranks], None], config: str, *settings: str) -> None:
    """`python launch/ENTRY.py CONFIG SETTINGS`, in this process."""
    entry(load_settings(config, settings), Ranks())


def page_model(shapes, *changes: str) -> ModelConfig:
    """The model of my_run.yaml in the working folder."""
    settings = load_settings("my_run.yaml", [*overrides(shapes), "image_res=32", *changes])
    return fresh_architecture(settings, Tokenizer.load(str(shapes.vocab)))


def check_engine(config: ModelConfig, own: str, mode: str, tokenizer: Tokenizer, folder: Path) -> None:
    """All parameters of the module `own` train, and a resumed run equals an uninterrupted one to the bit.

    mode: of ZeRO and the precision, such as "zero3 bf16".
    """
    zero, precision = mode.split()
    whole, guard = make(zero, precision, model=config)
    before = numbers(whole)
    for number in range(4):
        torch.manual_seed(number)
        if number == 2:
            path = CheckpointWriter(folder, whole, config, tokenizer, Ranks()).save(TrainingState(step=2), keep=1)
        step(whole, guard, number)
    trained = numbers(whole)
    weights = [(name, kind) for name, kind in before if name.startswith(own) and kind == WEIGHT]
    assert weights
    assert [key for key in weights if torch.equal(before[key], trained[key])] == []
    resumed, guard = make(zero, precision, model=config)
    load_checkpoint(path, resumed)
    for number in (2, 3):
        torch.manual_seed(number)
        step(resumed, guard, number)
    assert all(torch.equal(tensor, trained[key]) for key, tensor in numbers(resumed).items())
