"""A tiny model in DeepSpeed's engine, in the process of the test, and steps of it."""

from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from small_run import ROOT

from model.config import ModelConfig, TextConfig, VisionConfig
from model.singularity import Singularity
from runtime.ranks import Ranks
from train.config.settings import OptimizerConfig, RunConfig
from train.deepspeed.compat import finish_step
from train.deepspeed.engine import deepspeed_config, start_engine
from train.deepspeed.state import fragments
from train.guard import StepGuard

SMALL = ModelConfig(
    vision_encoder=VisionConfig(type="vit", width=32, depth=1, heads=2, drop_path=0.0),
    text_encoder=TextConfig(
        vocab_size=40, width=32, layers=2, fusion_layer=1, heads=2, intermediate=64, max_positions=16, dropout=0.0
    ),
    image_res=32,
    embed_dim=16,
)


def make(zero, precision, model=SMALL, freeze=(), **settings):
    """An engine and its guard; fp16 also on processors that only emulate it.

    zero: a file of deepspeed_configs/ without .json, or a path. freeze:
    prefixes of the names of parameters to be frozen.
    """
    if precision == "fp16":
        accelerator = type(get_accelerator())
        accelerator.is_fp16_supported = lambda _: True
        accelerator.supported_dtypes = lambda _: [torch.float, torch.half, torch.bfloat16]
    run = RunConfig(
        deepspeed=str(zero if isinstance(zero, Path) else ROOT / f"deepspeed_configs/{zero}.json"),
        precision=precision, **settings,
        optimizer=OptimizerConfig(lr=1e-2, max_grad_norm=1.0),
    )  # fmt: skip
    torch.manual_seed(0)
    module = Singularity(model, pad_id=0, cls_id=2, mask_id=4)
    module.freeze(freeze)
    engine, _ = start_engine(module, run, deepspeed_config(run, Ranks()), torch.device("cpu"))
    return engine, StepGuard(engine, Ranks(), limit=3, max_grad_norm=1.0)


def step(engine, guard, number, poisoned=False, factor=1.0, num_frames=1):
    """A step on four random pairs; factor: the loss is multiplied by it."""
    frames = torch.randn(4, num_frames, 3, 32, 32).to(next(engine.module.parameters()).dtype)
    if poisoned:
        frames[2] = float("nan")
    ids = torch.randint(5, 40, (4, 8))
    losses = engine(frames, ids, torch.ones_like(ids), torch.arange(4))
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-2
    engine.backward(guard.loss_scale.apply(factor * torch.stack(list(losses.values())).sum()))
    guard.step()
    guard.record(number, tuple(f"corpus/{number}_{row}" for row in range(4)), losses)
    finish_step(engine)


def numbers(engine):
    """Weights and moments, single precision."""
    return {
        (part.name, kind): part.read(kind).clone() for part in fragments(engine) if part.trained for kind in part.kinds
    }
