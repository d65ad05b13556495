"""Compares shuffle quality: our epoch order, webdataset's buffer, and a perfect shuffle, over the same shards.

    python benchmarks/shuffle.py

neighbours: distance in the shard sequence between consecutive samples, relative to a perfect shuffle; same shard: how
often consecutive samples share a shard; spread: deviation of the epoch positions of one shard's samples, relative to a
perfect shuffle, mean over shards; shards a batch: distinct ones among 128; corpora: largest difference between the
share of a corpus in the first k batches and in all, for k from 20 on. webdataset: its own `shuffle`, shuffled shards
assigned to workers whose batches alternate, as in a DataLoader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import webdataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loaders.order.epoch import EpochPlan

BATCH = 128
CORPORA = (0.7, 0.3)  # shares of the shards that belong to two corpora


def ours(shards: int, each: int, stripes: int, window: int) -> np.ndarray:
    """Sample numbers in the shard sequence, in epoch order."""
    plan = EpochPlan((each,) * shards, seed=1, epoch=0, stripes=stripes, window_shards=window)
    numbers, units, _ = plan.locate(np.arange(plan.units))
    return numbers * each + units


def webdataset_order(shards: int, each: int, buffer: int, workers: int) -> np.ndarray:
    """The same for webdataset."""
    order = np.random.default_rng(1).permutation(shards)

    def worker(number: int) -> Iterator[int]:
        samples = chain.from_iterable(
            range(shard * each, (shard + 1) * each) for shard in order[number::workers].tolist()
        )
        return iter(webdataset.shuffle(buffer, seed=number)(samples)) if buffer else samples

    streams, found = [worker(number) for number in range(workers)], []
    while streams:
        for stream in list(streams):
            batch = list(islice(stream, BATCH))
            found += batch
            if len(batch) < BATCH:
                streams.remove(stream)
    return np.array(found)


def quality(order: np.ndarray, shards: int, each: int) -> list[float]:
    """The measures of the module's docstring."""
    total = shards * each
    assert len(np.unique(order)) == total
    shard = order // each
    position = np.empty(total)
    position[order] = np.arange(total)
    whole = order[: total // BATCH * BATCH]
    first = (whole < CORPORA[0] * total).reshape(-1, BATCH).mean(axis=1)
    prefix = np.cumsum(first) / np.arange(1, len(first) + 1)
    return [
        np.abs(np.diff(order)).mean() / (total / 3),
        (np.diff(shard) == 0).mean(),
        position.reshape(shards, each).std(axis=1).mean() / (total / 12**0.5),
        np.mean([len(np.unique(batch)) for batch in (whole // each).reshape(-1, BATCH)[:500]]),
        np.abs(prefix[min(20, len(prefix) // 2) :] - CORPORA[0]).max(),
    ]


def main() -> None:
    """Print a table for a large corpus and a small one."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for shards, each in ((1000, 1000), (16, 375)):
        orders = {
            "perfect": np.random.default_rng(0).permutation(shards * each),
            "ours, 64 stripes, window 4": ours(shards, each, 64, 4),
            "ours, 64 stripes, window 16": ours(shards, each, 64, 16),
            "ours, 256 stripes, window 4": ours(shards, each, 256, 4),
        }
        for workers in (1, 8):
            for buffer in (1000, 5000):
                name = f"webdataset, buffer {buffer}, {workers} worker{'s' if workers > 1 else ''}"
                orders[name] = webdataset_order(shards, each, buffer, workers)
        print(f"\n{shards} shards of {each} samples")
        print(f"{'':<36}{'neighbours':>11}{'same shard':>11}{'spread':>8}{'shards a batch':>15}{'corpora':>9}")
        for name, order in orders.items():
            near, same, spread, mixed, prefix = quality(order, shards, each)
            print(f"{name:<36}{near:>11.3f}{same:>11.3f}{spread:>8.3f}{mixed:>15.1f}{prefix:>9.3f}")


if __name__ == "__main__":
    main()
