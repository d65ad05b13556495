"""Random choices for a clip: frames, crops and flips."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loaders.order.choices import (
    FRAMES,
    TEXT,
    Window,
    random_numbers,
    random_windows,
    sample_keys,
    without_words,
)
from preprocessing.frames import choose_frames, random_frames


def keys(count: int, **other: int) -> np.ndarray:
    part = {"corpora": 0, "shards": 3, "traversals": 2} | other
    return sample_keys(1, units=np.arange(count), **{name: np.full(count, value) for name, value in part.items()})


def windows(height: int, width: int, count: int, flip: bool = True) -> list[Window]:
    return random_windows(np.full(count, height), np.full(count, width), keys(count), flip, least_area=0.5)


@given(st.integers(1, 12), st.integers(1, 100), st.integers(0, 1000))
def test_random_frames_come_from_their_intervals(num_frames: int, length: int, number: int) -> None:
    numbers = random_numbers(keys(number + 1)[-1:], FRAMES, num_frames)[0]
    chosen = choose_frames("rand", num_frames, length, 2.0, numbers)
    assert chosen.shape == (num_frames,)
    edges = np.linspace(0, length, min(num_frames, length) + 1).astype(int)
    drawn = chosen[: len(edges) - 1]
    assert np.all((drawn >= edges[:-1]) & (drawn < edges[1:]))
    assert np.all(chosen[len(drawn) :] == drawn[-1])


@given(st.integers(1, 12), st.lists(st.integers(1, 100), min_size=1, max_size=9))
def test_random_frames_of_a_batch_equal_those_of_single_clips(num_frames: int, lengths: list[int]) -> None:
    numbers = random_numbers(keys(len(lengths)), FRAMES, num_frames)
    found = random_frames(num_frames, np.array(lengths), numbers)
    for row, length in enumerate(lengths):
        assert found[row].tolist() == choose_frames("rand", num_frames, length, 2.0, numbers[row]).tolist()


def test_a_random_frame_can_be_the_last_of_its_interval() -> None:
    drawn = random_numbers(keys(60), FRAMES, 1)
    assert {int(choose_frames("rand", 1, 3, 2.0, numbers)[0]) for numbers in drawn} == {0, 1, 2}


def test_frames_at_a_rate_are_evenly_spread() -> None:
    assert choose_frames("fps1", 4, 16, 2.0).tolist() == [1, 5, 11, 15]
    assert choose_frames("fps0.01", 2, 5, 2.0).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["center", "fps", "fpsx", "fps0", "fps-1"])
def test_unknown_sample_types_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        choose_frames(name, 1, 5, 2.0)


@given(st.integers(1, 400), st.integers(1, 400))
def test_windows_lie_inside_the_frame(height: int, width: int) -> None:
    for window in windows(height, width, 20):
        assert window.height > 0
        assert window.width > 0
        assert 0 <= window.top <= height - window.height
        assert 0 <= window.left <= width - window.width


def test_windows_cover_half_to_all_of_the_frame_and_half_are_mirrored() -> None:
    found = windows(224, 300, 2000)
    areas = np.array([w.height * w.width for w in found]) / (224 * 300)
    assert areas.min() > 0.48
    assert areas.max() <= 1
    assert 0.46 < np.mean([w.flip for w in found]) < 0.54
    assert not any(window.flip for window in windows(224, 300, 50, flip=False))


def test_smaller_crops_are_drawn_down_to_their_least_area() -> None:
    found = random_windows(np.full(2000, 224), np.full(2000, 300), keys(2000), True, least_area=0.2)
    areas = np.array([w.height * w.width for w in found]) / (224 * 300)
    assert 0.19 < areas.min() < 0.22
    assert areas.mean() < 0.6  # of 0.5 and more: 0.7


@given(
    st.lists(st.sampled_from(["a", "dog", "in", "the", "snow"]), max_size=12), st.floats(0, 0.99), st.integers(0, 99)
)
def test_words_that_are_left_keep_their_order_and_one_is_left(words: list[str], share: float, key: int) -> None:
    text = without_words(" ".join(words), key, share).split()
    assert bool(text) == bool(words)
    assert without_words(" ".join(words), key, 0).split() == words
    rest = iter(words)
    assert all(word in rest for word in text)  # each is found behind the one before it


def test_the_share_of_words_is_left_out_and_other_ones_each_time() -> None:
    text = " ".join(map(str, range(10)))
    found = [without_words(text, int(key), 0.3).split() for key in keys(3000)]
    counts = np.bincount([int(word) for words in found for word in words], minlength=10) / 3000
    assert np.abs(counts - 0.7).max() < 0.04
    assert len({tuple(words) for words in found}) > 500


def test_windows_have_the_distribution_of_the_official_crop() -> None:
    importlib.import_module("model.torchvision_cpu")  # torchvision works then where its extension does not load
    from torchvision.transforms import RandomResizedCrop

    ours = np.array([window[:4] for window in windows(224, 224, 4000)])
    torch.manual_seed(0)
    image = torch.empty(3, 224, 224)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    for column in range(4):
        for share in (0.1, 0.5, 0.9):
            assert abs(np.quantile(ours[:, column], share) - np.quantile(theirs[:, column], share)) <= 6


def test_random_choices_are_a_function_of_seed_traversal_and_unit() -> None:
    def number(seed: int, *parts: int) -> float:
        return float(random_numbers(sample_keys(seed, *(np.array([part]) for part in parts)), TEXT, 1)[0, 0])

    assert number(1, 0, 3, 5, 2) == number(1, 0, 3, 5, 2)
    assert len({number(*key) for key in np.ndindex(2, 3, 3, 4, 2)}) == 2 * 3 * 3 * 4 * 2


def test_random_numbers_are_even_and_independent() -> None:
    numbers = random_numbers(keys(20_000), 0, 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in numbers.T])
    assert np.abs(counts - 1000).max() < 160  # five standard deviations
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.035
    assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.035  # neighbouring samples
