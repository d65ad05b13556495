"""A step without a finite gradient changes nothing, is logged with its samples, and too many in a row end the run."""

import pytest
import torch
from small_engine import SMALL, make, numbers, step
from small_run import PRECISIONS

from model.singularity import Singularity
from train.config.settings import OptimizerConfig
from train.deepspeed.state import fragments
from train.groups import parameter_groups

pytestmark = pytest.mark.usefixtures("one_process")


EVERY = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
IN_FP16 = EVERY if "fp16" in PRECISIONS else ["zero1", "zero2"]  # emulated, so fewer of them
CASES = [(zero, precision) for zero in EVERY for precision in ("fp32", "bf16")] + [(zero, "fp16") for zero in IN_FP16]


@pytest.mark.parametrize(("zero", "precision"), CASES)
def test_a_poisoned_step_changes_nothing_and_is_reported(zero, precision, caplog):
    engine, guard = make(zero, precision)
    guard.loss_scale.load({"cur_scale": 64.0})  # where fp16 has one: it fits, so no step is lost looking for it
    step(engine, guard, 1)
    before = numbers(engine)
    step(engine, guard, 2, poisoned=True)
    after = numbers(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    kept = getattr(engine.optimizer, "persistent_parameters", [])  # by every rank, under ZeRO 3
    assert all(parameter.shape == parameter.ds_shape for parameter in kept)
    step(engine, guard, 3)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in numbers(engine).items())
    steps = {float(state["step"]) for state in engine.basic_optimizer.state.values()}
    assert steps == {2.0}
    with caplog.at_level("WARNING", "train"):
        guard.inspect()
    assert guard.skipped == 1
    assert [message for message in caplog.messages if message.startswith("Skipped ")] == [
        "Skipped step 2, its gradient is not finite; samples of rank 0, loss nan: "
        "corpus/2_0, corpus/2_1, corpus/2_2, corpus/2_3"
    ]


@pytest.mark.parametrize("zero", IN_FP16)
def test_an_overflow_of_fp16_lowers_the_loss_scale_and_is_no_fault_of_the_samples(zero, caplog):
    engine, guard = make(zero, "fp16")
    guard.loss_scale.load({"cur_scale": 2.0**20, "cur_hysteresis": 1})
    before = numbers(engine)
    step(engine, guard, 1)
    assert guard.loss_scale.value == 2.0**19
    assert guard.norm is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in numbers(engine).items())
    for number in range(2, 14):
        step(engine, guard, number)
    assert 1 < guard.loss_scale.value < 2.0**17
    assert any(not torch.equal(tensor, before[name]) for name, tensor in numbers(engine).items())
    with caplog.at_level("WARNING", "train"):
        guard.inspect()
    assert guard.skipped == 0
    assert not [message for message in caplog.messages if message.startswith("Step ")]


@pytest.mark.parametrize("zero", IN_FP16)
def test_overflows_that_no_loss_scale_helps_end_the_run(zero):
    engine, guard = make(zero, "fp16")
    guard.loss_scale.load({"cur_scale": 2.0, "cur_hysteresis": 1})
    for number in range(1, 5):  # the first one lowers the scale to 1
        step(engine, guard, number, factor=1e30)
    assert guard.loss_scale.value == 1
    with pytest.raises(ValueError, match=r"3 steps in a row, the last one 4, .*use precision=bf16"):
        guard.inspect()


def test_too_many_in_a_row_end_the_run():
    engine, guard = make("zero1", "bf16")
    for number, poisoned in enumerate([True, True, False, True, True], 1):
        step(engine, guard, number, poisoned)
    guard.inspect()
    assert guard.skipped == 4
    step(engine, guard, 6, poisoned=True)
    with pytest.raises(ValueError, match=r"3 steps in a row, the last one 6, .*max_bad_steps=3.*lower optimizer\.lr"):
        guard.inspect()


@pytest.mark.parametrize(("zero", "precision"), CASES)
def test_gradients_are_clipped_as_pytorch_does(zero, precision):
    engine, guard = make(zero, precision)
    guard.loss_scale.load({"cur_scale": 64.0})
    near = 1e-4 if precision == "fp32" else 0.1
    torch.manual_seed(0)
    alone = Singularity(SMALL, pad_id=0, cls_id=2, mask_id=4)
    groups = parameter_groups({name: p.ndim for name, p in alone.named_parameters()}, OptimizerConfig(lr=1e-2))
    named = dict(alone.named_parameters())
    plain = torch.optim.AdamW(
        [{"params": [named[name] for name in g.names], "weight_decay": g.weight_decay} for g in groups], lr=1e-2
    )
    for number in (1, 2, 3):
        torch.manual_seed(number)
        step(engine, guard, number)
        torch.manual_seed(number)
        frames, ids = torch.randn(4, 1, 3, 32, 32), torch.randint(5, 40, (4, 8))
        plain.zero_grad()
        torch.stack(list(alone(frames, ids, torch.ones_like(ids), torch.arange(4)).values())).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        plain.step()
        assert float(guard.norm) == pytest.approx(float(norm), rel=near)
        assert norm > 1
    moments = {part.name: part.read("exp_avg") for part in fragments(engine)}  # weights would show no scale
    used = [name for name in moments if named[name].grad is not None]  # the others are not part of this model's losses
    found = torch.cat([moments[name] for name in used])
    expected = torch.cat([plain.state[named[name]]["exp_avg"].flatten() for name in used])
    assert (found - expected).norm() < 2 * near * expected.norm()
