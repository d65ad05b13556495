"""On a GPU nothing in a training step waits for the device, and a step launches no more kernels than it did.

The model's part runs on the meta device, the engine's on the CPU as if that computed by itself.
"""

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from small_engine import make, step
from waits import watched

import train.step
from loaders.batch import Answers, Batch
from model.building import build_model
from model.config import AnswerDecoderConfig, ModelConfig, TemporalConfig, TextConfig, VisionConfig
from train.config.settings import RunConfig
from train.guard import StepGuard, gradient_norm
from train.schedule import Schedule
from train.step import Stepper, without_padding

PAIRS, WORDS = 8, 13
# Kernels of the published model's forward and backward pass, attention counted as one each. A change that needs more
# has to show that it is worth it.
LINEAR = torch.nn.functional.linear  # as it is before any test runs
BUDGET = {"image": (663, 956), "video": (702, 1016), "qa": (633, 914)}
STEP_BUDGET = 48  # of the optimiser's step, two groups of parameters


class MetaEngine:
    """What Stepper uses of DeepSpeed's engine, which computes nothing by itself."""

    def __init__(self, model):
        self.model = model
        self.optimizer = SimpleNamespace(param_groups=[], optimizer=None)
        self.kernels, self.spent = None, []

    def __call__(self, *inputs):
        losses = self.model(*inputs)
        self.spent.append(self.kernels.launched)
        return losses

    def was_step_applied(self):
        return True

    def backward(self, loss):
        before = self.kernels.launched
        loss.backward()
        self.spent.append(self.kernels.launched - before)


KINDS = {
    "image": ModelConfig(),
    "video": ModelConfig(
        num_frames=4, add_temporal_embed=True, temporal_vision_encoder=TemporalConfig(enable=True)
    ),
    "qa": ModelConfig(answer_decoder=AnswerDecoderConfig(enable=True)),
}  # fmt: skip


def meta_model(kind):
    """The published model, in bf16 and in training, without memory."""
    with torch.device("meta"):
        return build_model(KINDS[kind]).to(torch.bfloat16).train()


def host_batch(kind):
    """A batch as the loader gives it: on the host."""
    frames = torch.zeros(PAIRS, 4 if kind == "video" else 1, 224, 224, 3, dtype=torch.uint8)
    mask = torch.zeros(PAIRS, 32, dtype=torch.long)
    mask[:, :WORDS] = 1
    answers = None
    if kind == "qa":
        counts = torch.tensor([1, 2] * (PAIRS // 2))
        ids = torch.ones(int(counts.sum()), 6, dtype=torch.long)
        answers = Answers(ids, torch.ones_like(ids), torch.ones(len(ids)), counts)
    keys = tuple(map(str, range(PAIRS)))
    return Batch("image", 0, 0, frames, mask * 7, mask, torch.arange(PAIRS), keys, answers)


# What Stepper uses of StepGuard.
META_GUARD = SimpleNamespace(
    loss_scale=SimpleNamespace(apply=lambda loss: loss),
    step=lambda: None,
    record=lambda step, keys, losses: torch.stack(list(losses.values())).sum(),
)


@pytest.fixture(autouse=True)
def plain_linear(monkeypatch):
    """PyTorch's own: DeepSpeed puts another in its place for ZeRO 3, for as long as the process lives."""
    monkeypatch.setattr(torch.nn.functional, "linear", LINEAR)


@pytest.mark.parametrize("kind", BUDGET)
def test_nothing_of_a_step_waits_and_its_kernels_are_counted(kind, monkeypatch):
    """Three steps of the published model on the meta device: the first ones make what is kept."""
    monkeypatch.setattr(train.step, "fragments", lambda engine: [])
    model, device = meta_model(kind), torch.device("meta")
    engine, run = MetaEngine(model), RunConfig(precision="bf16")
    stepper = Stepper(engine, [], model, Schedule(0, 10, 0.1), META_GUARD, device, run, 0)
    for number in range(3):
        model.zero_grad()
        engine.spent = []
        batch = without_padding(host_batch(kind))
        with watched("meta") as (found, engine.kernels):
            stepper(batch, number)
    assert found == []
    assert all(used <= limit for used, limit in zip(engine.spent, BUDGET[kind])), engine.spent


# As many parameters as the published model has, with little to compute.
NARROW = ModelConfig(
    vision_encoder=VisionConfig(width=24, heads=12, mlp_ratio=1.0),
    text_encoder=TextConfig(vocab_size=40, width=24, heads=12, intermediate=24),
    image_res=32,
    embed_dim=8,
)


@pytest.mark.usefixtures("one_process")
def test_the_kernels_of_the_optimisers_step_do_not_grow_with_the_parameters():
    engine, guard = make("zero1", "bf16", NARROW)
    step(engine, guard, 1)
    spent = []
    whole_step = guard.step

    def counted():
        with watched("cpu") as (_, kernels):
            whole_step()
        spent.append(kernels.launched)

    guard.step = counted
    step(engine, guard, 2)
    assert len(list(engine.module.parameters())) == 439
    assert spent[0] <= STEP_BUDGET, spent


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_nothing_of_the_engine_waits(zero, precision, monkeypatch):
    waits = []
    accelerator = type(get_accelerator())
    monkeypatch.setattr(accelerator, "synchronize", lambda *_: waits.append("synchronize"))
    monkeypatch.setattr(accelerator, "resolves_data_dependency", lambda *_: False)  # as on a GPU
    engine, guard = make(zero, precision)
    for number in range(1, 5):  # DeepSpeed's timer waits from the third one on
        step(engine, guard, number)
    waits.clear()
    with watched("cpu") as (found, _):
        step(engine, guard, 5, poisoned=True)
    # The small model itself runs on the CPU here: reading its shapes and drawing its batch is not the engine's doing.
    assert waits == []
    assert [wait for wait in found if "tests/" not in wait] == []


@pytest.mark.usefixtures("one_process")
def test_clipping_and_skipping_wait_for_nothing():
    """StepGuard's own part of the optimiser's step, with the gradient on the device."""
    weights = torch.nn.Parameter(torch.ones(8, device="meta"))
    weights.grad = torch.ones_like(weights)
    optimizer = SimpleNamespace(param_groups=[{"params": [weights]}])
    guard = StepGuard.__new__(StepGuard)
    guard._max_grad_norm, guard._partitioned = 1.0, True
    with watched("meta") as (found, _):
        guard._measured = gradient_norm([torch.ones(8, dtype=torch.bfloat16, device="meta")] * 3) / 1.0
        guard._before_update(optimizer)
    assert found == []
    assert guard.norm.dtype == torch.float32
    assert optimizer.found_inf.device.type == "meta"


def test_the_watch_sees_what_waits():
    there, host = torch.ones(4, device="meta"), torch.ones(4)
    mask = torch.ones(4, dtype=torch.bool, device="meta")
    with watched("meta") as (found, kernels):
        for waiting in (
            lambda: torch.tensor([1.0], device="meta"),
            lambda: torch.as_tensor(1.0, device="meta"),
            lambda: host.to("meta"),
            lambda: there.sum().item(),
            lambda: bool(there.sum() > 0),
            lambda: there.tolist(),
            lambda: there[mask],
            lambda: there.cpu(),
            lambda: there.repeat_interleave(there.long()),
            lambda: mask.nonzero(),
        ):
            before = len(found)
            with contextlib.suppress(RuntimeError, NotImplementedError):  # the meta device has no values to give
                waiting()
            assert len(found) > before, inspect.getsource(waiting)
        assert "tests/train/test_waits.py:" in found[0]
        found.clear()
        host.to("meta", non_blocking=True)
        torch.where(mask, there, 0.0).sum()
        torch.zeros(4, device="meta").masked_fill_(mask, 1.0)
        torch.tensor([1.0])
        assert found == []
        assert kernels.launched > 3
