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

from model.checkpoints.files import TENSORS, weights_fault
from model.checkpoints.loading import resized, save_model
from model.config import ModelConfig
from model.history import History
from preprocessing.config import Preprocessing
from preprocessing.text import Tokenizer
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
    image_res: int = 0  # of the frames trained on, by `scheduler.image_res`; 0: written before there was that setting
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
    """Raise UserError unless the sizes and headers of a checkpoint's files show that they are complete."""
    read_state(path)
    if fault := weights_fault(path / WEIGHTS):
        raise UserError(f"{path} is damaged ({fault}): remove it, an earlier one is used")
    check_shards(path / SHARDS)


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


class CheckpointWriter:
    """Writes the checkpoints and the best weights of a run; all ranks call each method at the same step.

    A folder is written under another name, flushed to the disk and then renamed, so that a crash at any moment leaves
    the earlier ones and at most an incomplete folder, which is not taken for one. Where one rank cannot write, all
    raise UserError and nothing is left.
    """

    def __init__(
        self,
        folder: Path,
        engine: DeepSpeedEngine,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        ranks: Ranks,
        preprocessing: Preprocessing | None = None,
        history: History | None = None,
    ) -> None:
        self._folder, self._engine, self._ranks = folder, engine, ranks
        self._model_config, self._tokenizer, self._preprocessing = model_config, tokenizer, preprocessing
        self._history = history or History()

    def save(self, state: TrainingState, keep: int) -> Path:
        """Write `step_XXXXXXXX` and return it; the newest `keep` are kept, with the best weights that they name."""
        final = self._folder / f"step_{state.step:08d}"
        state = replace(state, world_size=self._ranks.world_size, **_optimizer_state(self._engine))

        def prune() -> None:
            for old in complete_checkpoints(self._folder)[:-keep]:
                remove_folder(old)
            keep_only(self._folder, named_best_steps(self._folder))

        self._write(final, lambda temporary: _write_state(temporary, state), prune, self._history)
        return final

    def save_best(self, state: TrainingState, split: str, reranks: bool | None = None) -> None:
        """Keep the present weights, in single precision, as the best ones, with the score in `state`.

        reranks: whether re-ranking had that score, recorded with the weights.
        """

        def finish(temporary: Path) -> None:
            shutil.rmtree(temporary / SHARDS)
            write_marker(temporary, state.step, state.best, split)

        def prune() -> None:
            point_to(self._folder, state.step)
            keep_only(self._folder, named_best_steps(self._folder) | {state.step})

        history = replace(self._history, reranks=reranks)
        self._write(best_version(self._folder, state.step), finish, prune, history, moments=False)

    def update(self, state: TrainingState) -> Path:
        """Add the result of an evaluation to the state of the complete checkpoint at its step, and return that."""
        path = self._folder / f"step_{state.step:08d}"
        found = {name: getattr(state, name) for name in ("best", "best_step", "evaluated_epochs")}
        self._on_first_rank(path, lambda: _write_state(path, replace(read_state(path), **found)))
        return path

    def _write(
        self,
        final: Path,
        finish: Callable[[Path], None],
        prune: Callable[[], None],
        history: History,
        moments: bool = True,
    ) -> None:
        """Write the shards and the whole weights, `finish` the folder and rename it, then `prune` others."""
        temporary = temporary_path(final)

        def create() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / SHARDS).mkdir(parents=True)

        def write_own() -> None:
            path = write_shard(temporary / SHARDS, self._engine, self._ranks, moments)
            if moments:  # otherwise it is removed as soon as the whole weights are assembled
                flush(path)

        def complete() -> None:
            _write_whole_weights(
                temporary, self._engine, self._model_config, self._tokenizer, self._preprocessing, history
            )
            finish(temporary)
            flush(*(temporary / WEIGHTS).iterdir(), *temporary.iterdir(), temporary)
            replace_folder(temporary, final)
            prune()

        self._on_first_rank(final, create)
        self._on_every_rank(final, write_own)
        self._on_first_rank(final, complete)

    def _on_first_rank(self, final: Path, step: Callable[[], object]) -> None:
        self._on_every_rank(final, step if self._ranks.is_first else lambda: None)

    def _on_every_rank(self, final: Path, step: Callable[[], object]) -> None:
        """Do a step of writing `final`, and wait until all ranks have."""
        fault: tuple[int, str] | None = None
        try:
            step()
        except (OSError, SafetensorError) as error:
            number = os_error_number(error)
            if number is None:
                raise
            fault = (number, os.strerror(number))
        for rank, each in enumerate(gather_objects(fault, self._ranks.world_size)):
            if each is not None:
                if self._ranks.is_first:
                    shutil.rmtree(temporary_path(final), ignore_errors=True)
                raise UserError(self._error_text(final, rank, *each))

    def _error_text(self, final: Path, rank: int, number: int, reason: str) -> str:
        who = f" by rank {rank}" if self._ranks.world_size > 1 else ""
        remedy = "free some space" if number in FULL else "make it writable"
        earlier = complete_checkpoints(self._folder)
        start = f"continues from {earlier[-1].name}, which is complete" if earlier else "starts from the beginning"
        return f"{final} cannot be written{who} ({reason}): {remedy} and run the same command again, which {start}"


def _write_state(folder: Path, state: TrainingState) -> None:
    """Write `folder/state.json`, whole or not at all."""
    text = json.dumps({"version": VERSION, **dataclasses.asdict(state)}, indent=1) + "\n"
    write_text(folder / STATE, text, sync=True)


def _write_whole_weights(
    folder: Path,
    engine: DeepSpeedEngine,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    preprocessing: Preprocessing | None,
    history: History,
) -> None:
    """Assemble the weights of all checkpoint shards on this host's CPU, and write `folder/weights`."""
    shapes = {name: whole_shape(parameter) for name, parameter in engine.module.named_parameters()}
    state = whole_weights(folder / SHARDS, shapes)
    state |= {name: buffer.detach().cpu() for name, buffer in persistent_buffers(engine).items()}
    progress("writing the whole weights")
    (folder / WEIGHTS).mkdir()
    tokenizer.save(folder / WEIGHTS)
    save_model(state, model_config, folder / WEIGHTS, tokenizer.special_ids, preprocessing, history)


def load_checkpoint(path: Path, engine: DeepSpeedEngine) -> TrainingState:
    """Set the engine to a checkpoint, written by any number of ranks under any ZeRO stage; all ranks call.

    Position tables of another image size, and AdamW's moments of them, are resized. Returns where training was.
    """
    state = read_state(path)
    with safe_open(str(path / WEIGHTS / TENSORS), framework="pt") as file:
        names = set(file.keys())
        shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in names}
        read_shards(path / SHARDS, engine, state.optimizer_step, shapes)
        set_buffers(engine, {name: file.get_tensor(name) for name in names & persistent_buffers(engine).keys()})
    LossScale(engine).load(state.loss_scale)
    return state


def persistent_buffers(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The buffers of the module that belong to its state, by name."""
    persistent = engine.module.state_dict().keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in persistent}


def set_buffers(engine: DeepSpeedEngine, state: Mapping[str, torch.Tensor]) -> None:
    """Set the persistent buffers that `state` holds."""
    for name, buffer in persistent_buffers(engine).items():
        if name in state:
            buffer.copy_(resized(engine.module, name, state[name], buffer.shape))


def _optimizer_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The optimiser's state that belongs to no parameter."""
    return {"optimizer_step": optimizer_step(engine), "loss_scale": LossScale(engine).state()}
