"""Frozen parameters (`freeze`): saved, resumed and exported like all others, under every ZeRO stage."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_engine import SMALL, make, numbers, step
from small_run import PRECISIONS

from loaders.batch import Batch
from model.checkpoints.loading import load_weights
from model.config import TemporalConfig
from model.export import main as export
from model.freezing import names_below
from model.singularity import Singularity
from preprocessing.text import SPECIAL, Tokenizer
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.checkpoints.best import best_version
from train.checkpoints.shards import set_weights
from train.checkpoints.writing import CheckpointWriter, TrainingState, load_checkpoint
from train.config.settings import RunConfig
from train.step import Stepper

QUICK = ("zero0", "zero1", "zero3")
ZEROS = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero2_offload", "zero3_offload")))
ENCODER = ("vision_encoder",)
FREEZES = {
    "encoder": ENCODER,
    "single": ("temp", "text_encoder.layer.0.attention.self.query.bias", "vision_proj.weight"),
    "all of a group": (),  # that without weight decay
}


@pytest.fixture
def tokenizer(tmp_path):
    words = [*SPECIAL, *(f"w{number}" for number in range(40 - len(SPECIAL)))]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return Tokenizer.load(str(tmp_path / "vocab.txt"))


def save(engine, folder: Path, tokenizer, number=1) -> Path:
    return CheckpointWriter(folder, engine, SMALL, tokenizer, Ranks()).save(TrainingState(step=number), keep=9)


def save_best(engine, folder: Path, tokenizer) -> Path:
    CheckpointWriter(folder, engine, SMALL, tokenizer, Ranks()).save_best(TrainingState(step=1), "val")
    return best_version(folder, 1)


def whole(path: Path) -> dict[str, torch.Tensor]:
    return load_weights(path).state


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps(engine, guard, numbers_):
    for number in numbers_:
        torch.manual_seed(number)
        step(engine, guard, number)


def frozen_names(what: str, state) -> tuple[str, ...]:
    if what != "all of a group":
        return FREEZES[what]
    return tuple(name for name, tensor in state.items() if tensor.ndim == 1 or name.endswith(".bias"))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        pytest.param(zero, precision, marks=[] if zero in QUICK and precision == "bf16" else pytest.mark.slow)
        for zero in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
        for precision in PRECISIONS
    ],
)
def test_a_run_with_a_frozen_part_saves_resumes_and_exports_all_of_it(zero, precision, tmp_path, tokenizer):
    engine, _ = make(zero, "fp32")
    beginning = whole(save(engine, tmp_path / "beginning", tokenizer))
    for what in FREEZES:
        names = frozen_names(what, beginning)
        frozen = names_below(beginning.keys(), names, "freeze")
        first, guard = make(zero, precision, freeze=names)
        guard.loss_scale.load({"cur_scale": 64.0})
        steps(first, guard, (1, 2))
        path = save(first, tmp_path / what, tokenizer, 2)
        state = whole(path)
        assert state.keys() == beginning.keys()
        unchanged = {name for name in beginning if torch.equal(state[name], beginning[name])}
        assert frozen <= unchanged  # to the bit, also where they are computed with in bf16
        assert len(unchanged - frozen) < len(beginning.keys() - frozen) / 4
        assert equal(whole(save_best(first, tmp_path / what, tokenizer)), state)
        assert export([str(path), str(tmp_path / f"{what}.pth")]) == 0
        assert equal(whole(tmp_path / f"{what}.pth"), state)

        steps(first, guard, (3, 4))
        second, guard = make(zero, precision, freeze=names)
        steps(second, guard, (7,))  # elsewhere
        for parameter in second.module.parameters():
            if hasattr(parameter, "exact_fragment"):
                parameter.exact_fragment.zero_()
        load_checkpoint(path, second)
        steps(second, guard, (3, 4))
        assert equal(numbers(first), numbers(second)), what
        assert equal(whole(save(second, tmp_path / f"{what} again", tokenizer, 4)), whole(save(first, path, tokenizer)))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("zero", ZEROS)
def test_a_run_resumes_with_another_part_frozen(zero, tmp_path, tokenizer):
    free, guard = make(zero, "bf16")
    steps(free, guard, (1, 2))
    from_free = save(free, tmp_path / "free", tokenizer, 2)
    frozen, guard = make(zero, "bf16", freeze=ENCODER)
    load_checkpoint(from_free, frozen)
    steps(frozen, guard, (3,))
    from_frozen = save(frozen, tmp_path / "frozen", tokenizer, 3)
    before, after = whole(from_free), whole(from_frozen)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert names_below(before.keys(), ENCODER, "freeze") <= same
    assert len(same) < len(before) / 2
    free, guard = make(zero, "bf16")
    load_checkpoint(from_frozen, free)
    loaded = numbers(free)
    assert equal(whole(save(free, tmp_path / "again", tokenizer, 3)), after)
    assert all(
        not tensor.any() for (name, kind), tensor in loaded.items() if name.startswith(ENCODER) and kind != "weight"
    )
    steps(free, guard, (4,))
    assert not equal(whole(save(free, tmp_path / "trained", tokenizer, 4)), after)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("zero", ZEROS)
def test_the_best_weights_are_set_with_the_frozen_ones(zero, tmp_path, tokenizer):
    engine, _ = make(zero, "bf16", freeze=ENCODER)
    wanted = {name: tensor + 1 for name, tensor in whole(save_best(engine, tmp_path, tokenizer)).items()}
    set_weights(engine, wanted)
    assert equal(whole(save(engine, tmp_path / "set", tokenizer)), wanted)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("zero", ["zero1"])
def test_a_persistent_buffer_is_saved_and_comes_back(zero, tmp_path, tokenizer):
    engine, _ = make(zero, "fp32")
    engine.module.register_buffer("seen", torch.arange(3.0))
    path = save(engine, tmp_path, tokenizer)
    engine.module.seen.zero_()
    load_checkpoint(path, engine)
    assert engine.module.seen.tolist() == [0, 1, 2]


def test_a_model_that_is_all_frozen_is_refused():
    parts = sorted({name.split(".")[0] for name, _ in Singularity(SMALL).named_parameters()})
    with pytest.raises(UserError, match="every parameter of the model is frozen: leave some of them out of freeze"):
        make("zero1", "fp32", freeze=parts)


@pytest.mark.usefixtures("one_process")
def test_a_batch_that_trains_nothing_is_reported():
    temporal = replace(SMALL, num_frames=2, temporal_vision_encoder=TemporalConfig(enable=True, num_layers=1))
    names = [name for name, _ in Singularity(temporal, pad_id=0, cls_id=2, mask_id=4).named_parameters()]
    engine, guard = make("zero1", "fp32", temporal, freeze=[name for name in names if "temporal" not in name])
    ids = torch.randint(5, 40, (4, 8))
    frames = torch.zeros(4, 1, 32, 32, 3, dtype=torch.uint8)
    images = Batch("image", 0, 0, frames, ids, torch.ones_like(ids), torch.arange(4), ("a", "b", "c", "d"))
    stepper = Stepper(engine, [], engine.module, None, guard, torch.device("cpu"), RunConfig(precision="fp32"), 0)
    with pytest.raises(UserError, match="all parameters that a batch of images uses are frozen: leave some"):
        stepper._backward(images)
