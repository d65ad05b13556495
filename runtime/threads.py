"""What every thread of this process executes at present."""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

_lock = threading.Lock()  # of two calls the one that comes second would find the collector off, and leave it so


def thread_frames() -> dict[int, FrameType]:
    """The innermost frame of every thread, by the thread's `ident`.

    Workaround (CPython 3.11, python/cpython#106883): when a garbage collection begins within `sys._current_frames` and
    frees a `threading.local`, it waits for a lock that this call holds itself, and the process freezes.
    """
    with _lock:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if enabled:
                gc.enable()
