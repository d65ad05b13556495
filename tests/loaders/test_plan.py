"""The epoch plan: every unit once, the same for any number of ranks, and resumable anywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.plan import EpochPlan, check_world_size, media_schedule, rank_positions

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(lambda counts: sum(counts) > 0)
PLANS = st.builds(
    EpochPlan, COUNTS.map(tuple), st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 70), st.integers(1, 6)
)


def order(plan: EpochPlan) -> list[tuple[int, int]]:
    return list(zip(*(values.tolist() for values in plan.at(np.arange(plan.units))), strict=True))


@given(PLANS)
@settings(max_examples=150, deadline=None)
def test_every_unit_exactly_once(plan: EpochPlan) -> None:
    expected = [(shard, unit) for shard, count in enumerate(plan.counts) for unit in range(count)]
    assert sorted(order(plan)) == expected


@given(PLANS, st.integers(1, 16), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_global_batches_do_not_depend_on_the_world_size(plan: EpochPlan, world_size: int, share: int) -> None:
    batch_size = world_size * share
    whole = order(plan)
    for step in range(plan.units // batch_size):
        parts = [rank_positions(step, batch_size, rank, world_size) for rank in range(world_size)]
        assert all(len(part) == share for part in parts)
        joined = np.sort(np.concatenate(parts))
        assert joined.tolist() == list(range(step * batch_size, (step + 1) * batch_size))
        got = list(zip(*(values.tolist() for values in plan.at(joined)), strict=True))
        assert got == whole[step * batch_size : (step + 1) * batch_size]


@given(PLANS)
@settings(max_examples=50, deadline=None)
def test_lanes_are_equal_pieces_and_own_their_positions(plan: EpochPlan) -> None:
    bounds = [plan.lane_bounds(lane) for lane in range(plan.lanes)]
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
        shards, units = plan.at(positions)
        assert len({(s, u) for s, u in zip(shards.tolist(), units.tolist(), strict=True)}) == 512
        assert len(np.unique(shards)) >= 64  # a batch comes from many shards


def test_a_lane_reads_few_shards_at_a_time() -> None:
    plan = EpochPlan(tuple([100] * 640), seed=0, epoch=0, lanes=64, window_shards=2)
    shards, _ = plan.at(np.arange(0, 64 * 200, 64))  # the first 200 samples of lane 0
    assert len(np.unique(shards)) <= 3


def test_neighbours_in_a_small_corpus_are_mixed() -> None:
    plan = EpochPlan((6000,), seed=0, epoch=0)
    _, units = plan.at(np.arange(plan.units))
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
        EpochPlan((5,), 0, 0).at(np.array([5]))


def test_a_world_size_that_does_not_fit_names_sizes_that_do() -> None:
    check_world_size(128, 8, "image")
    with pytest.raises(
        ValueError, match=r"batch_size.image=100 cannot be shared equally by 8 processes: use 96 or 104"
    ):
        check_world_size(100, 8, "image")
    with pytest.raises(ValueError, match="set it to a multiple of 4"):
        check_world_size(0, 4, "video")
