"""Renders evaluation folders as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from eval.report.evaluations import Evaluation, find_evaluations
from eval.report.gallery import data_url
from eval.report.grouping import TestSet, group_test_sets
from eval.report.published import SOURCE
from eval.report.tables import bars, frame_curves, loss_curves, origins, tables


def write_report(paths: Sequence[str | Path], output: str | Path, title: str = "Evaluation") -> Path:
    """Write the page for run or evaluation folders to `output`; returns its path. Raises as `find_evaluations`."""
    evaluations = find_evaluations(paths)
    test_sets = group_test_sets(evaluations)
    pictures: dict[str, int] = {}
    all_tables = tables(test_sets)
    page = render(
        "report.html.j2",
        title=title,
        evaluations=evaluations,
        tables=all_tables,
        origins=origins(evaluations),
        bars={task: bars(all_tables, task) for task in ("retrieval", "questions")},
        frame_curves=frame_curves(test_sets),
        curves=loss_curves(evaluations),
        galleries=_galleries(test_sets, evaluations, pictures),
        pictures=json.dumps(list(pictures)),
        source=SOURCE,
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def render(template: str, **values: Any) -> str:
    """A page from its template; values are escaped, and a missing one is an error."""
    environment = Environment(
        loader=PackageLoader("eval"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _galleries(
    test_sets: Sequence[TestSet], evaluations: Sequence[Evaluation], pictures: dict[str, int]
) -> list[dict[str, Any]]:
    """The examples of each evaluation and test set, numbers as keys.

    pictures: gets the data URL of each distinct picture, with its number on the page.
    """
    titles = {(member.number, member.split): each.title for each in test_sets for member in each.members}
    galleries = []
    for evaluation_number, evaluation in enumerate(evaluations):
        for split, gallery in evaluation.gallery.items():
            if gallery.get("examples") == {}:  # of a task without examples
                continue
            visuals = {}
            for number, visual in gallery["visuals"].items():
                picture = visual["picture"]
                if picture is not None:
                    url = data_url((evaluation.folder / picture).read_bytes())
                    picture = pictures.setdefault(url, len(pictures))
                visuals[int(number)] = visual | {"picture": picture}
            texts = {int(number): text for number, text in gallery.get("texts", {}).items()}
            task = evaluation.details["splits"][split]["task"]
            test_set = titles[evaluation_number, split]
            own = {"title": evaluation.title, "test_set": test_set, "task": task, "visuals": visuals, "texts": texts}
            galleries.append({**gallery, **own})
    return galleries
