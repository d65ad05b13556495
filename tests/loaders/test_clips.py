"""What a step sees of a clip: frames, crops and flips."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.clips import choose_frames, clip_generator, frames_at_rate, random_window

SHARED = Path(__file__).resolve().parents[3] / "shared"
TABLE = SHARED / "golden" / "08_pure" / "tables" / "frame_indices.json"


def rng(number: int = 0) -> np.random.Generator:
    return clip_generator(1, 2, 0, 3, number)


@given(st.integers(1, 12), st.integers(1, 100), st.integers(0, 1000))
def test_random_frames_come_from_their_intervals(num_frames: int, length: int, number: int) -> None:
    chosen = choose_frames("rand", num_frames, length, 2.0, rng(number))
    assert chosen.shape == (num_frames,)
    edges = np.linspace(0, length, min(num_frames, length) + 1).astype(int)
    drawn = chosen[: len(edges) - 1]
    assert np.all((drawn >= edges[:-1]) & (drawn < edges[1:]))
    assert np.all(chosen[len(drawn) :] == drawn[-1])


def test_a_random_frame_can_be_the_last_of_its_interval() -> None:
    assert {int(choose_frames("rand", 1, 3, 2.0, rng(number))[0]) for number in range(60)} == {0, 1, 2}


def test_frames_at_a_rate_are_spread_and_never_none() -> None:
    assert choose_frames("fps1", 4, 16, 2.0).tolist() == [1, 5, 11, 15]
    assert choose_frames("fps0.01", 2, 5, 2.0).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["center", "fps", "fpsx", "fps0", "fps-1"])
def test_unknown_ways_to_choose_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        choose_frames(name, 1, 5, 2.0, rng())


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 500))
def test_windows_lie_inside_the_frame(height: int, width: int, number: int) -> None:
    window = random_window(height, width, rng(number), flip=True)
    assert window.height > 0
    assert window.width > 0
    assert 0 <= window.top <= height - window.height
    assert 0 <= window.left <= width - window.width


def test_windows_cover_half_to_all_of_the_frame_and_half_are_mirrored() -> None:
    windows = [random_window(224, 300, rng(number), flip=True) for number in range(400)]
    areas = np.array([w.height * w.width for w in windows]) / (224 * 300)
    assert areas.min() > 0.48
    assert areas.max() <= 1
    assert 0.4 < np.mean([w.flip for w in windows]) < 0.6
    assert not any(random_window(224, 300, rng(number), flip=False).flip for number in range(50))


def test_what_is_random_is_a_function_of_seed_epoch_and_unit() -> None:
    assert rng(5).random() == rng(5).random()
    assert len({clip_generator(*key).random() for key in np.ndindex(2, 3, 2, 3, 4)}) == 2 * 3 * 2 * 3 * 4


@pytest.mark.shared
@pytest.mark.parametrize("rows", [json.loads(TABLE.read_text())] if TABLE.exists() else [])
def test_frames_equal_the_official_tables(rows) -> None:
    compared = 0
    for row in rows:
        if row["sample"] == "middle" and row["fix_start"] is None:
            found = choose_frames("middle", row["num_frames"], row["vlen"], 1.0).tolist()
        elif row["sample"].startswith("fps") and row["indices"]:
            found = frames_at_rate(float(row["sample"][3:]), row["vlen"], row["input_fps"]).tolist()
            found = found[: row["max_num_frames"]] if row["max_num_frames"] > 0 else found
        else:
            continue
        assert found == row["indices"], row
        compared += 1
    assert compared > 300
