"""Stopping by a signal: a signal to any process makes all of them save at the same step and exit."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil
import torch
from torch import distributed

from runtime.activity import waiting

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WATCH_SECONDS = 0.2
LAUNCHER_TIMEOUT = 30  # seconds between deepspeed's SIGTERM and its SIGKILL
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch/distributed/run")  # in their command lines


class StopRequest:
    """Records a request to stop: after a signal, or because the launcher is gone; handles the signals as a context.

    `deepspeed` does not pass SIGTERM on to its processes; killed, it leaves them running, as `torchrun` does. They
    then stop by themselves, so that the next start finds the folder free.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.signal = 0
        self._on_request = on_request
        self._below_deepspeed = False
        self._earlier: dict[signal.Signals, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> StopRequest:
        """Handle the signals; the main thread calls."""
        self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        launchers = launcher_processes()
        self._below_deepspeed = any(_is_on_node(process) for process in launchers)
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), name="launcher-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the signals back, unless one has come: a second one must not cut short the exit."""
        self._over.set()
        if not self.signal:
            for number, handler in self._earlier.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(self, number: int) -> None:
        """Request a stop as if signal `number` had arrived."""
        if not self.signal:
            self.signal = number
            self._on_request()
            # Not here: a signal may have come while this very thread was writing to the log.
            threading.Thread(target=log.info, args=("%s", self._message()), name="stop-message", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:  # the second Ctrl-C
            raise KeyboardInterrupt
        self.request(number)

    def _message(self) -> str:
        """Logged at once: saving takes time, and the launcher may exit before."""
        name = "The launcher is gone" if self.signal == signal.SIGHUP else signal.Signals(self.signal).name
        message = f"{name}: saving after the current step, then exiting"
        if self.signal != signal.SIGINT:
            return message
        if self._below_deepspeed:
            return (
                f"{message}. `deepspeed` itself shows a traceback and returns to the prompt before that: wait for "
                f'"stopped" here. It kills processes that need more than {LAUNCHER_TIMEOUT} s'
            )
        return f"{message}; Ctrl-C again exits at once, without saving"

    def _watch(self, launchers: list[psutil.Process]) -> None:
        while not self._over.wait(WATCH_SECONDS) and not self.signal:
            if not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in launchers):
                self.request(signal.SIGHUP)
                return


def launcher_processes() -> list[psutil.Process]:
    """Ancestors that must stay alive: `deepspeed` or `torchrun` directly above this process, and the ssh connection
    (of pdsh) that started one of them. None under srun and MPI, which end their processes, or under a shell.
    """
    found: list[psutil.Process] = []
    try:
        for process in psutil.Process(os.getpid()).parents():
            remote = process.name().startswith("sshd") and bool(found) and _is_on_node(found[-1])
            if not remote and not any(name in word for word in process.cmdline()[:4] for name in LAUNCHERS):
                break
            found.append(process)
            if remote:
                break
    except psutil.Error:
        return []
    return found


def _is_on_node(process: psutil.Process) -> bool:
    """Whether it is the part of `deepspeed` that starts a node's processes, or the shell around it."""
    return any("deepspeed.launcher.launch" in word for word in process.cmdline())


@dataclass(frozen=True)
class Decision:
    """The common decision after a step: stop because of `signal` (0: continue), save a checkpoint."""

    signal: int = 0
    save: bool = False


class StopVote:
    """Brings all ranks to the same decision without waiting: the votes of a step are counted at the next step.

    gloo exchanges them while the step computes; no rank waits for its device.
    """

    def __init__(self, request: StopRequest, world_size: int) -> None:
        self._request = request
        self._alone = world_size == 1
        self._group = None if self._alone else distributed.new_group(backend="gloo")
        self._votes = torch.zeros(2, dtype=torch.int64)
        self._work: distributed.Work | None = None

    def decided(self, save: bool = False) -> Decision:
        """The common decision: one rank that must stop or wants to `save` decides for all. All call once per step."""
        if self._alone:
            return Decision(self._request.signal, save)
        result = self.close()
        self._votes.copy_(torch.tensor([self._request.signal, save]))
        self._work = distributed.all_reduce(self._votes, op=distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return result

    def close(self) -> Decision:
        """Count the vote under way, if any."""
        if self._work is None:
            return Decision()
        with waiting("vote"):
            self._work.wait()
        self._work = None
        signal, save = self._votes.tolist()
        return Decision(signal, bool(save))
