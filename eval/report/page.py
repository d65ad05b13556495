"""Renders evaluation folders as one self-contained HTML page."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from eval.report.evaluations import Evaluation, find_evaluations
from eval.report.grouping import TestSet, group_test_sets
from eval.report.published import SOURCE
from eval.report.tables import bars, frame_curves, loss_curves, tables


def write_report(paths: Sequence[str | Path], output: str | Path, title: str = "Evaluation") -> Path:
    """Write the page for run or evaluation folders to `output`; returns its path. Raises as `find_evaluations`."""
    evaluations = find_evaluations(paths)
    test_sets = group_test_sets(evaluations)
    pictures, all_tables = _Pictures(), tables(test_sets)
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            evaluations=evaluations,
            tables=all_tables,
            bars={task: bars(all_tables, task) for task in ("retrieval", "questions")},
            frame_curves=frame_curves(test_sets),
            curves=loss_curves(evaluations),
            galleries=_galleries(test_sets, evaluations, pictures),
            pictures=json.dumps(pictures.data),
            source=SOURCE,
        )
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def templates() -> Environment:
    """The pages' templates; values are escaped, and a missing one is an error."""
    return Environment(
        loader=PackageLoader("eval"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


class _Pictures:
    """Every distinct picture of the page once, as a data URL."""

    def __init__(self) -> None:
        self.data: list[str] = []
        self._numbers: dict[bytes, int] = {}

    def add(self, path: Path) -> int:
        """The picture's number on the page."""
        content = path.read_bytes()
        if content not in self._numbers:
            self._numbers[content] = len(self.data)
            self.data.append("data:image/jpeg;base64," + base64.b64encode(content).decode())
        return self._numbers[content]


def _galleries(
    test_sets: Sequence[TestSet], evaluations: Sequence[Evaluation], pictures: _Pictures
) -> list[dict[str, Any]]:
    """The examples of each evaluation and test set, numbers as keys, pictures by their number on the page."""
    titles = {(member.number, member.split): each.title for each in test_sets for member in each.members}
    galleries = []
    for evaluation_number, evaluation in enumerate(evaluations):
        for split, gallery in evaluation.gallery.items():
            visuals = {}
            for number, visual in gallery["visuals"].items():
                name = visual["picture"]
                visuals[int(number)] = visual | {"picture": name and pictures.add(evaluation.folder / name)}
            texts = {int(number): text for number, text in gallery.get("texts", {}).items()}
            task = evaluation.details["splits"][split]["task"]
            test_set = titles[evaluation_number, split]
            own = {"title": evaluation.title, "test_set": test_set, "task": task, "visuals": visuals, "texts": texts}
            galleries.append({**gallery, **own})
    return galleries
