"""Which rank is the cause of a hang, from the heartbeats of all ranks."""

import pytest

from train.job.hang import EVALUATE, LOADER, SAVE, START, STEP, Heartbeat, find_hang


def beat(rank, step, phase, seconds, silent=0.0, collective="", report=""):
    return Heartbeat(rank, f"host{rank}", 100 + rank, step, phase, seconds, collective, silent, report)


def not_started(seconds):
    return Heartbeat(1, "?", 0, 0, START, 0.0, silent=seconds)


@pytest.mark.parametrize(
    "beats",
    [
        [beat(0, 5, STEP, 2), beat(1, 5, LOADER, 3)],
        [beat(0, 5, SAVE, 3), beat(1, 5, SAVE, 900, collective="barrier")],  # rank 0 uploads
        [beat(0, 5, SAVE, 3), beat(1, 5, STEP, 900)],  # rank 1 waits on its device
        [beat(0, 5, EVALUATE, 9), beat(1, 5, EVALUATE, 500, collective="gather_rows"), beat(2, 5, EVALUATE, 2)],
        [beat(0, 0, START, 100), beat(1, 0, START, 100, collective="init_process_group")],  # longer than a step
        [not_started(500)],
    ],
)
def test_a_job_that_makes_progress_does_not_hang(beats):
    assert find_hang(beats, limit=10) == ""


@pytest.mark.parametrize("phase", [SAVE, EVALUATE])
def test_a_rank_without_progress_is_named_whatever_the_others_do(phase):
    others = [beat(rank, 5, EVALUATE, 11, collective="gather_rows") for rank in range(5)] + [beat(5, 5, STEP, 1)]
    found = find_hang([*others, beat(6, 5, phase, 12, report="evaluating images: visual 8 of 50 encoded")], limit=10)
    assert found == (
        "rank 6 (host6, process 106) made no progress for 12 s, last step 5, last report: evaluating images: visual 8 "
        "of 50 encoded; waiting for it in a collective: rank 0 in gather_rows, rank 1 in gather_rows, rank 2 in "
        "gather_rows, rank 3 in gather_rows, 1 more"
    )


WAITING = [beat(rank, 5, STEP, 11, collective="all_reduce") for rank in range(6)]


@pytest.mark.parametrize(
    ("beats", "start", "end"),
    [
        ([beat(0, 0, START, 130, report="starting: opening the corpora")],
         "rank 0 (host0, process 100) made no progress for 130 s, last report: starting: opening the corpora", ""),
        ([not_started(601)], "rank 1 did not start within 601 s after rank 0", ""),
        ([beat(0, 5, STEP, 11), beat(1, 5, STEP, 11), beat(2, 5, LOADER, 12)],
         "rank 2 (host2) has waited for its loader for 12 s after step 5: its reading or decoding hangs", ""),
        ([beat(0, 6, STEP, 11), beat(1, 5, STEP, 12), beat(2, 6, STEP, 11)],
         "no rank waits for its loader, and all have been in a step for 10 s", "ranks with the fewest steps (5): 1"),
        ([beat(0, 5, SAVE, 11, collective="barrier"), beat(1, 5, EVALUATE, 12, collective="share")],
         "no rank waits for its loader, and all have been in a collective for 10 s",
         "ranks with the fewest steps (5): 0, 1; rank 0 in barrier, rank 1 in share"),
        ([*WAITING, beat(6, 5, STEP, 12)],
         "rank 6 (host6, process 106) has been in a step for 12 s after step 5 and did not enter the collective",
         "rank 3 in all_reduce, 2 more)"),
        ([beat(0, 5, STEP, 11, collective="all_reduce"), beat(1, 4, STEP, 11, silent=12)],
         "rank 1 (host1, process 101) sent no heartbeat for 12 s, last step 4: it died or is stopped",
         "waiting for it in a collective: rank 0 in all_reduce"),
        ([beat(rank, 5, SAVE, 11, report="saving: flushing") for rank in range(64)],
         "rank 0 (host0, process 100) made no progress", "; 60 more"),
    ],
)  # fmt: skip
def test_the_cause_is_named(beats, start, end):
    found = find_hang(beats, limit=10)
    assert found.startswith(start)
    assert found.endswith(end or start)
    assert found.count("made no progress") <= 4
