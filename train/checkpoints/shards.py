"""Checkpoint shards: a file for each rank, read back by any number of ranks under any ZeRO stage."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.building import Model
from model.checkpoints.loading import resized
from runtime.activity import progress
from runtime.errors import UserError
from runtime.ranks import Ranks
from storage.files import atomic_file
from train.deepspeed.state import (
    MOMENTS,
    WEIGHT,
    fragments,
    loading,
    owned_fragments,
    set_optimizer_step,
    whole_shape,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class StoredFragment:
    """A fragment in one of the files: elements [start, start + length) of a parameter, flattened."""

    start: int
    length: int
    file: Any  # an open safetensors file
    key: str  # without the kind
    trained: bool  # whether the file also holds its moments


def write_shard(folder: Path, engine: DeepSpeedEngine, ranks: Ranks, moments: bool = True) -> Path:
    """Write this rank's fragments to one file in `folder`; returns it. Nothing is gathered.

    moments: also AdamW's; without them the files hold the weights only.
    """
    tensors: dict[str, torch.Tensor] = {}
    for part in owned_fragments(engine):
        progress(f"copying the fragment {part.name}")
        for kind in part.kinds if moments else (WEIGHT,):
            tensors[f"{part.name}|{part.start}|{kind}"] = part.saved(kind)
    path = folder / f"rank_{ranks.rank:05}_of_{ranks.world_size:05}.safetensors"
    progress(f"writing {path.name}")
    with atomic_file(path) as temporary:
        save_file(tensors, str(temporary))
    return path


def read_shards(folder: Path, engine: DeepSpeedEngine, step: int, shapes: Mapping[str, torch.Size]) -> None:
    """Set the engine's weights and optimiser to what `write_shard` wrote, on however many ranks; all ranks call.

    step: of the optimiser. shapes: of the stored weights; those of another image size are resized.
    Raises UserError when files are damaged or lack a part of a parameter.
    """
    with _open(folder) as stored, loading(engine):
        for part in fragments(engine):
            progress(f"reading the fragment {part.name}")
            shape = whole_shape(part.parameter)
            if shapes.get(part.name, shape) != shape:
                whole = {
                    kind: _assemble(stored, part.name, kind, 0, math.prod(shapes[part.name]), folder)
                    for kind in part.kinds
                }
                whole = {kind: tensor.view(shapes[part.name]) for kind, tensor in whole.items()}
                for kind, tensor in resized_state(engine.module, part.name, whole, shape).items():
                    part.write(kind, tensor.flatten()[part.start : part.start + part.length])
                continue
            for kind in part.kinds:
                part.write(kind, _assemble(stored, part.name, kind, part.start, part.length, folder))
    set_optimizer_step(engine, step)


def resized_state(
    model: Model, name: str, stored: Mapping[str, torch.Tensor], shape: torch.Size
) -> dict[str, torch.Tensor]:
    """A position table and AdamW's moments of it, by kind, of another image size; all by the same linear map.

    So the update that AdamW would make next is resized like the table. A spline may fall below 0 between two squares:
    the second moment is kept at or above the square of the first one, which limits an update to the learning rate.
    """
    found = {kind: resized(model, name, tensor, shape) for kind, tensor in stored.items()}
    first, second = MOMENTS
    if second in found:
        found[second] = torch.maximum(found[second], found[first].square())
    return found


def check_shards(folder: Path) -> None:
    """Raise UserError unless every rank's file is there and as long as its header says."""
    with _open(folder):
        pass


def set_weights(engine: DeepSpeedEngine, state: Mapping[str, torch.Tensor]) -> None:
    """Set the engine's weights to whole ones, by name; all ranks call. The optimiser's moments stay as they are.

    Those of another image size are resized.
    """
    with loading(engine):
        for part in fragments(engine):
            whole = resized(engine.module, part.name, state[part.name], whole_shape(part.parameter))
            part.write(WEIGHT, whole.flatten()[part.start : part.start + part.length].float())


def whole_weights(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """All weights of the files in `folder`, in single precision, of these shapes."""
    weights: dict[str, torch.Tensor] = {}
    with _open(folder) as stored:
        for name, shape in shapes.items():
            progress(f"assembling {name}")
            weights[name] = _assemble(stored, name, WEIGHT, 0, math.prod(shape), folder).view(shape)
    return weights


@contextmanager
def _open(folder: Path) -> Iterator[dict[str, list[StoredFragment]]]:
    """The stored fragments of every parameter in the files of `folder`, by name and in order."""
    files = sorted(folder.glob("rank_*.safetensors"))
    wanted = int(files[0].stem.split("_")[-1]) if files else 1
    if len(files) != wanted:
        raise UserError(
            f"{folder} holds {len(files)} of {wanted} checkpoint shards: copy its checkpoint again or remove it, "
            "an earlier one is used"
        )
    with ExitStack() as stack:
        stored: dict[str, list[StoredFragment]] = defaultdict(list)
        for path in files:
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as error:
                raise UserError(f"{path} is damaged ({error}): remove its checkpoint, an earlier one is used") from None
            keys = set(file.keys())
            for key in keys:
                name, start, kind = key.split("|")
                if kind == WEIGHT:
                    length = file.get_slice(key).get_shape()[0]
                    trained = f"{name}|{start}|{MOMENTS[0]}" in keys
                    stored[name].append(StoredFragment(int(start), length, file, f"{name}|{start}|", trained))
        for found in stored.values():
            found.sort(key=lambda each: each.start)
        yield stored


def _assemble(
    stored: Mapping[str, list[StoredFragment]], name: str, kind: str, start: int, length: int, folder: Path
) -> torch.Tensor:
    """Elements [start, start + length) of a parameter's weight or moment; only these bytes are read.

    Moments of a parameter that was frozen when it was saved are zeros.
    """
    if kind != WEIGHT and name in stored and not any(each.trained for each in stored[name]):
        return torch.zeros(length)
    result, end, done = torch.empty(length), start + length, start
    for each in stored.get(name, []):
        first, last = max(done, each.start), min(end, each.start + each.length)
        if first == done and first < last:
            part = each.file.get_slice(each.key + kind)
            result[first - start : last - start] = part[first - each.start : last - each.start]
            done = last
    if done < end:
        raise UserError(f"{folder} lacks a part of {name} ({', '.join((WEIGHT, *MOMENTS))}): take another checkpoint")
    return result
