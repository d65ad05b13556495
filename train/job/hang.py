"""Decides from the heartbeats of all ranks whether the job hangs, and which rank is the cause."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LOADER, STEP = "loader", "step"  # the phases of training; in all others a process reports its progress
START, SAVE, EVALUATE, END = "starting", "saving", "evaluating", "ending"
BEAT_SECONDS = 1.0  # between two heartbeats
SILENT_SECONDS = 60.0  # without a heartbeat a process counts as dead, or earlier where the limit is shorter
LEAST_SILENCE = 5 * BEAT_SECONDS
START_SECONDS = 120.0  # without progress before the first step, or the limit where it is longer: libraries are loaded
FIRST_SECONDS = 600.0  # until the first heartbeat, or the limit where it is longer: hosts do not start at once
RANKS_NAMED = 4  # in one message


@dataclass(frozen=True)
class Heartbeat:
    """The activity of a rank and its duration."""

    rank: int
    host: str
    pid: int  # 0 before its first heartbeat
    step: int  # the last one that it completed
    phase: str
    seconds: float  # since its last progress
    collective: str = ""  # that one of its threads waits in, such as all_reduce
    silent: float = 0.0  # seconds since the heartbeat, as the reader saw it
    report: str = ""  # outside of training steps: the last progress that it reported

    @property
    def name(self) -> str:
        """Rank, host and process."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def needs_no_other_rank(self) -> bool:
        """Whether it works locally, and so must report progress."""
        return self.phase not in (LOADER, STEP) and not self.collective

    @property
    def position(self) -> str:
        """The last step, and the last report if there is one."""
        step = f"last step {self.step}"
        if self.phase in (LOADER, STEP):
            return step
        return f"{f'{step}, ' if self.step else ''}last report: {self.report}"


def find_hang(beats: Sequence[Heartbeat], limit: float) -> str:
    """Why the job hangs, with ranks and steps, where it makes no progress for `limit` seconds; else empty."""
    waiting = [beat for beat in beats if beat.phase != LOADER and beat.collective]
    silent = [beat for beat in beats if beat.silent > silence_limit(limit, beat.pid > 0)]
    if silent:
        others = [beat for beat in waiting if beat not in silent and beat.seconds > limit / 2]
        return few(map(_silent, silent), "; ") + waiting_for_it(others)
    at_loader = [beat for beat in beats if beat.phase == LOADER and beat.seconds > limit]
    if at_loader:
        return "; ".join(
            f"rank {beat.rank} ({beat.host}) has waited for its loader for {beat.seconds:.0f} s after step "
            f"{beat.step}: its reading or decoding hangs"
            for beat in at_loader
        )
    stuck = [beat for beat in beats if beat.seconds > (max(limit, START_SECONDS) if beat.phase == START else limit)]
    alone = [beat for beat in stuck if beat.needs_no_other_rank]
    if alone:
        idle = (f"{beat.name} made no progress for {beat.seconds:.0f} s, {beat.position}" for beat in alone)
        return few(idle, "; ") + waiting_for_it([beat for beat in waiting if beat.seconds > limit / 2])
    if not stuck or len(stuck) < len(beats):  # another rank evaluates, saves, or has just continued
        return ""
    missing = [beat for beat in stuck if not beat.collective]
    if waiting and missing:
        return "; ".join(
            f"{beat.name} has been in a step for {beat.seconds:.0f} s after step {beat.step} and did not enter the "
            f"collective that others wait in ({_collectives(waiting)})"
            for beat in missing
        )
    return _all_stuck(stuck, waiting, limit)


def _all_stuck(stuck: Sequence[Heartbeat], waiting: Sequence[Heartbeat], limit: float) -> str:
    """All ranks are in collectives, or all wait for their devices."""
    behind = min(beat.step for beat in stuck)
    ranks = ", ".join(str(beat.rank) for beat in stuck if beat.step == behind)
    where = "in a step" if all(beat.phase == STEP for beat in stuck) else "in a collective"
    return (
        f"no rank waits for its loader, and all have been {where} for {limit:.0f} s: a collective or the device hangs; "
        f"ranks with the fewest steps ({behind}): {ranks}{f'; {_collectives(waiting)}' if waiting else ''}"
    )


def silence_limit(limit: float, has_begun: bool) -> float:
    """Seconds without a heartbeat after which a process counts as dead or stopped."""
    return max(LEAST_SILENCE, min(limit, SILENT_SECONDS)) if has_begun else max(limit, FIRST_SECONDS)


def _silent(beat: Heartbeat) -> str:
    if not beat.pid:
        return f"rank {beat.rank} did not start within {beat.silent:.0f} s after rank 0"
    return f"{beat.name} sent no heartbeat for {beat.silent:.0f} s, {beat.position}: it died or is stopped"


def waiting_for_it(beats: Sequence[Heartbeat]) -> str:
    """The end of a message: the ranks that wait for the rank it names."""
    return f"; waiting for it in a collective: {_collectives(beats)}" if beats else ""


def _collectives(beats: Sequence[Heartbeat]) -> str:
    return few((f"rank {beat.rank} in {beat.collective}" for beat in beats), ", ")


def few(texts: Iterable[str], separator: str) -> str:
    """The first few, and how many more."""
    found = list(texts)
    more = [f"{len(found) - RANKS_NAMED} more"] if len(found) > RANKS_NAMED else []
    return separator.join(found[:RANKS_NAMED] + more)
