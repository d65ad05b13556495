"""When a run saves and stops: signals, as Slurm sends them, and the clock."""

import os
import signal

import pytest
from small_run import job, learned, run_jobs

from train.job.stopping import SIGNALS, Decision, StopRequest, StopVote


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_decided_on(number):
    before = {each: signal.getsignal(each) for each in SIGNALS}
    reported = []
    try:
        with StopRequest(lambda: reported.append(True)) as request:
            vote = StopVote(request, world_size=1)
            assert vote.decided() == Decision()
            os.kill(os.getpid(), number)
            assert vote.decided() == Decision(signal=number)
        assert reported == [True]
        assert all(signal.getsignal(each) != handler for each, handler in before.items())  # it is about to exit
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_signals_that_nobody_sent_are_given_back():
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_checkpoints_by_the_clock_are_the_same_ones_on_all_ranks(corpora, tmp_path):
    run = tmp_path / "run"
    settings = ("save_every=10000", "save_minutes=0.0001", "keep_checkpoints=100", "scheduler.epochs=1")
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", f"output_dir={run}", *settings)])
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    assert len(learned(run)) == 8
    assert saved[-1] == 8
    assert len(saved) >= 4
    assert all(len(list(path.glob("parts/*"))) == 2 for path in (run / "checkpoints").glob("step_*"))
