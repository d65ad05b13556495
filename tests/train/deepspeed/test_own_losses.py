"""A loss with parameters of its own is trained, saved and resumed like the model, under every ZeRO stage."""

from dataclasses import replace

import pytest
import torch
from small_engine import SMALL, make, numbers, step
from torch import nn

from model.checkpoints.loading import load_weights
from model.losses import LOSSES, LossInputs
from preprocessing.text import SPECIAL, Tokenizer
from runtime.ranks import Ranks
from train.checkpoints.writing import CheckpointWriter, TrainingState, load_checkpoint

ZEROS = [
    pytest.param(zero, precision, marks=[] if precision == "bf16" and zero in ("zero0", "zero3") else pytest.mark.slow)
    for zero in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    for precision in ("bf16", "fp32")
]


@pytest.fixture(scope="module")
def config():
    """A model with a loss that is a module: its parameters are its own and those of a layer below it."""

    @LOSSES("width_of_text")
    class WidthOfText(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.head = nn.Linear(config.text_encoder.width, 1)

        def forward(self, inputs: LossInputs) -> torch.Tensor:
            wanted = inputs.attention_mask.sum(1, keepdim=True)
            return (self.head(inputs.text_states[:, 0]) * self.scale - wanted).square().mean()

    return replace(SMALL, losses={"width_of_text": 0.5})


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("zero", "precision"), ZEROS)
def test_a_loss_with_parameters_is_trained_saved_and_resumed(zero, precision, config, tmp_path, tokenizer_of_40):
    def save(engine, name):
        writer = CheckpointWriter(tmp_path / name, engine, config, tokenizer_of_40, Ranks())
        return writer.save(TrainingState(step=1), keep=9)

    def steps(engine, guard, *wanted):
        for number in wanted:
            torch.manual_seed(number)
            step(engine, guard, number)

    first, guard = make(zero, precision, config)
    beginning = save(first, "beginning")
    steps(first, guard, 1, 2)
    path = save(first, "trained")
    before, after = (load_weights(each).state for each in (beginning, path))
    own = {name for name in after if name.startswith("losses.width_of_text.")}
    assert {name.rpartition("width_of_text.")[2] for name in own} == {"scale", "head.weight", "head.bias"}
    assert not any(torch.equal(before[name], after[name]) for name in own)
    steps(first, guard, 3)
    second, guard = make(zero, precision, config)
    load_checkpoint(path, second)
    steps(second, guard, 3)
    one, other = numbers(first), numbers(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[each], other[each]) for each in one)


@pytest.fixture
def tokenizer_of_40(tmp_path):
    words = [*SPECIAL, *(f"w{number}" for number in range(40 - len(SPECIAL)))]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return Tokenizer.load(str(tmp_path / "vocab.txt"))
