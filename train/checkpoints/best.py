"""The best weights of a run: a folder for each version, so that a complete one exists at any moment.

`checkpoints/best_XXXXXXXX` holds the weights after that step; `checkpoints/best` is a link to the newest version. A
checkpoint's state names the version that was the best when it was saved. Versions that a kept checkpoint names are
kept: a run resumed from any of them finds the weights that belong to its score.
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
MARKER = "best.json"  # in a version: its step, score and split, and a unique id
WEIGHTS = "weights"
BEFORE_VERSIONS = 0  # the step given to the only best model of a run made before December 2026
_NAME = re.compile(r"best_(\d{8,})")


def best_version(folder: Path, step: int) -> Path:
    """The folder of the best weights after `step`, below a run's folder of checkpoints."""
    return folder / f"{BEST}_{step:08d}"


def best_steps(folder: Path) -> list[int]:
    """The steps of the complete versions, ascending."""
    found = [_NAME.fullmatch(path.name) for path in folder.glob(f"{BEST}_*")]
    return sorted(int(match[1]) for match in found if match)


def write_marker(version: Path, step: int, score: float | None, split: str | None) -> None:
    """Write a version's step, score and split."""
    marker = {"step": step, "split": split, "score": score, "id": uuid.uuid4().hex}
    (version / MARKER).write_text(json.dumps(marker) + "\n")


def point_to(folder: Path, step: int) -> None:
    """Point the link `best` to the version of a step, atomically; readers work without it on disks without links."""
    link = folder / BEST
    temporary = temporary_path(link, "link")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(best_version(folder, step).name)
        os.replace(temporary, link)
    except OSError as error:
        if link.is_symlink():
            link.unlink()  # it points to a version that will be removed
        log.warning("cannot create the link %s (%s): the newest %s_* has the best weights", link, error.strerror, BEST)


def keep_only(folder: Path, steps: Iterable[int]) -> None:
    """Remove the versions of all other steps."""
    for step in set(best_steps(folder)) - set(steps):
        remove_folder(best_version(folder, step))


def restore_best(folder: Path, score: float | None, step: int | None, named: Iterable[int]) -> int | None:
    """Go back to the best model that a checkpoint's state names by its score and step; returns the step.

    named: steps that the kept checkpoints name. Other versions are removed: their steps will be trained again.
    Returns None, with a warning, where the weights are missing or damaged, so that the next score is the best.
    """
    _give_version(folder)
    if score is not None:
        step = BEFORE_VERSIONS if step is None else step
        fault = weights_fault(best_version(folder, step) / WEIGHTS)
        if fault:
            log.warning("Lost the best weights (score %.2f, %s): only later scores count", score, fault)
            step = None
    if score is None or step is None:
        (folder / BEST).unlink(missing_ok=True)
        keep_only(folder, set(named) - {None})
        return None
    keep_only(folder, {*named, step})
    point_to(folder, step)
    return step


def _give_version(folder: Path) -> None:
    """Make a version of the folder `best` of runs made before there were versions."""
    old = folder / BEST
    if old.is_dir() and not old.is_symlink():
        write_marker(old, BEFORE_VERSIONS, None, None)
        os.replace(old, best_version(folder, BEFORE_VERSIONS))
