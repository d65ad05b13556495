"""Ends a job that has come to a standstill: says which rank is the cause and what it was doing, instead of waiting."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore, distributed_c10d

from runtime.activity import begin, present_activity
from runtime.ranks import Ranks
from runtime.rendezvous import meet

log = logging.getLogger(__name__)

LOADER, STEP = "loader", "step"  # what training does most; all else is named by its reports of progress
START, SAVE, EVALUATE, END = "starting", "saving", "evaluating", "ending"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0  # without a sign of life a process counts as dead, or earlier where the limit is shorter
LEAST_SILENCE = 5 * BEAT_SECONDS
START_SECONDS = 120.0  # without progress before the first step, or longer where the limit is: libraries are loaded
FIRST_SECONDS = 600.0  # until its first sign of life, or longer where the limit is: hosts do not start at once
TELL_SECONDS = 10.0  # given to the log and the folder before the process ends all the same
RANKS_TOLD = 4
EXIT_CODE = 75
NEXT_STEP = "the same command goes on from the last checkpoint"

_made = 0  # watchdogs in this process, the same number on all ranks


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life: what it has been doing, and for how long."""

    rank: int
    host: str
    pid: int  # 0: it has not given any sign yet
    step: int  # the last one it has done
    doing: str
    seconds: float  # since its last progress
    collective: str = ""  # that one of its threads is in, such as all_reduce
    silent: float = 0.0  # seconds since the sign was given, as the reader saw it
    what: str = ""  # outside of training steps: the last progress it reported

    @property
    def name(self) -> str:
        """Rank, host and process."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def works_alone(self) -> bool:
        """Whether it does something that needs no other rank: of such work it reports progress."""
        return self.doing not in (LOADER, STEP) and not self.collective

    @property
    def where(self) -> str:
        """Where it is, in words."""
        step = f"its last step was {self.step}"
        if self.doing in (LOADER, STEP):
            return step
        return f"{f'{step}, ' if self.step else ''}its last report: {self.what}"


def verdict(beats: Sequence[Beat], limit: float) -> str:
    """What is wrong when a job has stood still for `limit` seconds, naming ranks and steps; empty while nothing is."""
    inside = [beat for beat in beats if beat.doing != LOADER and beat.collective]
    silent = [beat for beat in beats if beat.silent > silence_limit(limit, beat.pid > 0)]
    if silent:
        others = [beat for beat in inside if beat not in silent and beat.seconds > limit / 2]
        return _few(map(_gone_silent, silent), "; ") + _for_which_wait(others)
    waiting = [beat for beat in beats if beat.doing == LOADER and beat.seconds > limit]
    if waiting:
        return "; ".join(
            f"rank {beat.rank} ({beat.host}) has been waiting for its loader for {beat.seconds:.0f} s after step "
            f"{beat.step}: its reading or decoding stands still"
            for beat in waiting
        )
    stuck = [beat for beat in beats if beat.seconds > (max(limit, START_SECONDS) if beat.doing == START else limit)]
    alone = [beat for beat in stuck if beat.works_alone]
    if alone:
        others = [beat for beat in inside if beat.seconds > limit / 2]
        return _few(map(_without_progress, alone), "; ") + _for_which_wait(others)
    if not stuck or len(stuck) < len(beats):  # another rank evaluates, saves, or has just gone on
        return ""
    outside = [beat for beat in stuck if not beat.collective]
    if inside and outside:
        return "; ".join(
            f"{beat.name} has been in a step for {beat.seconds:.0f} s after "
            f"step {beat.step} without coming to the collective that others wait in ({_in_collectives(inside)}): the "
            "collective stands still for want of it, no loader does"
            for beat in outside
        )
    behind = min(beat.step for beat in stuck)
    ranks = ", ".join(str(beat.rank) for beat in stuck if beat.step == behind)
    doing = "in a step" if all(beat.doing == STEP for beat in stuck) else "in an exchange"
    return (
        f"no rank is waiting for its loader, and all have been {doing} for {limit:.0f} s: a collective or the device "
        f"stands still; ranks with the fewest steps ({behind}): {ranks}"
        f"{f'; {_in_collectives(inside)}' if inside else ''}"
    )


def silence_limit(limit: float, has_begun: bool) -> float:
    """Seconds without a sign of life after which a process counts as dead or halted."""
    return max(LEAST_SILENCE, min(limit, SILENT_SECONDS)) if has_begun else max(limit, FIRST_SECONDS)


def _gone_silent(beat: Beat) -> str:
    if not beat.pid:
        return f"rank {beat.rank} has not started {beat.silent:.0f} s after the first one"
    return f"{beat.name} has given no sign of life for {beat.silent:.0f} s, {beat.where}: it has died or is halted"


def _without_progress(beat: Beat) -> str:
    return f"{beat.name} has made no progress for {beat.seconds:.0f} s, {beat.where}"


def _for_which_wait(beats: Sequence[Beat]) -> str:
    return f"; waiting for it in a collective: {_in_collectives(beats)}" if beats else ""


def _in_collectives(beats: Sequence[Beat]) -> str:
    """Which of the ranks are in which collective: the first few, and how many more."""
    return _few((f"rank {beat.rank} in {beat.collective}" for beat in beats), ", ")


def _few(texts: Iterable[str], between: str) -> str:
    """The first few, and how many more."""
    told = list(texts)
    more = [f"{len(told) - RANKS_TOLD} more"] if len(told) > RANKS_TOLD else []
    return between.join(told[:RANKS_TOLD] + more)


def present_collective() -> str:
    """The exchange between ranks that the main thread or another one is in; empty where none is.

    A GPU's collectives are not waited for within PyTorch's functions: where our code waits for their result, it says
    so (`runtime.activity.waiting`); elsewhere only the device is seen to stand still.
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
    return found or present_activity().exchange


class Watchdog:
    """A thread a rank that gives signs of life to the first one, which judges; all end when it finds a standstill."""

    def __init__(self, ranks: Ranks, limit: float, folder: Path, remedy: str = NEXT_STEP) -> None:
        """limit: seconds in which some step must be done, or some progress be reported. folder: for the stacks of all
        threads. remedy: what the user does after the end. All ranks make theirs in the same order; none waits here.
        """
        global _made
        _made += 1
        self._key = f"watchdog/{_made}"
        self._ranks, self._limit, self._folder, self._remedy = ranks, limit, folder, remedy
        self._closing, self._changed = threading.Event(), threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._store: TCPStore | None = None
        self._first: Beat | None = None  # the first rank's last sign of life, as another one knows it
        self._found = ""
        self._started = self._answered = time.monotonic()
        self.doing(START, 0)
        if ranks.is_first and ranks.world_size > 1:
            self._store = self._listen()
        self._talking = threading.Thread(target=self._talk, name="watchdog-talk", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._talking.start()
        self._thread.start()

    def doing(self, what: str, step: int) -> None:
        """Note that the main thread begins with something: `LOADER`, `STEP` or anything else, whose progress is then
        reported by `runtime.activity.progress`; `step` lies behind it.
        """
        self._state = (what, step, time.monotonic())
        begin(what)
        if what not in (LOADER, STEP):  # a process that is halted now was not halted in the step before
            self._changed.set()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._changed.set()
        self._thread.join()
        self._talking.join(2 * BEAT_SECONDS)  # longer where the first rank's host has gone

    def after_failure(self) -> str:
        """Which ranks have gone, as far as this one can tell, when a collective has failed here. May be empty."""
        time.sleep(0 if self._ranks.is_first else 3 * BEAT_SECONDS)
        first_has_gone = not self._talking.is_alive() and not self._found
        self._closing.set()
        self._changed.set()
        self._thread.join()
        if self._store is None:
            return ""
        if not self._ranks.is_first:
            return f"rank 0 ({self._first_host}) has gone" if first_has_gone else ""
        self._talking.join()
        self._beats()
        time.sleep(3 * BEAT_SECONDS)
        gone = [beat for beat in self._beats() if beat.rank != self._ranks.rank and beat.silent > 2 * BEAT_SECONDS]
        return _few((f"{beat.name} has gone, {beat.where}" for beat in gone), "; ")

    @property
    def _first_host(self) -> str:
        return self._first.host if self._first else os.environ.get("MASTER_ADDR", "?")

    def _watch(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            found = self._found or self._unanswered()
            if found:
                self._end(found)
                return

    def _talk(self) -> None:
        """Give signs of life and hear the verdict; stands still with the first rank's host or the way there."""
        try:
            if self._store is None and self._ranks.world_size > 1:
                self._store = self._connect()
            while not self._found:
                self._changed.clear()
                self._beat()
                self._found = self._judgement()
                self._changed.wait(BEAT_SECONDS)
                if self._closing.is_set():
                    return
        except Exception as error:
            log.debug("The watchdog's store: %s", error)

    def _listen(self) -> TCPStore:
        """A store of our own in the first rank: signs of life must not wait for collectives, nor outlive it."""
        timeout = timedelta(seconds=SILENT_SECONDS)
        store = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False, timeout=timeout)
        meet(self._ranks, FIRST_SECONDS).set(self._key, str(store.port))
        return store

    def _connect(self) -> TCPStore:
        """The connection of another rank to the first one's store."""
        port = int(meet(self._ranks, max(self._limit, FIRST_SECONDS)).get(self._key))
        timeout = timedelta(seconds=SILENT_SECONDS)
        return TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timeout)

    def _unanswered(self) -> str:
        """That the first rank or its store does not answer any more, if so."""
        if self._ranks.is_first:
            return ""
        silent = time.monotonic() - self._answered
        if silent <= silence_limit(self._limit, self._first is not None):
            return ""
        own = self._own()
        return (
            f"rank 0 ({self._first_host}) has not answered rank {own.rank} ({own.host}) for {silent:.0f} s"
            f"{f', {self._first.where}' if self._first else ''}: it has died or is halted, or the network between them "
            f"is cut{_for_which_wait([own] if own.collective else [])}"
        )

    def _beat(self) -> None:
        if self._store is not None:
            self._store.set(f"beat/{self._ranks.rank}", json.dumps(asdict(self._own())))

    def _own(self) -> Beat:
        doing, step, since = self._state
        activity, alone = present_activity(), doing not in (LOADER, STEP)
        return Beat(
            self._ranks.rank, socket.gethostname(), os.getpid(), step, doing,
            seconds=time.monotonic() - (max(since, activity.since) if alone else since),
            collective=present_collective(),
            what=activity.text if alone else "",
        )  # fmt: skip

    def _judgement(self) -> str:
        """What the first rank finds; the others read it from the store."""
        if self._ranks.is_first:
            return verdict(self._beats(), self._limit)
        assert self._store is not None
        first = self._beat_of(0)
        if not first.silent:
            self._first, self._answered = first, time.monotonic()
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""

    def _beats(self) -> list[Beat]:
        """The last sign of life of every rank."""
        return [self._own()] if self._store is None else [self._beat_of(rank) for rank in range(self._ranks.world_size)]

    def _beat_of(self, rank: int) -> Beat:
        """The last sign of life of a rank; silent is 0 where it is a new one."""
        assert self._store is not None
        key, now = f"beat/{rank}", time.monotonic()
        if not self._store.check([key]):  # not even its first one
            return Beat(rank, "?", 0, 0, START, 0.0, silent=now - self._started)
        text = self._store.get(key)
        if rank not in self._seen or self._seen[rank][0] != text:
            self._seen[rank] = (text, now)
        return Beat(**{**json.loads(text), "silent": now - self._seen[rank][1]})

    def _end(self, found: str) -> None:
        """Tell it, write what every thread is doing, and end this process; its launcher then ends the others."""
        telling = threading.Thread(target=self._tell, args=(found,), name="watchdog-tell", daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)  # a cut network may hold up the log and the folder as well
        if self._ranks.is_first:
            time.sleep(2 * BEAT_SECONDS)  # in which the others read the verdict
        os._exit(EXIT_CODE)

    def _tell(self, found: str) -> None:
        without_first = not self._found and (
            self._ranks.rank == 1 or not self._ranks.local_rank
        )  # one a host is enough
        level = logging.ERROR if self._ranks.is_first or without_first else logging.DEBUG
        log.log(level, "The job stands still: %s. It ends; %s", found, self._remedy)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stacks_rank_{self._ranks.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if self._ranks.is_first and self._store is not None:  # only now: the end of others ends what waits for them
            self._store.set("verdict", found)
        logging.shutdown()
