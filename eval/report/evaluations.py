"""Finds and reads the evaluation folders that reports and comparisons are made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.errors import MissingError, UserError

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder as read back; `run` is the run's folder, which may hold loss curves.

    run_name: the run's folder name, with parent folders where several runs share it.
    """

    folder: Path
    run: Path
    metrics: dict[str, dict[str, float]]
    details: dict[str, Any]
    gallery: dict[str, Any]
    run_name: str

    @property
    def title(self) -> str:
        """The evaluation's name: as it was given, or run and label."""
        return self.details["title"] or f"{self.run_name} · {self.folder.name}"


def find_evaluations(paths: Sequence[str | Path]) -> list[Evaluation]:
    """The evaluations of run folders, or single evaluation folders, in the given order, those of a run by time.

    Raises:
        FileNotFoundError: a path has no evaluation.
        ValueError: a file in it cannot be read.
    """
    found: list[Evaluation] = []
    for path in map(Path, paths):
        folders = [path] if (path / "evaluation.json").is_file() else list(path.glob("evaluation/*/"))
        folders = [folder for folder in folders if (folder / "evaluation.json").is_file()]
        if not folders:
            raise MissingError(
                f"{path} has no evaluation (no evaluation/LABEL/evaluation.json): "
                "evaluate it first with launch/evaluate.py"
            )
        found += sorted(map(read_evaluation, folders), key=lambda e: (e.details["created"], e.folder.name))
    return _with_unique_names(list({evaluation.folder.resolve(): evaluation for evaluation in found}.values()))


def _with_unique_names(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations; runs of one name get as many parent folders as make the name unique."""
    runs = {evaluation.run.resolve().parts for evaluation in evaluations}
    names = {}
    for run in runs:
        lengths = range(1, len(run) + 1)
        length = next(n for n in lengths if sum(other[-n:] == run[-n:] for other in runs) == 1)
        names[run] = "/".join(run[-length:])
    return [replace(each, run_name=names[each.run.resolve().parts]) for each in evaluations]


def read_evaluation(folder: str | Path) -> Evaluation:
    """One evaluation folder; raises ValueError naming a file that is missing, not JSON, or of another version."""
    folder = Path(folder)
    parts = []
    for name in ("metrics.json", "evaluation.json", "gallery.json"):
        try:
            parts.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # also invalid UTF-8
            raise UserError(f"{folder / name} cannot be read ({error}): evaluate again") from None
    version = parts[1].get("version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} is an evaluation of version {version}, this program reads version {FORMAT_VERSION}: "
            "evaluate again"
        )
    run = folder.resolve().parent
    run = run.parent if run.name == "evaluation" else run
    metrics, details, gallery = parts
    return Evaluation(folder, run, metrics, details, gallery, run.name)
