"""Encoded visuals on disk: they bound an evaluation's memory, and later ones with the same weights reuse them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from runtime.collectives import barrier, broadcast, gather_objects
from runtime.errors import UserError
from runtime.ranks import Ranks
from storage.files import temporary_path

log = logging.getLogger(__name__)

META = "meta.json"
VERSION = 1
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Block:
    """B encoded visuals: numbers (B,), tokens (B, F, S, D), and embeddings (B, E) float32 where the model has them.

    F is 1 with all frames' tokens in one sequence (concat), or the number of frames, each by itself.
    """

    indices: np.ndarray
    tokens: torch.Tensor
    embeddings: torch.Tensor | None = None


@dataclass(frozen=True)
class RankFiles:
    """The cached output of one rank: indices of its visuals in row order, their embeddings and tokens."""

    indices: np.ndarray
    embeddings: torch.Tensor | None
    tokens: torch.Tensor


class CachedBlocks:
    """Blocks of this rank's visuals (those = rank mod world size), read from disk in each iteration."""

    def __init__(self, parts: list[RankFiles], batch_size: int, ranks: Ranks) -> None:
        self._parts = parts
        self._places = {int(v): (p, row) for p, part in enumerate(parts) for row, v in enumerate(part.indices)}
        mine = sorted(visual for visual in self._places if visual % ranks.world_size == ranks.rank)
        self._batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Block]:
        return map(self.take, self._batches)

    def take(self, visuals: Sequence[int]) -> Block:
        """The block of some visuals, at least one."""
        places = [self._places[visual] for visual in visuals]
        tokens = torch.stack([self._parts[part].tokens[row] for part, row in places])
        embeddings = [self._parts[part].embeddings for part, _ in places]
        rows = [each[row] for each, (_, row) in zip(embeddings, places) if each is not None]
        return Block(np.array(visuals), tokens, torch.stack(rows) if rows else None)


def model_digest(model: nn.Module) -> str:
    """A digest of the model's weights, in the precision they have."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def entry_name(**what: Any) -> str:
    """The name of an entry: a digest of everything that the encoded visuals depend on."""
    return hashlib.sha256(json.dumps({"version": VERSION, **what}, sort_keys=True).encode()).hexdigest()[:32]


def read_entry(folder: Path, batch_size: int, ranks: Ranks) -> CachedBlocks | None:
    """The blocks of a complete entry; None where there is none. The first rank decides for all.

    A damaged entry is removed.
    """
    parts: list[RankFiles] = []
    if ranks.is_first and (folder / META).is_file():
        try:
            parts = _read_ranks(folder)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged (%s): encoding again", folder, error)
            shutil.rmtree(folder)
    if not broadcast(bool(parts), ranks.world_size):
        return None
    return CachedBlocks(parts or _read_ranks(folder), batch_size, ranks)


def write_entry(folder: Path, blocks: Iterable[Block], num_visuals: int, batch_size: int, ranks: Ranks) -> CachedBlocks:
    """Write all ranks' blocks and read them back; called by all ranks, on one file system.

    The entry appears complete or not at all. Where some of the `num_visuals` visuals could not be read, it is not
    kept: the next evaluation tries them again.
    """
    made = None
    if ranks.is_first:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = str(temporary_path(folder, uuid.uuid4().hex))
        os.mkdir(made)  # with usual permissions: others may use the entry
    temporary = Path(broadcast(made, ranks.world_size))
    if not temporary.is_dir():
        raise UserError(f"feature_cache={folder.parent}: ranks see different folders: use a shared one")
    try:
        _write_rank(temporary, ranks.rank, blocks)
        written = sum(gather_objects(len(_read_rank(temporary, ranks.rank).indices), ranks.world_size))
        parts = [_read_rank(temporary, number) for number in range(ranks.world_size)]
        barrier(ranks.world_size)  # an open file stays readable after it is removed
        if ranks.is_first and written == num_visuals and not folder.exists():
            (temporary / META).write_text(json.dumps({"version": VERSION, "parts": ranks.world_size}), encoding="utf-8")
            temporary.rename(folder)
        elif ranks.is_first and written < num_visuals:
            log.warning("%d visuals are unreadable: not caching in %s", num_visuals - written, folder)
    finally:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    return CachedBlocks(parts, batch_size, ranks)


def _write_rank(folder: Path, number: int, blocks: Iterable[Block]) -> None:
    indices: list[int] = []
    embeddings: list[torch.Tensor] = []
    shape: list[int] = []
    dtype = ""
    with (folder / f"{number:04}.tokens").open("wb") as file:
        for block in blocks:
            tokens = block.tokens.detach().cpu().contiguous()
            file.write(tokens.flatten().view(torch.uint8).numpy().tobytes())
            indices += block.indices.tolist()
            shape, dtype = list(tokens.shape[1:]), str(tokens.dtype)
            if block.embeddings is not None:
                embeddings.append(block.embeddings.float().cpu())
    np.savez(
        folder / f"{number:04}.npz",
        indices=np.array(indices, dtype=np.int64),
        shape=np.array(shape, dtype=np.int64),
        dtype=np.array(dtype),
        embeddings=torch.cat(embeddings).numpy() if embeddings else np.empty(0),
    )


def _read_ranks(folder: Path) -> list[RankFiles]:
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    return [_read_rank(folder, number) for number in range(meta["parts"])]


def _read_rank(folder: Path, number: int) -> RankFiles:
    with np.load(folder / f"{number:04}.npz") as saved:
        indices, shape, dtype, embeddings = (saved[name] for name in ("indices", "shape", "dtype", "embeddings"))
    if not len(indices):
        return RankFiles(indices, None, torch.empty(0))
    path, kind, size = folder / f"{number:04}.tokens", DTYPES[str(dtype)], len(indices) * int(np.prod(shape))
    if path.stat().st_size != size * kind.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes instead of {size * kind.itemsize:,}")
    tokens = torch.from_file(str(path), shared=False, size=size, dtype=kind).view(len(indices), *shape.tolist())
    return RankFiles(indices, torch.from_numpy(embeddings) if embeddings.size else None, tokens)
