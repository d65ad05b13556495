"""Parity of optimisation: AdamW steps from the start and from a checkpoint with optimiser state (case 09)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoints.loading import load_model
from model.checkpoints.official import read_official_file
from model.checkpoints.official_names import from_official, is_rebuilt, official_parts, tied_to, to_official
from model.singularity import Singularity
from runtime.settings import build
from tests.parity.comparison import LOSS_NAMES, Case, Comparison
from tests.parity.forward import recorded_choices
from train.config.settings import OptimizerConfig
from train.optimizer import ParameterGroup, Schedule, parameter_groups

LOSS_TOLERANCE = 1e-3
PREFIX = "text_encoder.bert."


def optimizer_config(official: dict[str, Any]) -> OptimizerConfig:
    """Our settings for the `optimizer` section of an official configuration."""
    return build(OptimizerConfig, {key: value for key, value in official.items() if key != "opt"})


def official_groups(official: dict[str, Any]) -> list[ParameterGroup]:
    """Groups of an official checkpoint's parameters by their official names, in its order: by weight decay, by rate."""
    shapes = {
        name: tensor.ndim for name, tensor in official["model"].items() if not is_rebuilt(name) and not tied_to(name)
    }
    groups = parameter_groups(shapes, optimizer_config(official["config"]["optimizer"]))
    decays = [group.weight_decay for group in groups]
    return sorted(groups, key=lambda group: decays.index(group.weight_decay))


def make_optimizer(model: torch.nn.Module, groups: list[ParameterGroup], betas: list[float]) -> torch.optim.AdamW:
    """AdamW with these groups; a parameter of ours is in the group of its (first) official one."""
    ours = {official_parts(name, PREFIX)[0]: parameter for name, parameter in model.named_parameters()}
    return torch.optim.AdamW(
        [
            {
                "params": [ours[name] for name in group.names if name in ours],
                "weight_decay": group.weight_decay,
                "lr": group.lr,
                "base": group.lr,
            }
            for group in groups
        ],
        betas=(betas[0], betas[1]),
    )


def load_moments(
    model: torch.nn.Module, optimizer: torch.optim.AdamW, groups: list[ParameterGroup], official: dict[str, Any]
) -> None:
    """Load an official checkpoint's optimiser state into ours; its parameters have numbers, ours have names."""
    entries = official["optimizer"]["state"]
    numbers = [number for group in official["optimizer"]["param_groups"] for number in group["params"]]
    names = [name for group in groups for name in group.names]
    by_name = {name: entries[number] for name, number in zip(names, numbers, strict=True) if number in entries}
    moments = {
        key: from_official({name: entry[key] for name, entry in by_name.items()}, list(model.state_dict()), PREFIX)
        for key in ("exp_avg", "exp_avg_sq")
    }
    step = next(iter(by_name.values()))["step"]
    for name, parameter in model.named_parameters():
        if name in moments["exp_avg"]:
            own = {key: moments[key][name].clone() for key in moments}
            optimizer.state[parameter] = {"step": step.clone(), **own}


def compare_steps(folder: Path) -> Comparison:
    """Losses, rates, gradient norms and parameters over the recorded steps, from the start and from the middle."""
    case, result = Case(folder), Comparison(folder.name)
    steps = len(case.inputs["image"])
    _run(case, result, case.checkpoint, range(steps))
    if (folder / "ckpt_mid.pth").is_file():
        _run(case, result, folder / "ckpt_mid.pth", range(steps // 2, steps))
    return result


def _run(case: Case, result: Comparison, checkpoint: Path, steps: range) -> None:
    official = read_official_file(checkpoint)
    options, plan = official["config"]["optimizer"], official["config"]["scheduler"]
    schedule = Schedule(plan["num_warmup_steps"], plan["num_training_steps"], plan["min_lr_multi"])
    model, groups = load_model(checkpoint), official_groups(official)
    assert isinstance(model, Singularity)
    optimizer = make_optimizer(model, groups, options["opt_betas"])
    label = "resumed, " if steps.start else ""
    if steps.start:
        load_moments(model, optimizer, groups, official)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * schedule.multiplier(step)
        rates = np.array([group["lr"] for group in optimizer.param_groups])
        result.close(f"{label}rates of step {step}", rates, case.expected["lr_used"][step], rtol=1e-6, atol=0)
        _losses(model, case, result, step, label)
        limit = options["max_grad_norm"] if options["max_grad_norm"] > 0 else math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        result.close(
            f"{label}gradient norm of step {step}", norm, case.expected["grad_norm_before_clip"][step], 1e-3, 0
        )
        optimizer.step()
        optimizer.zero_grad()
    if f"param_l2_after_step{steps.stop - 1}" in case.expected:
        _compare_parameters(model, case, result, label)


def _losses(model: Singularity, case: Case, result: Comparison, step: int, label: str) -> None:
    """Compare the losses of a step and compute their gradients."""
    inputs = [case.inputs[name][step] for name in ("image", "input_ids", "attention_mask", "idx")]
    losses = model(*inputs, recorded_choices(case.inputs, f"step{step}_"))
    torch.stack(list(losses.values())).sum().backward()
    for theirs, ours in LOSS_NAMES.items():
        weight = getattr(model.config.loss_weight, ours)
        if weight and f"loss_{ours}" in losses:
            value = losses[f"loss_{ours}"] / weight
            recorded = case.expected[f"loss_{theirs}"][step]
            result.close(f"{label}loss_{theirs} of step {step}", value, recorded, 0, LOSS_TOLERANCE)
    result.close(f"{label}temperature of step {step}", model.temp.squeeze(), case.expected["temp_used"][step])


def _compare_parameters(model: Singularity, case: Case, result: Comparison, label: str) -> None:
    """Small parameters after the last step, without key biases: their gradients are noise, which Adam scales up."""
    ours = to_official(model.state_dict(), PREFIX)
    for name, value in case.expected.items():
        name = name.removeprefix("final:") if name.startswith("final:") else ""
        if name and not name.endswith("key.bias"):
            result.close(f"{label}final {name}", ours[name], value)
