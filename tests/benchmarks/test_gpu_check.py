"""`benchmarks/gpu_check.py`: each check detects its fault."""

import argparse

import numpy as np
import torch

from benchmarks import decoding
from benchmarks.gpu_check import TOLERANCES, Outcome, compare, faults, race, survival
from loaders.samples import Clip, Window


def clip(grey):
    return Clip([bytes([grey])], 4, 4, Window(0, 0, 4, 4, flip=False))


def picture(clips):
    return (
        torch.tensor([clip.jpegs[0][0] for clip in clips], dtype=torch.uint8)
        .view(-1, 1, 1, 1, 1)
        .expand(-1, 1, 4, 4, 3)
    )


class Sound:
    """Decodes a byte to a picture of its grey level; 255 is damaged."""

    def decode(self, clips):
        return picture(clips).clone(), {n: "bad" for n, clip in enumerate(clips) if clip.jpegs[0][0] == 255}


class Reusing(Sound):
    """Returns the same memory each time, as a decoder whose copy is still pending."""

    def __init__(self):
        self.memory = np.zeros((2, 1, 4, 4, 3), np.uint8)

    def decode(self, clips):
        self.memory[: len(clips)] = picture(clips).numpy()
        return torch.from_numpy(self.memory[: len(clips)]), {}


class Spilling(Sound):
    """A damaged image changes the next one."""

    def decode(self, clips):
        frames, bad = super().decode(clips)
        for number in bad:
            frames[number + 1] = 0
        return frames, bad


def test_images_overwritten_by_later_batches_are_counted():
    first, others = [clip(10), clip(200)], [clip(60), clip(60)]
    assert race(Sound(), first, others, lambda: None) == 0
    assert race(Reusing(), first, others, lambda: None) == 2


def test_damaged_images_are_named_shown_or_harmful():
    batch = [clip(grey) for grey in (10, 60, 120, 180)]
    to_255 = lambda data: b"\xff"  # noqa: E731
    assert survival(Sound(), batch, to_255) == "named"
    assert survival(Sound(), batch, lambda data: b"\x01") == "shown"
    assert survival(Spilling(), batch, to_255) == "harmed"


def test_deviations_above_the_tolerance_are_faults():
    reference = Outcome({"loss_itc": 2.0, "loss_itm": 0.5}, torch.tensor([1.0, 2.0, 3.0]))
    assert compare(reference, reference, TOLERANCES["fp32"])["ok"]
    for other in (
        Outcome({"loss_itc": 2.0, "loss_itm": 0.52}, reference.gradients),
        Outcome(reference.losses, reference.gradients * 1.1),
        Outcome(reference.losses, torch.tensor([3.0, 2.0, 1.0])),
        Outcome({"loss_itc": 2.0, "loss_itm": float("nan")}, reference.gradients),
        Outcome(reference.losses, reference.gradients * float("nan")),
    ):
        found = compare(other, reference, TOLERANCES["bf16"])
        assert not found["ok"]
        assert faults({"cuda bf16": found})


def test_a_setting_that_a_gpu_refuses_is_reported_and_others_are_measured(monkeypatch):
    def made(size, threads, batch, load, fancy):
        if load == 1:
            raise RuntimeError("traceback\nno hardware decoder")
        return Sound()

    monkeypatch.setattr(decoding, "dali_decoder", made)
    monkeypatch.setattr(decoding, "cpu_decoder", lambda *_: Sound())
    options = argparse.Namespace(size=4, hw_load=[0, 1], fancy=["on"])
    decoders, failed = decoding.make_decoders(options, 1, [clip(1)])
    assert list(decoders) == ["dali load 0", "cpu"]
    assert failed == {"dali load 1": "no hardware decoder"}
