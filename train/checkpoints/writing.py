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
from train.checkpoints.shards import check_parts, read_parts, whole_weights, write_part
from train.deepspeed.compat import LossScale
from train.deepspeed.state import optimizer_step, whole_shape

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

VERSION = 2
PARTS = "parts"  # the ranks' own files: weights and moments
STATE = "state.json"
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
    best_step: int | None = None  # after which the weights had it; none: written before there were versions
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
        known = {item.name for item in dataclasses.fields(TrainingState)}
        state = TrainingState(**{name: value for name, value in data.items() if name in known})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / STATE} is damaged ({error}): remove {path}, an earlier one is used") from None
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, this program reads version {VERSION}: start a new run")
    return state


def check_checkpoint(path: Path) -> None:
    """Raise ValueError unless a checkpoint's files are complete, as far as their sizes and headers tell."""
    read_state(path)
    if fault := weights_fault(path / WEIGHTS):
        raise UserError(f"{path} is damaged ({fault}): remove it, an earlier one is used")
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
    aside = temporary_path(final)

    def write_rest() -> None:
        _write_whole_weights(aside, engine, model_config, tokenizer)
        _write_state(aside, replace(state, world_size=ranks.world_size, **_optimizer_state(engine)))
        flush(*(aside / WEIGHTS).iterdir(), aside / WEIGHTS, aside / PARTS, aside)
        replace_folder(aside, final)
        for old in complete_checkpoints(folder)[:-keep]:
            remove_folder(old)
        keep_only(folder, named_best_steps(folder))

    write = _Writing(final, aside, ranks)
    write.on_first(lambda: _make_anew(aside))
    write.on_all(lambda: flush(write_part(aside / PARTS, engine, ranks)))
    write.on_first(write_rest)
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
    mark: tuple[int, float | None, str] = (0, None, ""),
) -> None:
    """Write `folder/weights`, the model in single precision with its vocabulary, or leave the old one; all call.

    mark: what `write_marker` says of it.
    """
    aside = temporary_path(folder)

    def write_rest() -> None:
        _write_whole_weights(aside, engine, model_config, tokenizer)
        shutil.rmtree(aside / PARTS)
        flush(*(aside / WEIGHTS).iterdir(), aside / WEIGHTS, write_marker(aside, *mark), aside)
        replace_folder(aside, folder)

    write = _Writing(folder, aside, ranks)
    write.on_first(lambda: _make_anew(aside))
    write.on_all(lambda: write_part(aside / PARTS, engine, ranks, moments=False))
    write.on_first(write_rest)


def update_state(path: Path, state: TrainingState, ranks: Ranks) -> None:
    """Write into the state of a complete checkpoint what an evaluation of its weights has found; all ranks call."""
    found = {name: getattr(state, name) for name in ("best", "best_step", "evaluated_epochs")}
    writing = _Writing(path, temporary_path(path / STATE), ranks)
    writing.on_first(lambda: _write_state(path, replace(read_state(path), **found)))


def named_best_steps(folder: Path) -> set[int]:
    """The versions of the best model that the complete checkpoints below `folder` name."""
    named = set()
    for path in complete_checkpoints(folder):
        try:
            state = read_state(path)
        except UserError:  # a damaged one, which is told when it is to be loaded
            continue
        if state.best is not None:
            named.add(BEFORE_VERSIONS if state.best_step is None else state.best_step)
    return named


class _Writing:
    """Steps of writing a folder, each done by one rank or all. Where one of them fails all raise, and nothing is left.

    Raises UserError for a disk that is full or cannot be written to.
    """

    def __init__(self, final: Path, aside: Path, ranks: Ranks) -> None:
        self._final, self._aside, self._ranks = final, aside, ranks

    def on_first(self, step: Callable[[], object]) -> None:
        """Do a step on the first rank; all call, and wait for it."""
        self.on_all(step if self._ranks.is_first else lambda: None)

    def on_all(self, step: Callable[[], object]) -> None:
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
            shutil.rmtree(self._aside, ignore_errors=True)
        raise UserError(self._told(failed, *faults[failed]))  # type: ignore[misc]

    def _told(self, rank: int, number: int, reason: str) -> str:
        who = f" by rank {rank}" if self._ranks.world_size > 1 else ""
        remedy = "free some space" if number in FULL else "see to it that it can be written to"
        earlier = complete_checkpoints(self._final.parent)
        start = f"goes on from {earlier[-1].name}, which is whole" if earlier else "begins anew"
        return (
            f"{self._final} cannot be written{who} ({reason}): {remedy} and run the same command again, which {start}"
        )


def _make_anew(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / PARTS).mkdir(parents=True)


def _write_state(folder: Path, state: TrainingState) -> None:
    """Write `folder/state.json`, whole or not at all."""
    text = json.dumps({"version": VERSION, **dataclasses.asdict(state)}, indent=1) + "\n"
    write_text(folder / STATE, text, sync=True)


def _write_whole_weights(
    folder: Path, engine: DeepSpeedEngine, model_config: ModelConfig, tokenizer: Tokenizer
) -> None:
    """Put the ranks' parts of the weights together on this host, on its CPU, and write `folder/weights`."""
    shapes = {name: whole_shape(parameter) for name, parameter in engine.module.named_parameters()}
    state = whole_weights(folder / PARTS, shapes)
    state |= {name: buffer.detach().cpu() for name, buffer in persistent_buffers(engine).items()}
    progress("writing the whole weights")
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
    return {"optimizer_step": optimizer_step(engine), "loss_scale": LossScale(engine).state()}
