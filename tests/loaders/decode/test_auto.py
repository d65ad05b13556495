"""decode=auto on a GPU: both decoders in turns, then the one that makes training wait less; the other is closed."""

import logging
import threading

import numpy as np
import pytest
import torch
from test_decoder import SIZE

from loaders.decode.auto import TURN, TURNS, AutoDecoder
from loaders.index import Record
from loaders.samples import DecodedSamples, whole_sample


class Clock:
    """Seconds that pass only where something takes them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A decoder that takes so many seconds of a clock."""

    def __init__(self, name: str, clock: Clock, seconds: float) -> None:
        self.name, self.clock, self.seconds = name, clock, seconds
        self.batches, self.closed = 0, False

    def decode(self, clips):
        assert not self.closed
        self.clock.now += self.seconds
        self.batches += 1
        return torch.zeros(len(clips)), {}

    def close(self) -> None:
        self.closed = True


def run(auto: AutoDecoder, clock: Clock, batches: int, step: float = 0.0) -> None:
    """Decode; training takes its batches no faster than one a step."""
    for number in range(batches):
        began = clock.now
        auto.decode([])
        clock.now = max(clock.now, began + step)
        if number == 3 * TURN + 2:  # an evaluation
            clock.now += 100


@pytest.mark.parametrize(
    ("cpu_seconds", "dali_seconds", "step", "winner"),
    [
        (0.2, 0.1, 0.0, "dali"),
        (0.1, 0.2, 0.0, "cpu"),
        (0.1, 0.099, 0.0, "cpu"),  # as fast: the GPU is left to training
        (0.05, 0.02, 0.09, "cpu"),  # both faster than the step
        (0.12, 0.02, 0.09, "dali"),  # training waits for one of them
    ],
)
def test_the_decoder_that_makes_training_wait_less_is_kept(cpu_seconds, dali_seconds, step, winner, caplog) -> None:
    clock = Clock()
    cpu, dali = Fake("cpu", clock, cpu_seconds), Fake("dali", clock, dali_seconds)
    auto = AutoDecoder(cpu, dali, clock)
    with caplog.at_level(logging.INFO, "loaders"):
        run(auto, clock, TURN * TURNS, step)
        assert (auto.name, cpu.batches, dali.batches) == ("auto", TURN * TURNS // 2, TURN * TURNS // 2)
        assert not caplog.records
        run(auto, clock, 10, step)
    assert auto.name == winner
    kept, lost = (cpu, dali) if winner == "cpu" else (dali, cpu)
    assert (kept.batches, lost.batches) == (TURN * TURNS // 2 + 10, TURN * TURNS // 2)
    assert lost.closed
    assert not kept.closed
    said = f"{max(cpu_seconds, step) * 1000:.1f} ms with cpu, {max(dali_seconds, step) * 1000:.1f} ms with dali"
    assert [said in line and f"{winner} was chosen" in line for line in caplog.messages] == [True]
    auto.close()
    assert kept.closed


def test_the_loser_is_closed_when_its_last_batch_is_done() -> None:
    clock, hold, begun = Clock(), threading.Event(), threading.Event()
    cpu, dali = Fake("cpu", clock, 0.1), Fake("dali", clock, 0.2)
    plain = dali.decode

    def slow(clips):
        if dali.batches == TURN * TURNS // 2 - 1:  # its last one
            begun.set()
            hold.wait(5)
        return plain(clips)

    dali.decode = slow  # type: ignore[method-assign]
    auto = AutoDecoder(cpu, dali, clock)
    run(auto, clock, TURN * TURNS - 1)
    last = threading.Thread(target=auto.decode, args=([],))
    last.start()
    assert begun.wait(5)
    auto.decode([])
    assert auto.name == "cpu"
    assert not dali.closed
    hold.set()
    last.join()
    assert dali.closed


def failing(clips):
    raise RuntimeError("DALI fails on cuda:0: out of memory")


def test_a_dali_that_fails_while_both_are_tried_gives_way_to_the_cpu(caplog) -> None:
    clock = Clock()
    cpu, dali = Fake("cpu", clock, 0.1), Fake("dali", clock, 0.1)
    auto = AutoDecoder(cpu, dali, clock)
    run(auto, clock, TURN)
    dali.decode = failing  # type: ignore[method-assign]
    run(auto, clock, 3)
    assert auto.name == "cpu"
    assert cpu.batches == TURN + 3  # the batch that failed among them
    assert dali.closed
    assert [line for line in caplog.messages if "switching to the CPU decoder, because DALI fails on cuda:0" in line]


@pytest.mark.parametrize("winner", ["cpu", "dali"])
def test_an_error_of_the_chosen_one_is_not_hidden(winner) -> None:
    clock = Clock()
    cpu, dali = (Fake(name, clock, 0.1 if name == winner else 0.2) for name in ("cpu", "dali"))
    auto = AutoDecoder(cpu, dali, clock)
    run(auto, clock, TURN * TURNS + 1)
    (cpu if winner == "cpu" else dali).decode = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        auto.decode([])


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_replacement_by_the_other_decoder_is_brought_to_the_batch(device: str) -> None:
    """Frames of DALI are on the GPU, those of the CPU path in pinned memory."""
    record = Record(0, 0, "", *[np.zeros(1, np.int64)] * 3, SIZE, SIZE, 1.0)
    first, other = (whole_sample(record, np.array([number])) for number in range(2))
    batch = DecodedSamples([first] * 3, torch.zeros(3, 1, 2, 2, 3, dtype=torch.uint8), {0: "bad", 2: "bad"})
    others = DecodedSamples([other] * 2, torch.full((2, 1, 2, 2, 3), 7, dtype=torch.uint8, device=device), {1: "too"})
    mended = batch.with_rows([0, 2], others)
    assert [spec.frames.tolist() for spec in mended.specs] == [[1], [0], [1]]
    assert mended.reasons == {2: "too"}
    assert mended.frames[:, 0, 0, 0, 0].tolist() == [7, 0, 7]
