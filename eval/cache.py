"""Encoded visuals on disk: they bound an evaluation's memory, and later ones with the same weights reuse them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from runtime.collectives import barrier, broadcast, gather_objects
from runtime.errors import UserError
from runtime.ranks import Ranks
from storage.files import atomic_file, temporary_path

log = logging.getLogger(__name__)

VERSION = 2  # another one makes new entries; earlier ones may be deleted
FILE_BYTES = 256 << 20  # of tokens, from which on a file is written


@dataclass(frozen=True)
class Block:
    """B encoded visuals: numbers (B,), tokens (B, F, S, D), and embeddings (B, E) float32 where the model has them.

    F is 1 with all frames' tokens in one sequence (concat), or the number of frames, each by itself.
    """

    indices: np.ndarray
    tokens: torch.Tensor
    embeddings: torch.Tensor | None = None


class CachedBlocks:
    """Blocks of this rank's visuals (those = rank mod world size), read from memory-mapped files in each iteration."""

    def __init__(self, blocks: Sequence[Block], batch_size: int, ranks: Ranks) -> None:
        self._rows = {int(visual): (block, row) for block in blocks for row, visual in enumerate(block.indices)}
        mine = sorted(visual for visual in self._rows if visual % ranks.world_size == ranks.rank)
        self._batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Block]:
        return map(self.take, self._batches)

    def take(self, visuals: Sequence[int]) -> Block:
        """The block of some visuals, at least one."""
        rows = [self._rows[visual] for visual in visuals]
        embeddings = [block.embeddings[row] for block, row in rows if block.embeddings is not None]
        tokens = torch.stack([block.tokens[row] for block, row in rows])
        return Block(np.array(visuals), tokens, torch.stack(embeddings) if embeddings else None)


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


def read_entry(folder: Path, num_visuals: int, batch_size: int, ranks: Ranks) -> CachedBlocks | None:
    """The blocks of a complete entry; None where there is none. The first rank decides for all.

    A damaged entry is removed.
    """
    blocks: list[Block] = []
    if ranks.is_first and folder.is_dir():
        try:
            blocks = _read_all(folder)
            if (found := _count(blocks)) != num_visuals:
                raise ValueError(f"it has {found:,} visuals of {num_visuals:,}")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("%s is damaged (%s): encoding again", folder, error)
            shutil.rmtree(folder)
            blocks = []
    if not broadcast(bool(blocks), ranks.world_size):
        return None
    return CachedBlocks(blocks or _read_all(folder), batch_size, ranks)


def write_entry(folder: Path, blocks: Iterable[Block], num_visuals: int, batch_size: int, ranks: Ranks) -> CachedBlocks:
    """Write all ranks' blocks and read them back; called by all ranks, on one file system.

    The entry appears complete or not at all. Where some of the `num_visuals` visuals could not be read, it is not
    kept: the next evaluation tries them again.
    """
    temporary = Path(broadcast(str(temporary_path(folder, uuid.uuid4().hex)), ranks.world_size))
    try:
        if ranks.is_first:
            os.makedirs(temporary)  # with usual permissions: others may use the entry
        barrier(ranks.world_size)
        if not temporary.is_dir():
            raise UserError(f"feature_cache={folder.parent}: ranks see different folders: use a shared one")
        own = [
            _write(temporary / f"{ranks.rank:04}-{number:06}.safetensors", block)
            for number, block in enumerate(_joined(blocks))
        ]
        names = [name for part in gather_objects(own, ranks.world_size) for name in part]
        stored = [_read(temporary / name) for name in names]
        barrier(ranks.world_size)  # a mapped file stays readable after it is removed
        if ranks.is_first and _count(stored) < num_visuals:
            log.warning("%d visuals are unreadable: not caching in %s", num_visuals - _count(stored), folder)
        elif ranks.is_first and not folder.exists():
            temporary.rename(folder)
    finally:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    return CachedBlocks(stored, batch_size, ranks)


def _joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks on the CPU, joined to larger ones: a process may map 65,530 files only."""
    waiting: list[Block] = []
    size = 0
    for block in blocks:
        embeddings = None if block.embeddings is None else block.embeddings.float().cpu()
        waiting.append(Block(block.indices, block.tokens.detach().cpu(), embeddings))
        size += block.tokens.nbytes
        if size >= FILE_BYTES:
            yield _concatenated(waiting)
            waiting, size = [], 0
    if waiting:
        yield _concatenated(waiting)


def _concatenated(blocks: Sequence[Block]) -> Block:
    embeddings = [block.embeddings for block in blocks if block.embeddings is not None]
    indices, tokens = np.concatenate([block.indices for block in blocks]), torch.cat([block.tokens for block in blocks])
    return Block(indices, tokens, torch.cat(embeddings) if embeddings else None)


def _write(path: Path, block: Block) -> str:
    tensors = {"indices": torch.from_numpy(block.indices), "tokens": block.tokens}
    if block.embeddings is not None:
        tensors["embeddings"] = block.embeddings
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)
    return path.name


def _read(path: Path) -> Block:
    tensors = load_file(path)
    return Block(tensors["indices"].numpy(), tensors["tokens"], tensors.get("embeddings"))


def _read_all(folder: Path) -> list[Block]:
    return [_read(path) for path in sorted(folder.glob("*.safetensors"))]


def _count(blocks: Sequence[Block]) -> int:
    return sum(len(block.indices) for block in blocks)
