"""Checkpoints: each complete or absent; written by all ranks together, found and pruned by step."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from loaders.text import Tokenizer
from model.checkpoints.files import TENSORS, weights_fault
from model.checkpoints.loading import save_model
from model.config import ModelConfig
from runtime.activity import progress
from runtime.collectives import gather_objects
from runtime.errors import FULL, UserError, os_error_number
from runtime.ranks import Ranks
from storage.files import flush, remove_folder, replace_folder, temporary_path, write_text
from train.checkpoints.best import BEFORE_VERSIONS, WEIGHTS, best_version, keep_only, point_to, write_marker
from train.checkpoints.shards import check_shards, read_shards, whole_weights, write_shard
from train.deepspeed.compat import LossScale
from train.deepspeed.state import optimizer_step, whole_shape

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

VERSION = 2
SHARDS = "parts"  # the checkpoint shards: weights and moments, a file for each rank
STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class TrainingState:
    """The position of training. Random generators need no state: each step seeds them from (seed, step, rank)."""

    step: int = 0  # optimiser steps done
    epoch: int = 0  # of the next batch
    epoch_step: int = 0  # of the next batch, in its epoch
    world_size: int = 1  # that wrote the checkpoint
    optimizer_step: int = 0  # steps that AdamW has taken: those done less those skipped
    loss_scale: dict[str, float] = field(default_factory=dict)  # of fp16
    best: float | None = None  # the best score of the stop_key's split so far
    best_step: int | None = None  # of the weights with that score; none: written before there were versions
    evaluated_epochs: int = 0
    versions: dict[str, str] = field(default_factory=dict)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, by step."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step of `step_00000100`."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def read_state(path: Path) -> TrainingState:
    """The training state of a checkpoint. Raises UserError when it is damaged or of another version."""
    try:
        data = json.loads((path / STATE).read_text())
        version = data.pop("version")
        known = {item.name for item in dataclasses.fields(TrainingState)}
        state = TrainingState(**{name: value for name, value in data.items() if name in known})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / STATE} is damaged ({error}): remove {path}, an earlier one is used") from None
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, this program reads version {VERSION}: start a new run")
    return state


def check_checkpoint(path: Path) -> None:
    """Raise UserError unless a checkpoint's files are complete, as far as their sizes and headers tell."""
    read_state(path)
    if fault := weights_fault(path / WEIGHTS):
        raise UserError(f"{path} is damaged ({fault}): remove it, an earlier one is used")
    check_shards(path / SHARDS)


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

    It is written under another name, flushed to the disk and then renamed, so that a crash at any moment leaves the
    earlier checkpoints and at most an incomplete folder, which is not taken for one.
    """
    final = folder / f"step_{state.step:08d}"
    temporary = temporary_path(final)

    def write_rest() -> None:
        _write_whole_weights(temporary, engine, model_config, tokenizer)
        _write_state(temporary, replace(state, world_size=ranks.world_size, **_optimizer_state(engine)))
        flush(*(temporary / WEIGHTS).iterdir(), temporary / WEIGHTS, temporary / SHARDS, temporary)
        replace_folder(temporary, final)
        for old in complete_checkpoints(folder)[:-keep]:
            remove_folder(old)
        keep_only(folder, named_best_steps(folder))

    write = _CollectiveWrite(final, temporary, ranks)
    write.on_first_rank(lambda: _make_empty(temporary))
    write.on_every_rank(lambda: flush(write_shard(temporary / SHARDS, engine, ranks)))
    write.on_first_rank(write_rest)
    return final


def save_best(
    folder: Path,
    engine: DeepSpeedEngine,
    state: TrainingState,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    ranks: Ranks,
    split: str,
) -> None:
    """Keep the present weights as the best ones, with the score in `state`; to be called by all ranks."""
    version = best_version(folder, state.step)
    save_weights(version, engine, model_config, tokenizer, ranks, (state.step, state.best, split))
    if ranks.is_first:
        point_to(folder, state.step)
        keep_only(folder, named_best_steps(folder) | {state.step})


def save_weights(
    folder: Path,
    engine: DeepSpeedEngine,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    ranks: Ranks,
    marker: tuple[int, float | None, str] = (0, None, ""),
) -> None:
    """Write `folder/weights`, the model in single precision with its vocabulary, or leave the old one; all call.

    marker: arguments of `write_marker`.
    """
    temporary = temporary_path(folder)

    def write_rest() -> None:
        _write_whole_weights(temporary, engine, model_config, tokenizer)
        shutil.rmtree(temporary / SHARDS)
        flush(*(temporary / WEIGHTS).iterdir(), temporary / WEIGHTS, write_marker(temporary, *marker), temporary)
        replace_folder(temporary, folder)

    write = _CollectiveWrite(folder, temporary, ranks)
    write.on_first_rank(lambda: _make_empty(temporary))
    write.on_every_rank(lambda: write_shard(temporary / SHARDS, engine, ranks, moments=False))
    write.on_first_rank(write_rest)


def update_state(path: Path, state: TrainingState, ranks: Ranks) -> None:
    """Add the result of an evaluation to the state of a complete checkpoint; all ranks call."""
    found = {name: getattr(state, name) for name in ("best", "best_step", "evaluated_epochs")}
    writing = _CollectiveWrite(path, temporary_path(path / STATE), ranks)
    writing.on_first_rank(lambda: _write_state(path, replace(read_state(path), **found)))


def named_best_steps(folder: Path) -> set[int]:
    """The versions of the best model that the complete checkpoints below `folder` name."""
    named = set()
    for path in complete_checkpoints(folder):
        try:
            state = read_state(path)
        except UserError:  # a damaged one, reported when it is loaded
            continue
        if state.best is not None:
            named.add(BEFORE_VERSIONS if state.best_step is None else state.best_step)
    return named


class _CollectiveWrite:
    """Steps of writing a folder, each by one rank or all. Where one fails all ranks raise, and nothing is left.

    Raises UserError for a disk that is full or cannot be written to.
    """

    def __init__(self, final: Path, temporary: Path, ranks: Ranks) -> None:
        self._final, self._temporary, self._ranks = final, temporary, ranks

    def on_first_rank(self, step: Callable[[], object]) -> None:
        """Run a step on the first rank; all ranks call it and wait."""
        self.on_every_rank(step if self._ranks.is_first else lambda: None)

    def on_every_rank(self, step: Callable[[], object]) -> None:
        """Do a step on every rank, and wait until all have."""
        fault: tuple[int, str] | None = None
        try:
            step()
        except (OSError, SafetensorError) as error:
            number = os_error_number(error)
            if number is None:
                raise
            fault = (number, os.strerror(number))
        faults = gather_objects(fault, self._ranks.world_size)
        failed = next((rank for rank, each in enumerate(faults) if each is not None), None)
        if failed is None:
            return
        if self._ranks.is_first:
            shutil.rmtree(self._temporary, ignore_errors=True)
        raise UserError(self._error_text(failed, *faults[failed]))  # type: ignore[misc]

    def _error_text(self, rank: int, number: int, reason: str) -> str:
        who = f" by rank {rank}" if self._ranks.world_size > 1 else ""
        remedy = "free some space" if number in FULL else "make it writable"
        earlier = complete_checkpoints(self._final.parent)
        start = f"continues from {earlier[-1].name}, which is complete" if earlier else "starts from the beginning"
        return (
            f"{self._final} cannot be written{who} ({reason}): {remedy} and run the same command again, which {start}"
        )


def _make_empty(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / SHARDS).mkdir(parents=True)


def _write_state(folder: Path, state: TrainingState) -> None:
    """Write `folder/state.json`, whole or not at all."""
    text = json.dumps({"version": VERSION, **dataclasses.asdict(state)}, indent=1) + "\n"
    write_text(folder / STATE, text, sync=True)


def _write_whole_weights(
    folder: Path, engine: DeepSpeedEngine, model_config: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Assemble the weights of all checkpoint shards on this host's CPU, and write `folder/weights`."""
    shapes = {name: whole_shape(parameter) for name, parameter in engine.module.named_parameters()}
    state = whole_weights(folder / SHARDS, shapes)
    state |= {name: buffer.detach().cpu() for name, buffer in persistent_buffers(engine).items()}
    progress("writing the whole weights")
    (folder / WEIGHTS).mkdir()
    tokenizer.save(folder / WEIGHTS)
    save_model(state, model_config, folder / WEIGHTS, special_ids(tokenizer))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens, as arguments of the model's constructors."""
    return {"pad_id": tokenizer.pad_id, "cls_id": tokenizer.cls_id, "mask_id": tokenizer.mask_id}


def load_checkpoint(path: Path, engine: DeepSpeedEngine) -> TrainingState:
    """Set the engine to a checkpoint of `save_checkpoint`, of any number of ranks and ZeRO stage; all ranks call.

    Returns where training was.
    """
    state = read_state(path)
    read_shards(path / SHARDS, engine, state.optimizer_step)
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
    """Set the persistent buffers that `state` holds."""
    for name, buffer in persistent_buffers(engine).items():
        if name in state:
            buffer.copy_(state[name])


def _optimizer_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The optimiser's state that belongs to no parameter."""
    return {"optimizer_step": optimizer_step(engine), "loss_scale": LossScale(engine).state()}
