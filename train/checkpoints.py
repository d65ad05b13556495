"""Checkpoints: each complete or absent; written by all ranks together, found and pruned by step."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import distributed

from loaders.text import Tokenizer
from model.checkpoint import save_model
from model.config import ModelConfig
from model.files import TENSORS, weights_fault
from train.loss_scale import LossScale
from train.parts import check_parts, read_parts, whole_weights, write_part
from train.ranks import Ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

VERSION = 2
PARTS = "parts"  # the ranks' own files: weights and moments
STATE = "state.json"
WEIGHTS = "weights"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class TrainingState:
    """Where training is. Generators need no state: they are seeded anew at every step from (seed, step, rank)."""

    step: int = 0  # optimiser steps done
    epoch: int = 0  # of the next batch
    epoch_step: int = 0  # of the next batch, in its epoch
    world_size: int = 1  # that wrote the checkpoint
    optimizer_step: int = 0  # steps that AdamW has taken: those done less those skipped
    loss_scale: dict[str, float] = field(default_factory=dict)  # of fp16
    best: float | None = None  # r_mean of the stop_key's split so far
    evaluated_epochs: int = 0  # epochs whose evaluation is behind us
    versions: dict[str, str] = field(default_factory=dict)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest step first. What bears its final name is complete."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step of `step_00000100`."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def read_state(path: Path) -> TrainingState:
    """The training state of a checkpoint. Raises ValueError when it is damaged or of another version."""
    try:
        data = json.loads((path / STATE).read_text())
        version = data.pop("version")
        state = TrainingState(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / STATE} is damaged ({error}): remove {path}, an earlier one is used") from None
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, this program reads version {VERSION}: start a new run")
    return state


def check_checkpoint(path: Path) -> None:
    """Raise ValueError unless a checkpoint's files are complete, as far as their sizes and headers tell."""
    read_state(path)
    if fault := weights_fault(path / WEIGHTS):
        raise ValueError(f"{path} is damaged ({fault}): remove it, an earlier one is used")
    check_parts(path / PARTS)


def save_checkpoint(
    folder: Path,
    engine: DeepSpeedEngine,
    state: TrainingState,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write `folder/step_XXXXXXXX`, to be called by all ranks at the same step; keep the newest `keep`.

    It is made under another name, flushed to the disk and then renamed, so that a crash at any moment leaves the
    earlier checkpoints and at most a half-written folder that nobody takes for one.
    """
    final = folder / f"step_{state.step:08d}"
    aside = folder / f".{final.name}.part"
    if ranks.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / PARTS).mkdir(parents=True)
    _barrier()
    _flush([write_part(aside / PARTS, engine, ranks)])
    _barrier()
    if ranks.is_first:
        _write_whole_weights(aside, engine, model_config, tokenizer)
        state = replace(state, world_size=ranks.world_size, **_optimizer_state(engine))
        text = json.dumps({"version": VERSION, **dataclasses.asdict(state)}, indent=1)
        (aside / STATE).write_text(text + "\n")
        _flush([*(aside / WEIGHTS).iterdir(), aside / WEIGHTS, aside / PARTS, aside / STATE, aside])
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush([folder])
        for old in complete_checkpoints(folder)[:-keep]:
            _remove(old)
    _barrier()
    return final


def save_weights(
    folder: Path, engine: DeepSpeedEngine, model_config: ModelConfig, tokenizer: Tokenizer, ranks: Ranks
) -> None:
    """Write `folder/weights`, the model in single precision with its vocabulary, or leave the old one; all call."""
    aside = folder.with_name(f".{folder.name}.part")
    if ranks.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / PARTS).mkdir(parents=True)
    _barrier()
    write_part(aside / PARTS, engine, ranks, moments=False)
    _barrier()
    if ranks.is_first:
        _write_whole_weights(aside, engine, model_config, tokenizer)
        shutil.rmtree(aside / PARTS)
        _flush([*(aside / WEIGHTS).iterdir(), aside / WEIGHTS, aside])
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        _flush([folder.parent])
    _barrier()


def _write_whole_weights(
    folder: Path, engine: DeepSpeedEngine, model_config: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Put the ranks' parts of the weights together on this host, on its CPU, and write `folder/weights`."""
    shapes = {name: _shape(parameter) for name, parameter in engine.module.named_parameters()}
    state = whole_weights(folder / PARTS, shapes)
    state |= {name: buffer.detach().cpu() for name, buffer in persistent_buffers(engine).items()}
    (folder / WEIGHTS).mkdir()
    tokenizer.save(folder / WEIGHTS)
    save_model(state, model_config, folder / WEIGHTS, special_ids(tokenizer))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Where the special tokens stand in the vocabulary, as the model's constructors want it."""
    return {"pad_id": tokenizer.pad_id, "cls_id": tokenizer.cls_id, "mask_id": tokenizer.mask_id}


def load_checkpoint(path: Path, engine: DeepSpeedEngine) -> TrainingState:
    """Set the engine to a checkpoint of `save_checkpoint`; all ranks call. Returns where training was.

    The number of ranks and the ZeRO stage may be others than those that wrote it.
    """
    state = read_state(path)
    read_parts(path / PARTS, engine, state.optimizer_step)
    engine.global_steps, engine.skipped_steps = state.step, state.step - state.optimizer_step
    LossScale(engine).load(state.loss_scale)
    if names := persistent_buffers(engine).keys():
        with safe_open(str(path / WEIGHTS / TENSORS), framework="pt") as file:
            set_buffers(engine, {name: file.get_tensor(name) for name in names & set(file.keys())})
    return state


def persistent_buffers(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The buffers of the module that belong to its state, by name."""
    persistent = engine.module.state_dict().keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in persistent}


def set_buffers(engine: DeepSpeedEngine, state: Mapping[str, torch.Tensor]) -> None:
    """Set the persistent buffers to those in `state`, which may hold more, or lack some."""
    for name, buffer in persistent_buffers(engine).items():
        if name in state:
            buffer.copy_(state[name])


def _optimizer_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What of the optimiser is not a matter of single parameters."""
    steps = {float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, steps
    return {"optimizer_step": int(max(steps, default=0)), "loss_scale": LossScale(engine).state()}


def _shape(parameter: torch.nn.Parameter) -> Any:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a parameter holds only its own part


def _flush(paths: list[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that it is never seen with parts missing."""
    doomed = path.with_name(f".{path.name}.part")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _barrier() -> None:
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.barrier()
