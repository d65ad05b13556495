"""DeepSpeed's faults that compat.py works around are still there, and training learns the same under every stage.

A test of the first part that fails names a workaround to remove.
"""

import subprocess
import sys
from dataclasses import replace

import deepspeed
import pytest
import torch
from places import ROOT
from small_engine import SMALL, make, numbers, step
from small_run import environment

from model.config import TemporalConfig
from train.deepspeed import compat, engine
from train.deepspeed.compat import LossScale, gathered_weights
from train.deepspeed.state import optimizer_step

pytestmark = pytest.mark.usefixtures("one_process")

TEMPORAL = replace(
    SMALL, num_frames=2, add_temporal_embed=True, temporal_vision_encoder=TemporalConfig(enable=True, num_layers=1)
)


def after_steps(zero):
    """Weights and moments after clips and images in turn; the images leave the temporal encoder out."""
    started, guard = make(zero, "fp32", TEMPORAL)
    for number, num_frames in enumerate((2, 1, 2, 1), 1):
        torch.manual_seed(number)
        step(started, guard, number, num_frames=num_frames)
    return numbers(started)


@pytest.fixture(scope="module")
def plain(one_process):
    """What is learned under ZeRO 0."""
    return after_steps("zero0")


def differing(found, plain):
    """The parameters whose first moment differs: weights would show no scale."""
    moments = {name: (tensor, found[name, kind]) for (name, kind), tensor in plain.items() if kind == "exp_avg"}
    return [
        name
        for name, (wanted, other) in moments.items()
        if (other.flatten() - wanted.flatten()).norm() > 0.02 * wanted.norm() + 1e-6
    ]


@pytest.mark.parametrize("zero", ["zero3", "zero2_offload", "zero3_offload"])
def test_deepspeed_still_updates_unused_parameters_with_the_gradients_of_the_step_before(zero, plain, monkeypatch):
    monkeypatch.setattr(compat, "_zero_gradients", lambda optimizer: None)
    assert any("temporal" in name for name in differing(after_steps(zero), plain))


def test_deepspeed_still_leaves_persistent_parameters_partitioned(monkeypatch):
    monkeypatch.setattr(compat, "_gather_persistent", lambda engine: None)
    started, guard = make("zero3", "bf16")
    step(started, guard, 1)
    assert started.module.temp.numel() == 1
    step(started, guard, 2, poisoned=True)
    assert started.module.temp.numel() == 0
    step(started, guard, 3)
    with gathered_weights(started):
        assert started.module.temp.numel() == 1
    assert started.module.temp.numel() == 0


@pytest.mark.parametrize(("lines", "compiler"), [("", True), ("compat.import_muon()", False)])
def test_deepspeed_still_imports_the_compiler_to_compare_optimisers(lines, compiler):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import deepspeed
from train.deepspeed import compat
{lines}
import deepspeed.runtime.zero.muon.muon_optimizer
print("torch._inductor.compile_fx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(compiler)


def test_deepspeed_still_cannot_broadcast_parameters_without_dimensions():
    module = torch.nn.Linear(2, 2)
    module.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"self\.dim\(\) cannot be 0 to view"):
        deepspeed.initialize(model=module, config={"train_batch_size": 1})


def test_deepspeed_still_leaves_the_loss_unscaled_in_fp16_without_zero(monkeypatch):
    norms = []
    for _ in range(2):
        started, guard = make("zero0", "fp16")
        guard.loss_scale.load({"cur_scale": 64.0})
        torch.manual_seed(1)
        step(started, guard, 1)
        norms.append(float(guard.norm))
        monkeypatch.setattr(LossScale, "apply", lambda self, loss: loss)
    assert norms[1] == pytest.approx(norms[0] / 64, rel=0.1)


def test_deepspeed_still_raises_at_the_smallest_loss_scale():
    started, guard = make("zero1", "fp16")
    started.optimizer.loss_scaler.raise_error_at_min_scale = True
    guard.loss_scale.load({"cur_scale": 1.0, "cur_hysteresis": 1})
    with pytest.raises(Exception, match="Current loss scale already at minimum"):
        step(started, guard, 1, factor=1e30)


def test_deepspeed_still_begins_with_an_empty_step_in_bf16_without_zero(monkeypatch):
    monkeypatch.setattr(engine, "set_optimizer_step", lambda engine, step: None)
    assert optimizer_step(make("zero0", "bf16")[0]) == 1


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_what_a_step_does_not_use_learns_nothing_from_the_step_before(zero, plain):
    assert not differing(after_steps(zero), plain)


def test_training_continues_after_an_evaluation_under_zero_3_as_without_one():
    ids, learned = torch.ones(2, 8, dtype=torch.long), []
    for evaluates in (False, True):
        started, guard = make("zero3", "bf16")
        for number in range(1, 6):
            torch.manual_seed(number)
            step(started, guard, number)
            if evaluates:
                with gathered_weights(started), torch.inference_mode():
                    started.module.encode_text(ids, ids)
        learned.append(numbers(started))
    assert all(torch.equal(tensor, learned[1][key]) for key, tensor in learned[0].items())
