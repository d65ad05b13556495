"""Ends a job that has come to a standstill: says which rank is the cause, and at which step, instead of waiting."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore, distributed_c10d

from eval.gather import share
from train.ranks import Ranks

log = logging.getLogger(__name__)

LOADER, STEP, OTHER = "loader", "step", "other"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0  # without a sign of life a process counts as dead, or earlier where the limit is shorter
TELL_SECONDS = 10.0  # given to the log and the folder before the process ends all the same
RANKS_TOLD = 4
EXIT_CODE = 75


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life: what it has been doing, and for how long."""

    rank: int
    host: str
    pid: int
    step: int  # the last one it has done
    doing: str
    seconds: float  # that it has been doing this
    collective: str = ""  # that one of its threads is in, such as all_reduce
    silent: float = 0.0  # seconds since the sign was given, as the reader saw it


def verdict(beats: Sequence[Beat], limit: float) -> str:
    """What is wrong when a job has stood still for `limit` seconds, naming ranks and steps; empty while nothing is."""
    inside = [beat for beat in beats if beat.doing == STEP and beat.collective]
    silent = [beat for beat in beats if beat.silent > min(limit, SILENT_SECONDS)]
    if silent:
        others = [beat for beat in inside if beat not in silent and beat.seconds > limit / 2]
        return "; ".join(
            f"rank {beat.rank} ({beat.host}, process {beat.pid}) has given no sign of life for {beat.silent:.0f} s, "
            f"its last step was {beat.step}: it has died or is halted"
            for beat in silent
        ) + (f"; waiting for it in a collective: {_in_collectives(others)}" if others else "")
    waiting = [beat for beat in beats if beat.doing == LOADER and beat.seconds > limit]
    if waiting:
        return "; ".join(
            f"rank {beat.rank} ({beat.host}) has been waiting for its loader for {beat.seconds:.0f} s after step "
            f"{beat.step}: its reading or decoding stands still"
            for beat in waiting
        )
    stuck = [beat for beat in beats if beat.doing == STEP and beat.seconds > limit]
    if not stuck or len(stuck) < len(beats):  # another rank evaluates, saves, or has just gone on
        return ""
    outside = [beat for beat in stuck if not beat.collective]
    if inside and outside:
        return "; ".join(
            f"rank {beat.rank} ({beat.host}, process {beat.pid}) has been in a step for {beat.seconds:.0f} s after "
            f"step {beat.step} without coming to the collective that others wait in ({_in_collectives(inside)}): the "
            "collective stands still for want of it, no loader does"
            for beat in outside
        )
    behind = min(beat.step for beat in stuck)
    ranks = ", ".join(str(beat.rank) for beat in stuck if beat.step == behind)
    return (
        f"no rank is waiting for its loader, and all have been in a step for {limit:.0f} s: a collective or the device "
        f"stands still; ranks with the fewest steps ({behind}): {ranks}"
        f"{f'; {_in_collectives(inside)}' if inside else ''}"
    )


def _in_collectives(beats: Sequence[Beat]) -> str:
    """Which of the ranks are in which collective: the first few, and how many more."""
    told = [f"rank {beat.rank} in {beat.collective}" for beat in beats[:RANKS_TOLD]]
    return ", ".join(told + ([f"{len(beats) - len(told)} more"] if len(beats) > len(told) else []))


def present_collective() -> str:
    """The function of torch.distributed that a thread of this process is in; empty where none is.

    A GPU's collectives are not waited for within it: there only the device is seen to stand still.
    """
    found = ""
    for frame in sys._current_frames().values():
        at: FrameType | None = frame
        while at is not None:
            if at.f_code.co_filename == distributed_c10d.__file__:
                found = at.f_code.co_name  # the outermost one is what was called
            at = at.f_back
        if found:
            break
    return found


class Watchdog:
    """A thread a rank that gives signs of life to the first one, which judges; all end when it finds a standstill."""

    def __init__(self, ranks: Ranks, limit: float, folder: Path) -> None:
        """limit: seconds in which some step must be done. folder: for the stacks of all threads. All ranks call."""
        self._ranks, self._limit, self._folder = ranks, limit, folder
        self._state = (OTHER, 0, time.monotonic())
        self._started = time.monotonic()
        self._closing = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._store: TCPStore | None = None
        self._first_host = ""
        if ranks.world_size > 1:
            self._store, self._first_host = _store(ranks)
        self._found = ""
        self._answered = self._started  # when the first rank's store last did
        self._talking = threading.Thread(target=self._talk, name="watchdog-talk", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._talking.start()
        self._thread.start()

    def doing(self, what: str, step: int) -> None:
        """Note that the training thread begins with something: `LOADER`, `STEP` or `OTHER`; `step` lies behind it."""
        self._state = (what, step, time.monotonic())

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()
        self._talking.join(2 * BEAT_SECONDS)  # longer where the first rank's host has gone

    def after_failure(self) -> str:
        """Which ranks have gone, as far as this one can tell, when a collective has failed here. May be empty."""
        time.sleep(0 if self._ranks.is_first else 3 * BEAT_SECONDS)
        first_has_gone = not self._talking.is_alive() and not self._found
        self._closing.set()
        self._thread.join()
        if self._store is None:
            return ""
        if not self._ranks.is_first:
            return f"rank 0 ({self._first_host}) has gone" if first_has_gone else ""
        self._talking.join()
        self._beats()
        time.sleep(3 * BEAT_SECONDS)
        gone = [beat for beat in self._beats() if beat.rank != self._ranks.rank and beat.silent > 2 * BEAT_SECONDS]
        return "; ".join(
            f"rank {beat.rank} ({beat.host}, process {beat.pid}) has gone, its last step was {beat.step}"
            for beat in gone
        )

    def _watch(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            found = self._found or self._unanswered()
            if found:
                self._end(found)
                return

    def _talk(self) -> None:
        """Give signs of life and hear the verdict; stands still with the first rank's host or the way there."""
        try:
            while not self._found:
                self._beat()
                self._found = self._judgement()
                self._answered = time.monotonic()
                if self._closing.wait(BEAT_SECONDS):
                    return
        except Exception as error:
            log.debug("The watchdog's store: %s", error)

    def _unanswered(self) -> str:
        """That the first rank's store does not answer any more, if so."""
        if self._talking.is_alive() and self._ranks.is_first:
            return ""
        silent = time.monotonic() - self._answered
        if silent <= min(self._limit, SILENT_SECONDS):
            return ""
        return (
            f"rank 0 ({self._first_host}) has not answered rank {self._ranks.rank} "
            f"({socket.gethostname()}) for {silent:.0f} s: it has died or is halted, or the network between them is cut"
        )

    def _beat(self) -> None:
        if self._store is not None:
            self._store.set(f"beat/{self._ranks.rank}", json.dumps(asdict(self._own())))

    def _own(self) -> Beat:
        doing, step, since = self._state
        seconds = time.monotonic() - since
        return Beat(self._ranks.rank, socket.gethostname(), os.getpid(), step, doing, seconds, present_collective())

    def _judgement(self) -> str:
        """What the first rank finds; the others read it from the store."""
        if not self._ranks.is_first:
            assert self._store is not None
            return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""
        return verdict(self._beats(), self._limit)

    def _beats(self) -> list[Beat]:
        """The last sign of life of every rank."""
        if self._store is None:
            return [self._own()]
        beats, now = [], time.monotonic()
        for rank in range(self._ranks.world_size):
            key = f"beat/{rank}"
            if not self._store.check([key]):  # not even its first one
                beats.append(Beat(rank, "?", 0, 0, OTHER, 0.0, silent=now - self._started))
                continue
            text = self._store.get(key)
            if rank not in self._seen or self._seen[rank][0] != text:
                self._seen[rank] = (text, now)
            beats.append(Beat(**{**json.loads(text), "silent": now - self._seen[rank][1]}))
        return beats

    def _end(self, found: str) -> None:
        """Tell it, write what every thread is doing, and end this process; its launcher then ends the others."""
        telling = threading.Thread(target=self._tell, args=(found,), name="watchdog-tell", daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)  # a cut network may hold up the log and the folder as well
        if self._ranks.is_first:
            time.sleep(2 * BEAT_SECONDS)  # in which the others read the verdict
        os._exit(EXIT_CODE)

    def _tell(self, found: str) -> None:
        if self._ranks.is_first or found.startswith("rank 0 "):
            log.error("The job stands still: %s. It ends; the same command goes on from the last checkpoint", found)
        path = self._folder / f"stacks_rank_{self._ranks.rank}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if self._ranks.is_first and self._store is not None:  # only now: the end of others ends what waits for them
            self._store.set("verdict", found)
        logging.shutdown()


def _store(ranks: Ranks) -> tuple[TCPStore, str]:
    """A store of our own on the first rank's host, with its name: signs of life must not wait for collectives."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    timeout = timedelta(seconds=SILENT_SECONDS)
    if ranks.is_first:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return store, share((store.port, socket.gethostname()), ranks.world_size)[1]
    port, name = share((0, ""), ranks.world_size)
    return TCPStore(host, port, is_master=False, timeout=timeout), name
