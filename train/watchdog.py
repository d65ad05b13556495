"""Ends a job that has come to a standstill: says which rank is the cause, and at which step, instead of waiting."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from eval.gather import share
from train.ranks import Ranks

log = logging.getLogger(__name__)

LOADER, STEP, OTHER = "loader", "step", "other"
BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0  # without a sign of life a process counts as dead, or earlier where the limit is shorter
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
    silent: float = 0.0  # seconds since the sign was given, as the reader saw it


def verdict(beats: Sequence[Beat], limit: float) -> str:
    """What is wrong when a job has stood still for `limit` seconds, naming ranks and steps; empty while nothing is."""
    silent = [beat for beat in beats if beat.silent > min(limit, SILENT_SECONDS)]
    if silent:
        return "; ".join(
            f"rank {beat.rank} ({beat.host}, process {beat.pid}) has given no sign of life for {beat.silent:.0f} s, "
            f"its last step was {beat.step}: it has died or is halted"
            for beat in silent
        )
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
    behind = min(beat.step for beat in stuck)
    ranks = ", ".join(str(beat.rank) for beat in stuck if beat.step == behind)
    return (
        f"no rank is waiting for its loader, and all have been in a step for {limit:.0f} s: a collective or the device "
        f"stands still; ranks with the fewest steps ({behind}): {ranks}"
    )


class Watchdog:
    """A thread a rank that gives signs of life to the first one, which judges; all end when it finds a standstill."""

    def __init__(self, ranks: Ranks, limit: float, folder: Path, stop: Callable[[str], None] | None = None) -> None:
        """limit: seconds in which some step must be done. folder: for the stacks of all threads. All ranks call."""
        self._ranks, self._limit, self._folder = ranks, limit, folder
        self._stop = stop or self._end
        self._state = (OTHER, 0, time.monotonic())
        self._started = time.monotonic()
        self._closing = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._store = _store(ranks) if ranks.world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, what: str, step: int) -> None:
        """Note that the training thread begins with something: `LOADER`, `STEP` or `OTHER`; `step` lies behind it."""
        self._state = (what, step, time.monotonic())

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()

    def after_failure(self) -> str:
        """Which ranks have gone, when a collective has failed here; to be called by the first rank. May be empty."""
        self._closing.set()
        self._thread.join()
        if self._store is None or not self._ranks.is_first:
            return ""
        self._beats()
        time.sleep(3 * BEAT_SECONDS)
        gone = [beat for beat in self._beats() if beat.rank != self._ranks.rank and beat.silent > 2 * BEAT_SECONDS]
        return "; ".join(
            f"rank {beat.rank} ({beat.host}, process {beat.pid}) has gone, its last step was {beat.step}"
            for beat in gone
        )

    def _watch(self) -> None:
        try:
            self._beat()
            while not self._closing.wait(BEAT_SECONDS):
                self._beat()
                found = self._judgement()
                if found:
                    self._stop(found)
                    return
        except Exception as error:  # the first rank's store has gone
            if not self._closing.wait(self._limit):
                self._stop(f"rank 0 does not answer any more ({type(error).__name__}): it has died or is halted")

    def _beat(self) -> None:
        if self._store is not None:
            self._store.set(f"beat/{self._ranks.rank}", json.dumps(asdict(self._own())))

    def _own(self) -> Beat:
        doing, step, since = self._state
        return Beat(self._ranks.rank, socket.gethostname(), os.getpid(), step, doing, time.monotonic() - since)

    def _judgement(self) -> str:
        """What the first rank finds; the others read it from the store."""
        if not self._ranks.is_first:
            assert self._store is not None
            return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""
        found = verdict(self._beats(), self._limit)
        if found and self._store is not None:
            self._store.set("verdict", found)
        return found

    def _beats(self) -> list[Beat]:
        """The last sign of life of every rank."""
        if self._store is None:
            return [self._own()]
        beats, now = [], time.monotonic()
        for rank in range(self._ranks.world_size):
            key = f"beat/{rank}"
            if not self._store.check([key]):  # not even its first one
                beats.append(Beat(rank, "?", 0, 0, OTHER, 0.0, now - self._started))
                continue
            text = self._store.get(key)
            if rank not in self._seen or self._seen[rank][0] != text:
                self._seen[rank] = (text, now)
            beats.append(Beat(**{**json.loads(text), "silent": now - self._seen[rank][1]}))
        return beats

    def _end(self, found: str) -> None:
        """Tell it, write what every thread is doing, and end this process; its launcher then ends the others."""
        if self._ranks.is_first or found.startswith("rank 0 "):
            log.error("The job stands still: %s. It ends; the same command goes on from the last checkpoint", found)
        path = self._folder / f"stacks_rank_{self._ranks.rank}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        logging.shutdown()
        if self._ranks.is_first:
            time.sleep(2 * BEAT_SECONDS)  # in which the others read the verdict
        os._exit(EXIT_CODE)


def _store(ranks: Ranks) -> TCPStore:
    """A store of our own on the first rank's host: signs of life must not wait for anybody's collectives."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    timeout = timedelta(seconds=SILENT_SECONDS)
    if ranks.is_first:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        share(store.port, ranks.world_size)
        return store
    return TCPStore(host, share(None, ranks.world_size), is_master=False, timeout=timeout)
