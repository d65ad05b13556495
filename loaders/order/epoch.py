"""The order of an epoch: a pure function of (units per shard, seed, epoch), the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import numpy as np

from runtime.errors import UserError

CHUNKS_PER_STRIPE = 8  # a corpus of few shards is cut finer, so that it mixes well too
SHARD_ORDER, WINDOW_ORDER, MEDIA_ORDER, PASS_ORDER = 1, 2, 3, 4  # what a generator is for; part of its key
NOTHING = np.zeros(0, np.int64)


def generator(seed: int, *counters: int) -> np.random.Generator:
    """A random generator that is a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's order over the units of a line of shards.

    Shards (of small corpora: pieces of shards) are permuted and form a line, which is cut into `stripes` equal pieces.
    Within its stripe a unit moves inside a window of `window_shards` shards' worth. Position p of the epoch is unit
    p // stripes of stripe p % stripes. Memory and time grow with shards and window, not with units.

    A corpus of weight w is passed over w times an epoch: epoch e holds the units e*n to (e+1)*n of its endless
    sequence of whole passes, where n is w times its units, rounded. Each pass holds each of its units once.

    counts: units in each shard, (S,). corpora: how many of the shards belong to each corpus; () means one corpus.
    weights: passes over each corpus an epoch; () means 1.
    """

    counts: tuple[int, ...]
    seed: int
    epoch: int
    stripes: int = 64
    window_shards: int = 4
    corpora: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    units: int = field(init=False)  # in the epoch
    window: int = field(init=False)  # units that a window holds
    chunks: Chunks = field(init=False, repr=False, compare=False)  # in the order of the line
    starts: np.ndarray = field(init=False, repr=False, compare=False)  # (C,) place on the line of each chunk

    def __post_init__(self) -> None:
        """Lay the permuted chunks on the line."""
        counts = np.asarray(self.counts, np.int64)
        mean = int(counts.sum()) / max(1, int(np.count_nonzero(counts)))
        object.__setattr__(self, "window", max(1, round(self.window_shards * mean)))
        chunks = self._chunks(counts)
        order = generator(self.seed, self.epoch, SHARD_ORDER).permutation(len(chunks.sizes))
        object.__setattr__(self, "chunks", chunks.at(order))
        object.__setattr__(self, "units", int(chunks.sizes.sum()))
        object.__setattr__(self, "starts", np.cumsum(self.chunks.sizes) - self.chunks.sizes)
        object.__setattr__(self, "_window", lru_cache(maxsize=2 * self.stripes)(self._permute_window))

    def _chunks(self, counts: np.ndarray) -> Chunks:
        """The chunks of the epoch's part of each corpus' passes."""
        pieces = max(1, -(-CHUNKS_PER_STRIPE * self.stripes // max(1, int(np.count_nonzero(counts)))))
        found, first_shard = [], 0
        for corpus, shards in enumerate(self.corpora or (len(counts),)):
            chunks = cut_chunks(counts[first_shard : first_shard + shards], pieces, first_shard)
            first_shard += shards
            units = int(chunks.sizes.sum())
            share = epoch_units(units, self.weights[corpus] if self.weights else 1.0)
            for number in range(self.epoch * share // max(1, units), -(-(self.epoch + 1) * share // max(1, units))):
                begin, end = self.epoch * share - number * units, (self.epoch + 1) * share - number * units
                part = replace(chunks, passes=np.full(len(chunks.sizes), number, np.int64))
                if begin > 0 or end < units:  # the pass reaches over several epochs: its own order decides which part
                    order = generator(self.seed, number, PASS_ORDER, corpus).permutation(len(part.sizes))
                    part = part.at(order).between(max(0, begin), min(units, end))
                found.append(part)
        return Chunks.joined(found)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, unit in the shard, pass over its corpus) of each position of the epoch; all arrays (P,) int64.

        Raises:
            IndexError: a position is not in 0 .. units - 1.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.units):
            raise IndexError(f"positions must be in 0 .. {self.units - 1}")
        lines = self._lines(positions % self.stripes, positions // self.stripes)
        places = np.searchsorted(self.starts, lines, side="right") - 1
        units = self.chunks.firsts[places] + lines - self.starts[places]
        return self.chunks.shards[places], units, self.chunks.passes[places]

    def stripe_bounds(self, stripe: int) -> tuple[int, int]:
        """First place on the line of a stripe, and the first one past it; stripes differ by one unit at most."""
        short, longer = divmod(self.units, self.stripes)
        first = stripe * short + min(stripe, longer)
        return first, first + short + (stripe < longer)

    def _lines(self, stripes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Places on the line of unit number `steps` of each stripe; all arrays (P,)."""
        numbers, places = np.divmod(steps, self.window)
        lines = np.empty(len(stripes), np.int64)
        for row, (stripe, number, place) in enumerate(
            zip(stripes.tolist(), numbers.tolist(), places.tolist(), strict=True)
        ):
            first, end = self.stripe_bounds(stripe)
            begin = first + number * self.window
            order = self._window(stripe, number, min(self.window, end - begin))  # type: ignore[attr-defined]
            lines[row] = begin + order[place]
        return lines

    def _permute_window(self, stripe: int, number: int, size: int) -> np.ndarray:
        return generator(self.seed, self.epoch, WINDOW_ORDER, stripe, number).permutation(size).astype(np.int32)


@dataclass(frozen=True)
class Chunks:
    """Runs of neighbouring units of a shard; all arrays (C,) int64."""

    shards: np.ndarray
    firsts: np.ndarray  # unit in the shard
    sizes: np.ndarray  # units
    passes: np.ndarray  # over their corpus

    def at(self, order: np.ndarray) -> Chunks:
        """The chunks of these numbers, in this order."""
        return Chunks(*(values[order] for values in vars(self).values()))

    def between(self, begin: int, end: int) -> Chunks:
        """What lies from the unit number `begin` to before `end` when the chunks stand in a row."""
        ends = np.cumsum(self.sizes)
        starts = ends - self.sizes
        lost = np.maximum(begin - starts, 0)
        cut = replace(self, firsts=self.firsts + lost, sizes=np.minimum(ends, end) - np.maximum(starts, begin))
        return cut.at(cut.sizes > 0)

    @staticmethod
    def joined(parts: Sequence[Chunks]) -> Chunks:
        """All of them, one after another."""
        names = [part.name for part in fields(Chunks)]
        return Chunks(*(np.concatenate([getattr(part, name) for part in parts] or [NOTHING]) for name in names))


def epoch_units(units: int, weight: float) -> int:
    """Units of a corpus in an epoch: `weight` times all of them, rounded, and of a corpus that counts at least one."""
    return max(1, round(units * weight)) if units and weight > 0 else 0


def cut_chunks(counts: np.ndarray, pieces: int, first_shard: int) -> Chunks:
    """Each shard in so many equal pieces, fewer where it has fewer units; pass 0."""
    each = np.minimum(pieces, counts)
    rows = np.repeat(np.arange(len(counts)), each)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(each) - each, each)
    firsts, ends = (number * counts[rows] // each[rows] for number in (places, places + 1))
    return Chunks(rows + first_shard, firsts, ends - firsts, np.zeros(len(rows), np.int64))


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
        raise UserError(f"batch_size.{media_type} is {batch_size}: set it to a multiple of {world_size} (processes)")
    if batch_size % world_size:
        lower, upper = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        fits = " or ".join(str(size) for size in (lower, upper) if size)
        raise UserError(
            f"batch_size.{media_type}={batch_size} cannot be shared equally by {world_size} processes: use {fits}"
        )
