"""Stopping in good order: a signal to any process makes all of them save at the same step and end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import psutil
import torch
from torch import distributed

from runtime.activity import waiting

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WATCH_SECONDS = 0.2
LAUNCHER_PATIENCE = 30  # seconds between deepspeed's SIGTERM and its SIGKILL
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch/distributed/run")  # in their command lines


class StopRequest:
    """Notes that this process was asked to stop: by a signal, or because its launcher has gone.

    `deepspeed` does not pass SIGTERM on to its processes, and dies alone when it is killed, as `torchrun` does: they
    then stop by themselves, so that the folder is free for the next start.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.signal = 0
        self._on_request = on_request
        self._below_deepspeed = False

    def install(self) -> None:
        """Begin to listen; to be called from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        launchers = launcher_processes()
        self._below_deepspeed = any(_is_on_node(process) for process in launchers)
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), name="launcher-watch", daemon=True).start()

    def request(self, number: int) -> None:
        """Ask for a stop as if signal `number` had come."""
        if not self.signal:
            self.signal = number
            self._on_request()
            # Not here: a signal may have come while this very thread was writing to the log.
            threading.Thread(target=log.info, args=("%s", self._answer()), name="stop-answer", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:  # the user is impatient
            raise KeyboardInterrupt
        self.request(number)

    def _answer(self) -> str:
        """What the user is told at once: saving takes its time, and the launcher may end before."""
        name = "The launcher has gone" if self.signal == signal.SIGHUP else signal.Signals(self.signal).name
        told = f"{name}: saving after the present step, then ending"
        if self.signal != signal.SIGINT:
            return told
        if self._below_deepspeed:
            return (
                f"{told}. `deepspeed` itself shows a traceback and returns to the prompt before that: wait for "
                f'"stopped" here. It kills processes that need more than {LAUNCHER_PATIENCE} s'
            )
        return f"{told}; Ctrl-C again ends at once, without saving"

    def _watch(self, launchers: list[psutil.Process]) -> None:
        pause = threading.Event()
        while not self.signal:
            if not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in launchers):
                self.request(signal.SIGHUP)
                return
            pause.wait(WATCH_SECONDS)


def launcher_processes() -> list[psutil.Process]:
    """What must stay alive above this process: `deepspeed` or `torchrun` directly above, and where one of them was
    started over ssh (by pdsh), that connection. None under srun and MPI, which end their processes, or under a shell.
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
    """What all ranks do after the present step: stop because of `signal` (0: go on), save."""

    signal: int = 0
    save: bool = False


class StopVote:
    """Brings all ranks to the same decision without waiting: a step's vote is counted at the next step.

    The votes travel between hosts over gloo while the step computes; no device is waited for.
    """

    def __init__(self, request: StopRequest, world_size: int) -> None:
        self._request = request
        self._alone = world_size == 1
        self._group = None if self._alone else distributed.new_group(backend="gloo")
        self._votes = torch.zeros(2, dtype=torch.int64)
        self._work: distributed.Work | None = None

    def decided(self, save: bool = False) -> Decision:
        """What all ranks do now, where one was asked to stop or wants to `save`; all ranks call once a step."""
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
