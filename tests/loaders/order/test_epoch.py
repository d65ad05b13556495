"""The epoch plan: every unit once, the same for any number of ranks, and resumable anywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.order.epoch import EpochPlan, check_world_size, media_schedule, rank_positions

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(lambda counts: sum(counts) > 0)
PLANS = st.builds(
    EpochPlan, COUNTS.map(tuple), st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 70), st.integers(1, 6)
)


def order(plan: EpochPlan) -> list[tuple[int, int]]:
    shards, units, traversals = plan.locate(np.arange(plan.units))
    assert (traversals == plan.epoch).all() or plan.weights
    return list(zip(shards.tolist(), units.tolist(), strict=True))


@st.composite
def mixtures(draw) -> tuple[list[list[int]], dict]:
    """Units of each shard of some corpora, and the settings of a plan that gives them weights."""
    corpora = draw(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=4))
    corpora = [counts if sum(counts) else [1, *counts] for counts in corpora]
    weights = tuple(draw(st.sampled_from([0.1, 0.5, 0.7, 1.0, 1.3, 2.0, 3.25])) for _ in corpora)
    settings = {"seed": draw(st.integers(0, 99)), "stripes": draw(st.integers(1, 20)), "weights": weights}
    settings |= {"counts": tuple(itertools.chain(*corpora)), "corpora": tuple(map(len, corpora))}
    return corpora, settings


@given(PLANS)
@settings(max_examples=150, deadline=None)
def test_every_unit_exactly_once(plan: EpochPlan) -> None:
    expected = [(shard, unit) for shard, count in enumerate(plan.counts) for unit in range(count)]
    assert sorted(order(plan)) == expected


@given(PLANS, st.integers(1, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_interruptions_and_other_world_sizes_in_mid_epoch_lose_and_repeat_nothing(plan: EpochPlan, share: int, data):
    """The only state is the step: each part of the epoch is served by as many ranks as there happen to be."""
    batch_size = data.draw(st.sampled_from([1, 2, 4, 6, 8, 12, 16])) * share
    fitting = [size for size in range(1, 17) if batch_size % size == 0]
    steps, step, served = plan.units // batch_size, 0, []
    while step < steps:
        until = data.draw(st.integers(step + 1, steps))
        world_size = data.draw(st.sampled_from(fitting))
        again = EpochPlan(plan.counts, plan.seed, plan.epoch, plan.stripes, plan.window_shards)  # a new process
        for number in range(step, until):
            parts = [rank_positions(number, batch_size, rank, world_size) for rank in range(world_size)]
            assert {len(part) for part in parts} == {batch_size // world_size}
            joined = np.sort(np.concatenate(parts))  # the same global batch on any world size
            assert joined.tolist() == list(range(number * batch_size, (number + 1) * batch_size))
            served += zip(*(values.tolist() for values in again.locate(joined)[:2]), strict=True)
        step = until
    assert served == order(plan)[: steps * batch_size]
    assert len(served) == len(set(served))


@given(mixtures(), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_weights_are_whole_traversals_of_each_corpus(mixture, epochs: int) -> None:
    """Over the epochs each corpus is traversed again and again, each traversal holding each unit once."""
    corpora, settings = mixture
    plans = [EpochPlan(epoch=epoch, **settings) for epoch in range(epochs)]
    assert len({plan.units for plan in plans}) == 1
    seen = [tuple(values.tolist() for values in plan.locate(np.arange(plan.units))) for plan in plans]
    owner = np.repeat(np.arange(len(corpora)), [len(counts) for counts in corpora])
    for corpus, counts in enumerate(corpora):
        total, first = sum(counts), int(np.flatnonzero(owner == corpus)[0])
        share = max(1, round(total * settings["weights"][corpus]))
        found: dict[int, list[tuple[int, int]]] = {}
        for shards, units, traversals in seen:
            mine = [row for row, shard in enumerate(shards) if owner[shard] == corpus]
            assert len(mine) == share
            for row in mine:
                found.setdefault(traversals[row], []).append((shards[row] - first, units[row]))
        whole = [(shard, unit) for shard, count in enumerate(counts) for unit in range(count)]
        for number in range(epochs * share // total):
            assert sorted(found.pop(number)) == whole
        for rest in found.values():  # the traversal that is not over yet
            assert len(rest) == len(set(rest)) == epochs * share % total


@given(mixtures())
@settings(max_examples=50, deadline=None)
def test_weights_of_one_are_no_weights(mixture) -> None:
    _, settings = mixture
    with_weights = EpochPlan(epoch=2, **settings | {"weights": (1.0,) * len(settings["corpora"])})
    without = EpochPlan(epoch=2, **settings | {"weights": (), "corpora": ()})
    assert order(with_weights) == order(without)


def test_corpora_are_spread_over_every_part_of_an_epoch() -> None:
    plan = EpochPlan((500,) * 40, seed=1, epoch=0, corpora=(30, 10), weights=(1.0, 2.0))
    shards, _, _ = plan.locate(np.arange(plan.units))
    second = (shards >= 30).reshape(25, -1).mean(axis=1)
    assert second.mean() == 0.4
    assert np.abs(second - 0.4).max() < 0.1


@given(PLANS)
@settings(max_examples=50, deadline=None)
def test_stripes_are_equal_pieces_and_own_their_positions(plan: EpochPlan) -> None:
    bounds = [plan.stripe_bounds(stripe) for stripe in range(plan.stripes)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == plan.units
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    sizes = [end - first for first, end in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    counts = (100, 120, 80)
    first = order(EpochPlan(counts, seed=1, epoch=0))
    assert first == order(EpochPlan(counts, seed=1, epoch=0))
    assert first != order(EpochPlan(counts, seed=1, epoch=1))
    assert first != order(EpochPlan(counts, seed=2, epoch=0))


def test_a_large_corpus_costs_nothing_to_open_anywhere() -> None:
    counts = tuple([1000] * 10_000)  # ten million samples in ten thousand shards
    plan = EpochPlan(counts, seed=0, epoch=3)
    for share in (0.01, 0.5, 0.99):
        positions = np.arange(int(share * plan.units), int(share * plan.units) + 512)
        shards, units, _ = plan.locate(positions)
        assert len({(s, u) for s, u in zip(shards.tolist(), units.tolist(), strict=True)}) == 512
        assert len(np.unique(shards)) >= 64  # a batch comes from many shards


def test_a_stripe_reads_few_shards_at_a_time() -> None:
    plan = EpochPlan(tuple([100] * 640), seed=0, epoch=0, stripes=64, window_shards=2)
    shards, _, _ = plan.locate(np.arange(0, 64 * 200, 64))  # the first 200 samples of stripe 0
    assert len(np.unique(shards)) <= 3


def test_neighbours_in_a_small_corpus_are_mixed() -> None:
    plan = EpochPlan((6000,), seed=0, epoch=0)
    _, units, _ = plan.locate(np.arange(plan.units))
    assert np.abs(np.diff(units)).mean() > 1000  # 2,000 for a perfect shuffle


def test_the_schedule_holds_each_medium_as_often_as_it_has_batches() -> None:
    steps = {"image": 70, "video": 30}
    schedule = media_schedule(steps, seed=5, epoch=2)
    assert {kind: schedule.count(kind) for kind in steps} == steps
    assert schedule == media_schedule(steps, seed=5, epoch=2)
    assert schedule != media_schedule(steps, seed=5, epoch=3)
    assert media_schedule({"image": 3}, 0, 0) == ["image"] * 3


def test_positions_beyond_the_epoch_are_refused() -> None:
    with pytest.raises(IndexError):
        EpochPlan((5,), 0, 0).locate(np.array([5]))


def test_a_world_size_that_does_not_fit_names_sizes_that_do() -> None:
    check_world_size(128, 8, "image")
    with pytest.raises(
        ValueError, match=r"batch_size.image=100 cannot be shared equally by 8 processes: use 96 or 104"
    ):
        check_world_size(100, 8, "image")
    with pytest.raises(ValueError, match="set it to a multiple of 4"):
        check_world_size(0, 4, "video")
