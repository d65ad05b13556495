"""The best model of a run so far: a folder for each version of it, so that there is a whole one at any moment.

`checkpoints/best_XXXXXXXX` are the weights after that step; `checkpoints/best` is a link to the newest one. A
checkpoint's state names the version that was the best when it was saved, and none that a kept checkpoint names is
removed: a run that goes on from any of them finds the weights that belong to its score.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

from model.checkpoints.files import weights_fault
from storage.files import remove_folder, temporary_path

log = logging.getLogger(__name__)

BEST = "best"
MARKER = "best.json"  # in a version: its step, score and split, and an id of this very version
WEIGHTS = "weights"
BEFORE_VERSIONS = 0  # the step by which the only best model of a run of before December 2026 is called
_NAME = re.compile(r"best_(\d{8,})")


def best_version(folder: Path, step: int) -> Path:
    """Where the weights that were the best after `step` lie below a run's folder of checkpoints."""
    return folder / f"{BEST}_{step:08d}"


def best_steps(folder: Path) -> list[int]:
    """The steps of the versions there are, ascending. What bears its final name is complete."""
    found = [_NAME.fullmatch(path.name) for path in folder.glob(f"{BEST}_*")]
    return sorted(int(match[1]) for match in found if match)


def write_marker(version: Path, step: int, score: float | None, split: str | None) -> Path:
    """Say in a version what it is; returns the file."""
    path = version / MARKER
    path.write_text(json.dumps({"step": step, "split": split, "score": score, "id": uuid.uuid4().hex}) + "\n")
    return path


def point_to(folder: Path, step: int) -> None:
    """Make `best` the version of a step, in one go; readers do without where a file system has no links."""
    link = folder / BEST
    aside = temporary_path(link, "link")
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(best_version(folder, step).name)
        os.replace(aside, link)
    except OSError as error:
        if link.is_symlink():
            link.unlink()  # it would point to what is to be removed
        log.warning("%s cannot be made a link (%s): the newest %s_* is the best model", link, error.strerror, BEST)


def keep_only(folder: Path, steps: Iterable[int]) -> None:
    """Remove the versions of all other steps."""
    for step in set(best_steps(folder)) - set(steps):
        remove_folder(best_version(folder, step))


def restore_best(folder: Path, score: float | None, step: int | None, named: Iterable[int]) -> int | None:
    """Make the best model that of a checkpoint whose state has this score and step of it; returns the step.

    named: steps that the kept checkpoints name. Other versions are removed: they belong to steps that are to be
    trained again. None, with a warning, where the weights are gone or damaged, so that the next score is the best.
    """
    _give_version(folder)
    if score is not None:
        step = BEFORE_VERSIONS if step is None else step
        fault = weights_fault(best_version(folder, step) / WEIGHTS)
        if fault:
            log.warning("The best model so far, with a score of %.2f, is lost (%s): those to come count", score, fault)
            step = None
    if score is None or step is None:
        (folder / BEST).unlink(missing_ok=True)
        keep_only(folder, set(named) - {None})
        return None
    keep_only(folder, {*named, step})
    point_to(folder, step)
    return step


def _give_version(folder: Path) -> None:
    """Make a version of the folder `best` that runs had before there were versions."""
    old = folder / BEST
    if old.is_dir() and not old.is_symlink():
        write_marker(old, BEFORE_VERSIONS, None, None)
        os.replace(old, best_version(folder, BEFORE_VERSIONS))
