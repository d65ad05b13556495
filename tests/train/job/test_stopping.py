"""When a run saves and stops: signals, as Slurm sends them, and the clock."""

import os
import signal

import pytest
from small_run import job, learned, run_jobs

from train.job.stopping import Decision, StopRequest, StopVote


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_decided_on(number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    reported = []
    try:
        request = StopRequest(lambda: reported.append(True))
        request.install()
        vote = StopVote(request, world_size=1)
        assert vote.decided() == Decision()
        os.kill(os.getpid(), number)
        assert vote.decided() == Decision(signal=number)
        assert reported == [True]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_checkpoints_by_the_clock_are_the_same_ones_on_all_ranks(corpora, tmp_path):
    run = tmp_path / "run"
    settings = ("save_every=10000", "save_minutes=0.0001", "keep_checkpoints=100", "scheduler.epochs=1")
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", f"output_dir={run}", *settings)])
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    assert len(learned(run)) == 8
    assert saved[-1] == 8
    assert len(saved) >= 4
    assert all(len(list(path.glob("parts/*"))) == 2 for path in (run / "checkpoints").glob("step_*"))
