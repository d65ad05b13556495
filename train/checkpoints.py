"""Checkpoints: each complete or absent; written by all ranks together, found and pruned by step."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from loaders.text import Tokenizer
from model.checkpoint import save_model
from model.config import ModelConfig
from train.ranks import Ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

VERSION = 1
ENGINE = "engine"  # DeepSpeed's own files, below the checkpoint
STATE = "state.json"
WEIGHTS = "weights"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class TrainingState:
    """Where training is. Generators need no state: they are seeded anew at every step from (seed, step, rank)."""

    step: int = 0  # optimiser steps done
    epoch: int = 0  # of the next batch
    epoch_step: int = 0  # of the next batch, in its epoch
    world_size: int = 1
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
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE} cannot be read ({error}): remove {path}, an earlier one is used") from None
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, this program reads version {VERSION}: start a new run")
    return state


def check_resumable(path: Path, ranks: Ranks) -> None:
    """Raise ValueError when a checkpoint cannot be gone on from with this number of processes."""
    world_size = read_state(path).world_size
    if world_size != ranks.world_size:
        raise ValueError(
            f"{path} was written by {world_size} processes, this run has {ranks.world_size}: go on with {world_size}"
        )


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
        aside.mkdir(parents=True)
    _barrier()
    engine.save_checkpoint(str(aside), tag=ENGINE, save_latest=False)
    write_weights(aside / WEIGHTS, engine, model_config, tokenizer, ranks)
    _flush([path for path in aside.rglob("*") if path.is_file() and _mine(path, ranks)])
    _barrier()
    if ranks.is_first:
        text = json.dumps({"version": VERSION, **dataclasses.asdict(state)}, indent=1)
        (aside / STATE).write_text(text + "\n")
        _flush([aside / STATE, aside])
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush([folder])
        for old in complete_checkpoints(folder)[:-keep]:
            _remove(old)
    _barrier()
    return final


def write_weights(
    folder: Path, engine: DeepSpeedEngine, model_config: ModelConfig, tokenizer: Tokenizer, ranks: Ranks
) -> None:
    """Write the model's weights in single precision with its vocabulary; all ranks call, the first one writes."""
    state = full_weights(engine, ranks)
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        save_model(state, model_config, folder, special_ids(tokenizer))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Where the special tokens stand in the vocabulary, as the model's constructors want it."""
    return {"pad_id": tokenizer.pad_id, "cls_id": tokenizer.cls_id, "mask_id": tokenizer.mask_id}


def full_weights(engine: DeepSpeedEngine, ranks: Ranks) -> dict[str, torch.Tensor]:
    """All tensors in single precision on the CPU of the first rank (empty elsewhere), assembled one by one."""
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if ranks.is_first:
            state[name] = (parameter if full is None else full).detach().float().cpu().view(_shape(parameter))
    for name, buffer in engine.module.named_buffers():
        if ranks.is_first and name in engine.module.state_dict():
            state[name] = buffer.detach().cpu()
    return state


def load_checkpoint(path: Path, engine: DeepSpeedEngine) -> TrainingState:
    """Set the engine to a checkpoint of `save_checkpoint`; all ranks call. Returns where training was."""
    loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE)
    if loaded is None:
        raise ValueError(f"{path} cannot be loaded: remove it, an earlier one is used")
    return read_state(path)


def _shape(parameter: torch.nn.Parameter) -> Any:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a parameter holds only its own part


def _mine(path: Path, ranks: Ranks) -> bool:
    """Whether this rank has written a file: DeepSpeed's optimiser parts are named by rank, the first has the rest."""
    part = re.search(r"_pp_rank_(\d+)_", path.name)
    return int(part[1]) == ranks.rank if part else ranks.is_first


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
