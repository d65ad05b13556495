"""The frames of all threads, also while garbage waits to be collected."""

import gc
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
from places import ROOT

from runtime.threads import thread_frames

# The collection that the first allocation begins frees a threading.local.
PROGRAM = """
import gc, sys, threading
from runtime.threads import thread_frames

class Cycle:
    pass

def discard():
    cycle = Cycle()
    cycle.itself, cycle.local = cycle, threading.local()
    cycle.local.value = 1

def call(function):
    return function()

gc.disable()
spare = [{} for _ in range(200)]
discard()
del spare
gc.set_threshold(1)
gc.enable()
print(len(call(FUNCTION)))
"""


def frames_by(function):
    """What a fresh process prints that calls the function when a collection is due."""
    words = [sys.executable, "-c", PROGRAM.replace("FUNCTION", function)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout


def test_a_collection_that_is_due_does_not_freeze_the_process():
    assert frames_by("thread_frames") == "1\n"


def test_only_python_3_11_needs_the_workaround():
    """Later versions collect between two instructions only."""
    with pytest.raises(subprocess.TimeoutExpired) if sys.version_info < (3, 12) else nullcontext():
        frames_by("sys._current_frames")


@pytest.mark.parametrize("enabled", [True, False])
def test_every_thread_is_found_and_the_collector_is_left_as_it_was(enabled):
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        if not enabled:
            gc.disable()
        assert {thread.ident, threading.get_ident()} <= set(thread_frames())
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
        done.set()
        thread.join()
