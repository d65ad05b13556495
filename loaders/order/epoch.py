"""The order of an epoch: pure functions of (units of each shard, seed, epoch), the same for any number of ranks.

A unit is what an epoch counts: a sample, a caption or a question. Shards, or pieces of them where a corpus has few, are
permuted and laid end to end. The sequence is cut into `stripes` equal pieces. Within its stripe a unit is shuffled in a
window of `window_shards` shards' worth of units. Position p of the epoch is unit p // stripes of stripe p % stripes.
Memory and time grow with the number of shards and the size of the window, not with the number of units.

A corpus of weight w is traversed w times an epoch: epoch e holds units e*n to (e+1)*n of its endless sequence of
traversals, where n is w times its units, rounded. A traversal holds each unit once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial

import numpy as np

from runtime.errors import UserError

CHUNKS_PER_STRIPE = 8  # a corpus of few shards is cut finer, so that it mixes well too
# What a generator is for; part of its key.
SHARD_ORDER, WINDOW_ORDER, MEDIA_ORDER, TRAVERSAL_ORDER = 1, 2, 3, 4
NOTHING = np.zeros(0, np.int64)


def generator(seed: int, *counters: int) -> np.random.Generator:
    """A random generator that is a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *counters])))


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's order; see the top of this file.

    counts: units of each shard, (S,). corpora: shards of each corpus, () for one corpus of all.
    weights: traversals of each corpus an epoch, () for 1 each.
    """

    counts: tuple[int, ...]
    seed: int
    epoch: int
    stripes: int = 64
    window_shards: int = 4
    corpora: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @cached_property
    def chunks(self) -> Chunks:
        """The chunks of the epoch, C of them, in their order."""
        counts = np.asarray(self.counts, np.int64)
        pieces = max(1, -(-CHUNKS_PER_STRIPE * self.stripes // max(1, int(np.count_nonzero(counts)))))
        found, first_shard = [], 0
        for corpus, shards in enumerate(self.corpora or (len(counts),)):
            chunks = cut_chunks(counts[first_shard : first_shard + shards], pieces, first_shard)
            first_shard += shards
            share = epoch_units(int(chunks.sizes.sum()), self.weights[corpus] if self.weights else 1.0)
            found += traversals(chunks, corpus, share, self.seed, self.epoch)
        chunks = Chunks.joined(found)
        return chunks.at(generator(self.seed, self.epoch, SHARD_ORDER).permutation(len(chunks.sizes)))

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of units before each chunk, (C,) int64."""
        return np.cumsum(self.chunks.sizes) - self.chunks.sizes

    @cached_property
    def units(self) -> int:
        """Units of the epoch."""
        return int(self.chunks.sizes.sum())

    @cached_property
    def window(self) -> int:
        """Number of units in a window."""
        mean = sum(self.counts) / max(1, int(np.count_nonzero(self.counts)))
        return max(1, round(self.window_shards * mean))

    @cached_property
    def _window_order(self) -> Callable[[int, int, int], np.ndarray]:
        return lru_cache(maxsize=2 * self.stripes)(partial(window_order, self.seed, self.epoch))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, unit in the shard, traversal of its corpus) of positions (P,) of the epoch; each (P,) int64.

        Raises IndexError: a position is not in 0 .. units - 1.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.units):
            raise IndexError(f"positions must be in 0 .. {self.units - 1}")
        shuffled = np.array([self._shuffled(position) for position in positions.tolist()], np.int64)
        numbers = np.searchsorted(self.starts, shuffled, side="right") - 1
        chunks = self.chunks.at(numbers)
        return chunks.shards, chunks.firsts + shuffled - self.starts[numbers], chunks.traversals

    def _shuffled(self, position: int) -> int:
        """The unit of the sequence of chunks at a position."""
        step, stripe = divmod(position, self.stripes)
        number, offset = divmod(step, self.window)
        first, end = self.stripe_bounds(stripe)
        begin = first + number * self.window
        return begin + int(self._window_order(stripe, number, min(self.window, end - begin))[offset])

    def stripe_bounds(self, stripe: int) -> tuple[int, int]:
        """First unit of a stripe in the sequence of chunks, and the one past its last; sizes differ by one at most."""
        short, longer = divmod(self.units, self.stripes)
        first = stripe * short + min(stripe, longer)
        return first, first + short + (stripe < longer)

    def replacement(self, position: int, tried: int) -> int:
        """The position whose sample replaces `tried` bad ones: the following ones of the stripe, around its end."""
        stripe = position % self.stripes
        first, end = self.stripe_bounds(stripe)
        if end - first <= tried:  # the stripe is too short: take any other
            return (position + tried) % self.units
        return stripe + self.stripes * ((position // self.stripes + tried) % (end - first))


@dataclass(frozen=True)
class Chunks:
    """Runs of neighbouring units of a shard; all arrays (C,) int64."""

    shards: np.ndarray
    firsts: np.ndarray  # unit in the shard
    sizes: np.ndarray  # units
    traversals: np.ndarray  # of their corpus

    def at(self, order: np.ndarray) -> Chunks:
        """The chunks of these numbers, in this order."""
        return Chunks(*(values[order] for values in vars(self).values()))

    def between(self, begin: int, end: int) -> Chunks:
        """The part from unit `begin` to before `end` of the chunks laid end to end."""
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
    """Each shard of counts (S,) in `pieces` equal pieces, fewer if it has fewer units; traversal 0."""
    each = np.minimum(pieces, counts)
    rows = np.repeat(np.arange(len(counts)), each)
    numbers = np.arange(len(rows)) - np.repeat(np.cumsum(each) - each, each)
    firsts, ends = (number * counts[rows] // each[rows] for number in (numbers, numbers + 1))
    return Chunks(rows + first_shard, firsts, ends - firsts, np.zeros(len(rows), np.int64))


def traversals(chunks: Chunks, corpus: int, share: int, seed: int, epoch: int) -> list[Chunks]:
    """The units of each traversal of a corpus of these chunks in an epoch of `share` units."""
    units, found = int(chunks.sizes.sum()), []
    begin, end = epoch * share, (epoch + 1) * share
    for number in range(begin // max(1, units), -(-end // max(1, units))):
        part = replace(chunks, traversals=np.full(len(chunks.sizes), number, np.int64))
        if begin > number * units or end < (number + 1) * units:  # in parts over several epochs, in a separate order
            part = part.at(generator(seed, number, TRAVERSAL_ORDER, corpus).permutation(len(part.sizes)))
            part = part.between(max(0, begin - number * units), min(units, end - number * units))
        found.append(part)
    return found


def window_order(seed: int, epoch: int, stripe: int, number: int, size: int) -> np.ndarray:
    """A permutation (size,) int32 of the units of window `number` of a stripe."""
    return generator(seed, epoch, WINDOW_ORDER, stripe, number).permutation(size).astype(np.int32)


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
