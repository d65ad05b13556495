"""The quarantine: samples that cannot be used, with their reasons; too many of them end the run."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

from loaders.samples import SampleSpec
from runtime.errors import UserError

log = logging.getLogger("loaders")

MIN_SAMPLES = 200  # read before the share of bad ones is checked
TOLERANCE = 3  # standard deviations above the permitted share: a few bad samples early on do not end the run


class Quarantine:
    """The bad samples that one rank met. Safe to use from several threads.

    file: JSON lines are appended to it: sample, tar, row, frames, reason, epoch, step; none when empty.
    reasons: sample -> why, in the order they were met.
    """

    def __init__(self, rank: int, max_share: float, file: str | Path | None = None) -> None:
        self.rank, self.max_share, self.file = rank, max_share, Path(file) if file else None
        self.reasons: dict[str, str] = {}
        self._unusable: dict[tuple[str, bytes], str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.reasons)

    def marked(self, spec: SampleSpec) -> SampleSpec:
        """The same sample, with the reason where its frames are known to be unusable."""
        reason = self._unusable.get(spec.pixels) if self._unusable else None
        return spec if reason is None else spec._replace(reason=reason)

    def add(self, spec: SampleSpec, tar: str, reason: str, epoch: int, step: int) -> None:
        """Note a bad sample; the first time it is logged, and written to the file."""
        with self._lock:
            self._unusable[spec.pixels] = reason
            if spec.name in self.reasons:
                return
            self.reasons[spec.name] = reason
            log.warning("rank %d: skipped %s of %s: %s", self.rank, spec.name, tar, reason)
            where = {"sample": spec.name, "tar": tar, "row": spec.record.row, "frames": spec.frames.tolist()}
            self._write({**where, "reason": reason, "epoch": epoch, "step": step, "rank": self.rank})

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s): see this log for the skipped samples", self.file, error)
            self.file = None

    def check_share(self, seen: float) -> None:
        """Raise UserError when more than `max_share` of the samples seen are bad, beyond what chance explains."""
        spread = math.sqrt(seen * self.max_share * max(0.0, 1 - self.max_share))
        if seen >= MIN_SAMPLES and len(self) > self.max_share * seen + TOLERANCE * spread:
            name, reason = list(self.reasons.items())[-1]
            raise UserError(
                f"{len(self)} of {seen:.0f} samples are unusable, more than max_bad_share={self.max_share}; "
                f"the last is {name} ({reason}): check the corpus with `python -m sharding.verify`"
            )
