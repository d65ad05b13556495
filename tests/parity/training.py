"""Parity of optimisation: the official AdamW steps and schedule, and their continuation from a checkpoint (case 09)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoints.loading import load_model
from model.checkpoints.official import read_official_file
from model.checkpoints.official_names import from_official, official_parts, to_official
from model.singularity import Singularity
from tests.parity.comparison import Case, Comparison
from tests.parity.forward import recorded_choices

LOSS_TOLERANCE = 1e-3
PREFIX = "text_encoder.bert."


def rate_factor(step: int, schedule: dict[str, Any]) -> float:
    """The share of its rate that is in effect at `step`: linear warm-up and cosine decay, both floored."""
    warmup, total, floor = schedule["num_warmup_steps"], schedule["num_training_steps"], schedule["min_lr_multi"]
    if step < warmup:
        return max(floor, step / max(1, warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return max(floor, 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(names: list[str], shapes: list[int], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of official parameter names, in the official order: by weight decay, then by rate, as they turn up.

    shapes: numbers of dimensions; options: the `optimizer` settings.
    """
    different = options.get("different_lr") or {}
    special = different.get("module_names", []) if different.get("enable") else []
    groups: dict[float, dict[float, list[str]]] = {}
    for name, dimensions in zip(names, shapes, strict=True):
        decay = 0.0 if dimensions == 1 or name.endswith(".bias") else options["weight_decay"]
        rate = different["lr"] if any(part in name for part in special) else options["lr"]
        groups.setdefault(decay, {}).setdefault(rate, []).append(name)
    return [
        {"names": members, "weight_decay": decay, "lr": rate}
        for decay, by_rate in groups.items()
        for rate, members in by_rate.items()
    ]


def make_optimizer(model: torch.nn.Module, official: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW with the groups of an official checkpoint; a tensor of ours belongs where its (first) official one does."""
    options = official["config"]["optimizer"]
    names = parameter_names(official["model"])
    groups = parameter_groups(names, [official["model"][name].ndim for name in names], options)
    ours = {official_parts(name, PREFIX)[0]: parameter for name, parameter in model.named_parameters()}
    for group in groups:
        group["params"] = [ours[name] for name in group["names"] if name in ours]
        group["base"] = group["lr"]
    return torch.optim.AdamW(groups, betas=tuple(options["opt_betas"]))


def load_moments(model: torch.nn.Module, optimizer: torch.optim.AdamW, official: dict[str, Any]) -> None:
    """Put an official checkpoint's optimiser state into ours: its parameters go by number, ours by name."""
    entries = official["optimizer"]["state"]
    numbers = [number for group in official["optimizer"]["param_groups"] for number in group["params"]]
    names = [name for group in optimizer.param_groups for name in group["names"]]
    by_name = {name: entries[number] for name, number in zip(names, numbers, strict=True) if number in entries}
    moments = {
        key: from_official({name: entry[key] for name, entry in by_name.items()}, list(model.state_dict()), PREFIX)
        for key in ("exp_avg", "exp_avg_sq")
    }
    step = next(iter(by_name.values()))["step"]
    for name, parameter in model.named_parameters():
        if name in moments["exp_avg"]:
            optimizer.state[parameter] = {
                "step": step.clone(),
                **{key: moments[key][name].clone() for key in moments},
            }


def parameter_names(state: dict[str, torch.Tensor]) -> list[str]:
    """Names of an official model's parameters in its own order; tied ones once, index tables left out."""
    repeated = ("relative_position_index", "position_ids", "predictions.decoder.weight", "predictions.decoder.bias")
    return [name for name in state if not name.endswith(repeated)]


def compare_steps(folder: Path) -> Comparison:
    """Losses, rates, gradient norms and parameters over the recorded steps, from the start and from the middle."""
    case, result = Case(folder), Comparison(folder.name)
    steps = len(case.inputs["image"])
    _run(case, result, case.checkpoint, 0, steps)
    if (folder / "ckpt_mid.pth").is_file():
        _run(case, result, folder / "ckpt_mid.pth", steps // 2, steps)
    return result


def _run(case: Case, result: Comparison, checkpoint: Path, first: int, last: int) -> None:
    official = read_official_file(checkpoint)
    settings, expected = official["config"], case.expected
    model = load_model(checkpoint)
    assert isinstance(model, Singularity)
    optimizer = make_optimizer(model, official)
    if first:
        load_moments(model, optimizer, official)
    label = "resumed, " if first else ""
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate_factor(step, settings["scheduler"])
        rates = np.array([group["lr"] for group in optimizer.param_groups])
        result.close(f"{label}rates of step {step}", rates, expected["lr_used"][step], rtol=1e-6, atol=0)
        pixels, ids, mask, idx = (case.inputs[name][step] for name in ("image", "input_ids", "attention_mask", "idx"))
        losses = model(pixels, ids, mask, idx, recorded_choices(case.inputs, f"step{step}_"))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        for theirs, ours in (("ita", "itc"), ("itm", "itm"), ("mlm", "mlm")):
            weight = getattr(model.config.loss_weight, ours)
            value = losses[f"loss_{ours}"] / weight
            result.close(
                f"{label}loss_{theirs} of step {step}", value, expected[f"loss_{theirs}"][step], 0, LOSS_TOLERANCE
            )
        result.close(f"{label}temperature of step {step}", model.temp.squeeze(), expected["temp_used"][step])
        _clip_and_step(model, optimizer, settings, result, f"{label}gradient norm of step {step}", expected, step)
    if f"param_l2_after_step{last - 1}" in expected:
        _compare_parameters(model, case, result, label)


def _clip_and_step(
    model: Singularity,
    optimizer: torch.optim.AdamW,
    settings: dict[str, Any],
    result: Comparison,
    label: str,
    expected: dict[str, torch.Tensor],
    step: int,
) -> None:
    limit = settings["optimizer"]["max_grad_norm"]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit if limit > 0 else math.inf)
    result.close(label, norm, expected["grad_norm_before_clip"][step], 1e-3, 0)
    optimizer.step()


def _compare_parameters(model: Singularity, case: Case, result: Comparison, label: str) -> None:
    """Small parameters after the last step; key biases are skipped, Adam blows their noise up."""
    ours = to_official(model.state_dict(), PREFIX)
    for name, value in case.expected.items():
        name = name.removeprefix("final:") if name.startswith("final:") else ""
        if name and not name.endswith("key.bias"):
            result.close(f"{label}final {name}", ours[name], value)
