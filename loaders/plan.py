"""The order of an epoch: a pure function of (units per shard, seed, epoch), the same for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

CHUNKS_PER_LANE = 8  # a corpus of few shards is cut finer, so that it mixes well too
SHARD_ORDER, WINDOW_ORDER, MEDIA_ORDER = 1, 2, 3  # what a generator is for; part of its key


def generator(seed: int, *counters: int) -> np.random.Generator:
    """A random generator that is a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's order over the units of a line of shards.

    Shards (of small corpora: pieces of shards) are permuted and form a line, which is cut into `lanes` equal pieces.
    Within its lane a unit moves inside a window of `window_shards` shards' worth. Position p of the epoch is unit
    p // lanes of lane p % lanes. Memory and time grow with the number of shards and the window, not with the units.

    counts: units in each shard, (S,).
    """

    counts: tuple[int, ...]
    seed: int
    epoch: int
    lanes: int = 64
    window_shards: int = 4
    units: int = field(init=False)  # in the epoch
    window: int = field(init=False)  # units that a window holds
    chunk_starts: np.ndarray = field(init=False, repr=False, compare=False)  # (C,) place on the line of each chunk
    chunk_shards: np.ndarray = field(init=False, repr=False, compare=False)  # (C,) its shard
    chunk_firsts: np.ndarray = field(init=False, repr=False, compare=False)  # (C,) its first unit in that shard

    def __post_init__(self) -> None:
        """Lay the permuted chunks on the line."""
        counts = np.asarray(self.counts, np.int64)
        object.__setattr__(self, "units", int(counts.sum()))
        mean = self.units / max(1, int(np.count_nonzero(counts)))
        object.__setattr__(self, "window", max(1, round(self.window_shards * mean)))
        shards, firsts, sizes = cut_chunks(counts, CHUNKS_PER_LANE * self.lanes)
        order = generator(self.seed, self.epoch, SHARD_ORDER).permutation(len(sizes))
        starts = np.concatenate([[0], np.cumsum(sizes[order])[:-1]]) if len(sizes) else np.zeros(0, np.int64)
        object.__setattr__(self, "chunk_starts", starts.astype(np.int64))
        object.__setattr__(self, "chunk_shards", shards[order])
        object.__setattr__(self, "chunk_firsts", firsts[order])
        object.__setattr__(self, "_window", lru_cache(maxsize=2 * self.lanes)(self._permute_window))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, unit in the shard) of each position of the epoch; all arrays (P,) int64.

        Raises:
            IndexError: a position is not in 0 .. units - 1.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.units):
            raise IndexError(f"positions must be in 0 .. {self.units - 1}")
        lines = self._lines(positions % self.lanes, positions // self.lanes)
        chunks = np.searchsorted(self.chunk_starts, lines, side="right") - 1
        return self.chunk_shards[chunks], self.chunk_firsts[chunks] + lines - self.chunk_starts[chunks]

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """First place on the line of a lane, and the first one past it; lanes differ by one unit at most."""
        short, longer = divmod(self.units, self.lanes)
        first = lane * short + min(lane, longer)
        return first, first + short + (lane < longer)

    def _lines(self, lanes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Places on the line of unit number `steps` of each lane; all arrays (P,)."""
        numbers, places = np.divmod(steps, self.window)
        lines = np.empty(len(lanes), np.int64)
        for row, (lane, number, place) in enumerate(
            zip(lanes.tolist(), numbers.tolist(), places.tolist(), strict=True)
        ):
            first, end = self.lane_bounds(lane)
            begin = first + number * self.window
            order = self._window(lane, number, min(self.window, end - begin))  # type: ignore[attr-defined]
            lines[row] = begin + order[place]
        return lines

    def _permute_window(self, lane: int, number: int, size: int) -> np.ndarray:
        return generator(self.seed, self.epoch, WINDOW_ORDER, lane, number).permutation(size).astype(np.int32)


def cut_chunks(counts: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shard, first unit, units) of each chunk: whole shards, or equal pieces where shards are fewer than `wanted`."""
    shards, firsts, sizes = [], [], []
    pieces = max(1, -(-wanted // max(1, int(np.count_nonzero(counts)))))
    for shard, count in enumerate(counts.tolist()):
        edges = np.linspace(0, count, min(pieces, count) + 1).astype(np.int64) if count else np.zeros(1, np.int64)
        shards.append(np.full(len(edges) - 1, shard, np.int64))
        firsts.append(edges[:-1])
        sizes.append(np.diff(edges))
    empty = [np.zeros(0, np.int64)]
    return np.concatenate(shards or empty), np.concatenate(firsts or empty), np.concatenate(sizes or empty)


def rank_positions(step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of the epoch that a rank serves in a step: those = rank (mod world size) of the global batch."""
    return np.arange(step * batch_size + rank, (step + 1) * batch_size, world_size, dtype=np.int64)


def media_schedule(steps: dict[str, int], seed: int, epoch: int) -> list[str]:
    """Media type of every step of an epoch: each type as often as it has batches, interleaved at random."""
    types = sorted(kind for kind in steps if steps[kind] > 0)
    kinds = np.repeat(np.arange(len(types)), [steps[kind] for kind in types])
    return [types[kind] for kind in generator(seed, epoch, MEDIA_ORDER).permutation(kinds)]


def check_world_size(batch_size: int, world_size: int, media_type: str) -> None:
    """Raise ValueError, with sizes that fit, unless every rank gets an equal part of a global batch."""
    if batch_size <= 0:
        raise ValueError(f"batch_size.{media_type} is {batch_size}: set it to a multiple of {world_size} (processes)")
    if batch_size % world_size:
        lower, upper = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        fits = " or ".join(str(size) for size in (lower, upper) if size)
        raise ValueError(
            f"batch_size.{media_type}={batch_size} cannot be shared equally by {world_size} processes: use {fits}"
        )
