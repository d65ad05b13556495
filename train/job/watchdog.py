"""Ends a job that hangs: each rank sends heartbeats to rank 0, which names the cause; then all ranks exit."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore, distributed_c10d

from runtime.activity import begin, present_activity
from runtime.errors import UserError
from runtime.ranks import Ranks
from runtime.rendezvous import connect
from runtime.threads import thread_frames
from train.job.hang import (
    BEAT_SECONDS,
    FIRST_SECONDS,
    LOADER,
    SILENT_SECONDS,
    START,
    STEP,
    Heartbeat,
    few,
    find_hang,
    silence_limit,
    waiting_for_it,
)

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0  # given to the log and the folder before the process exits all the same
EXIT_CODE = 75
REMEDY = "run the same command to resume from the last checkpoint"

_made = 0  # watchdogs in this process, the same number on all ranks


class LostRankError(UserError):
    """Another rank is gone, which made a collective of this one fail. The message names that rank."""

    exit_code = 1


def present_collective() -> str:
    """The collective that a thread of this process waits in; empty where none does.

    A GPU's collectives do not block within PyTorch's functions: our code names those whose result it waits for
    (`runtime.activity.waiting`); of others only the device is seen to hang.
    """
    found = ""
    for frame in thread_frames().values():
        at: FrameType | None = frame
        while at is not None:
            if at.f_code.co_filename == distributed_c10d.__file__:
                found = at.f_code.co_name  # the outermost one is what was called
            at = at.f_back
        if found:
            break
    return found or present_activity().collective


class Watchdog:
    """One thread exchanges heartbeats with rank 0 over a TCPStore; another ends the process when the job hangs."""

    def __init__(self, ranks: Ranks, limit: float, folder: Path, remedy: str = REMEDY) -> None:
        """limit: seconds without a step or reported progress. folder: for the stacks of all threads. remedy: what the
        message tells the user to do. All ranks construct theirs in the same order; the constructor waits for none.
        """
        global _made
        _made += 1
        self._key = f"watchdog/{_made}"
        self._ranks, self._limit, self._folder, self._remedy = ranks, limit, folder, remedy
        self._closing, self._changed = threading.Event(), threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}  # rank -> its last heartbeat, and when that was new
        self._store: TCPStore | None = None
        self._rank_0: Heartbeat | None = None  # its last heartbeat, on other ranks
        self._cause = ""  # of the hang, as rank 0 found it
        self._started = self._answered = time.monotonic()
        self.enter(START, 0)
        if ranks.is_first and ranks.world_size > 1:
            self._store = self._listen()
        self._talking = threading.Thread(target=self._exchange, name="watchdog-exchange", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._talking.start()
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Note that the main thread enters a phase after `step` steps: `LOADER`, `STEP`, or one that reports its
        progress by `runtime.activity.progress`.
        """
        self._state = (phase, step, time.monotonic())
        begin(phase)
        if phase not in (LOADER, STEP):  # a process that is stopped now was not stopped in the step before
            self._changed.set()

    def close(self) -> None:
        """Stop watching."""
        self._stop_watching()
        self._talking.join(2 * BEAT_SECONDS)  # longer where the host of rank 0 is gone

    @contextmanager
    def reporting_lost_ranks(self) -> Iterator[None]:
        """Raise LostRankError if a RuntimeError, such as that of a collective, was caused by a rank that is gone."""
        try:
            yield
        except RuntimeError as error:
            if lost := self._lost_ranks():
                raise LostRankError(f"{lost}; exiting: {self._remedy}") from error
            raise

    def _lost_ranks(self) -> str:
        """Description of the ranks that are known to be gone."""
        time.sleep(0 if self._ranks.is_first else 3 * BEAT_SECONDS)
        rank_0_is_gone = not self._talking.is_alive() and not self._cause
        self._stop_watching()
        if self._store is None:
            return ""
        if not self._ranks.is_first:
            return f"rank 0 ({self._host_of_rank_0}) is gone" if rank_0_is_gone else ""
        self._talking.join()
        self._beats()
        time.sleep(3 * BEAT_SECONDS)
        lost = [beat for beat in self._beats() if beat.rank != self._ranks.rank and beat.silent > 2 * BEAT_SECONDS]
        return few((f"{beat.name} is gone, {beat.position}" for beat in lost), "; ")

    def _stop_watching(self) -> None:
        self._closing.set()
        self._changed.set()
        self._thread.join()

    @property
    def _host_of_rank_0(self) -> str:
        return self._rank_0.host if self._rank_0 else os.environ.get("MASTER_ADDR", "?")

    def _watch(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            if cause := self._cause or self._unanswered():
                self._exit(cause)
                return

    def _exchange(self) -> None:
        """Send heartbeats and receive the cause of a hang; blocks while the host of rank 0 does not answer."""
        try:
            if self._store is None and self._ranks.world_size > 1:
                port = int(connect(self._ranks, max(self._limit, FIRST_SECONDS)).get(self._key))
                self._store = self._open(port, is_master=False)
            while not self._cause:
                self._changed.clear()
                if self._store is not None:
                    self._store.set(f"beat/{self._ranks.rank}", json.dumps(asdict(self._own_beat())))
                self._cause = self._find_cause()
                self._changed.wait(BEAT_SECONDS)
                if self._closing.is_set():
                    return
        except Exception as error:
            log.debug("The watchdog's store: %s", error)

    def _listen(self) -> TCPStore:
        """A separate store on rank 0: heartbeats must not wait for collectives, nor outlive the watchdog."""
        store = self._open(0, is_master=True)
        connect(self._ranks, FIRST_SECONDS).set(self._key, str(store.port))
        return store

    @staticmethod
    def _open(port: int, is_master: bool) -> TCPStore:
        timeout = timedelta(seconds=SILENT_SECONDS)
        return TCPStore(os.environ["MASTER_ADDR"], port, is_master=is_master, wait_for_workers=False, timeout=timeout)

    def _unanswered(self) -> str:
        """The message that rank 0 or its store does not respond, if so."""
        silent = time.monotonic() - self._answered
        if self._ranks.is_first or silent <= silence_limit(self._limit, self._rank_0 is not None):
            return ""
        own = self._own_beat()
        return (
            f"rank 0 ({self._host_of_rank_0}) did not answer rank {own.rank} ({own.host}) for {silent:.0f} s"
            f"{f', {self._rank_0.position}' if self._rank_0 else ''}: it died or is stopped, or the network between "
            f"them failed{waiting_for_it([own] if own.collective else [])}"
        )

    def _own_beat(self) -> Heartbeat:
        phase, step, since = self._state
        activity, reports = present_activity(), phase not in (LOADER, STEP)
        return Heartbeat(
            self._ranks.rank, socket.gethostname(), os.getpid(), step, phase,
            seconds=time.monotonic() - (max(since, activity.since) if reports else since),
            collective=present_collective(),
            report=activity.text if reports else "",
        )  # fmt: skip

    def _find_cause(self) -> str:
        """The findings of rank 0; the others read them from the store."""
        if self._ranks.is_first:
            return find_hang(self._beats(), self._limit)
        assert self._store is not None
        beat = self._beat_of(0)
        if not beat.silent:
            self._rank_0, self._answered = beat, time.monotonic()
        return self._store.get("cause").decode() if self._store.check(["cause"]) else ""

    def _beats(self) -> list[Heartbeat]:
        """The last heartbeat of every rank."""
        if self._store is None:
            return [self._own_beat()]
        return [self._beat_of(rank) for rank in range(self._ranks.world_size)]

    def _beat_of(self, rank: int) -> Heartbeat:
        """The last heartbeat of a rank; silent is 0 where it is new."""
        assert self._store is not None
        key, now = f"beat/{rank}", time.monotonic()
        if not self._store.check([key]):  # not even its first one
            return Heartbeat(rank, "?", 0, 0, START, 0.0, silent=now - self._started)
        text = self._store.get(key)
        if rank not in self._seen or self._seen[rank][0] != text:
            self._seen[rank] = (text, now)
        return Heartbeat(**{**json.loads(text), "silent": now - self._seen[rank][1]})

    def _exit(self, cause: str) -> None:
        """Log the cause, write the stacks of all threads, and end this process; its launcher then ends the others."""
        logging_thread = threading.Thread(target=self._log, args=(cause,), name="watchdog-log", daemon=True)
        logging_thread.start()
        logging_thread.join(LOG_SECONDS)  # a failed network may block the log and the folder as well
        if self._ranks.is_first:
            time.sleep(2 * BEAT_SECONDS)  # in which the others read the cause
        os._exit(EXIT_CODE)

    def _log(self, cause: str) -> None:
        # Where rank 0 does not answer, rank 1 and one process of each node log.
        without_rank_0 = not self._cause and (self._ranks.rank == 1 or not self._ranks.local_rank)
        level = logging.ERROR if self._ranks.is_first or without_rank_0 else logging.DEBUG
        log.log(level, "The job hangs: %s. Exiting; %s", cause, self._remedy)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stacks_rank_{self._ranks.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if self._ranks.is_first and self._store is not None:  # only now: what waits for the others ends with them
            self._store.set("cause", cause)
        logging.shutdown()
