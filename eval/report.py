"""One self-contained HTML page from evaluation folders: results beside chance, loss curves, queries with pictures."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from eval.charts import COLORS, Line, line_chart
from eval.metrics import RECALL_AT
from eval.tables import format_table

COLUMNS = [*(f"img_r{k}" for k in RECALL_AT), *(f"txt_r{k}" for k in RECALL_AT), "r_mean"]
LOSSES = {"loss": "total", "loss_itc": "contrast", "loss_itm": "matching", "loss_mlm": "masked words"}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation folder as read back; `run` is the run's folder, which may hold loss curves."""

    folder: Path
    run: Path
    metrics: dict[str, dict[str, float]]
    details: dict[str, Any]
    gallery: dict[str, Any]

    @property
    def title(self) -> str:
        """The evaluation's name: as it was given, or run and label."""
        return self.details["title"] or f"{self.run.name} · {self.folder.name}"


def find_evaluations(paths: Sequence[str | Path]) -> list[Evaluation]:
    """The evaluations of run folders, or single evaluation folders, in the given order, those of a run by time.

    Raises:
        FileNotFoundError: a path holds no evaluation.
        ValueError: a file in it cannot be read.
    """
    found: list[Evaluation] = []
    for path in map(Path, paths):
        folders = [path] if (path / "evaluation.json").is_file() else list(path.glob("evaluation/*/"))
        folders = [folder for folder in folders if (folder / "evaluation.json").is_file()]
        if not folders:
            raise FileNotFoundError(
                f"{path} holds no evaluation (no evaluation/LABEL/evaluation.json): "
                "evaluate it first with launch/evaluate.py"
            )
        found += sorted(map(read_evaluation, folders), key=lambda e: (e.details["created"], e.folder.name))
    return found


def read_evaluation(folder: str | Path) -> Evaluation:
    """One evaluation folder; raises ValueError naming a file that is missing or no JSON."""
    folder = Path(folder)
    parts = []
    for name in ("metrics.json", "evaluation.json", "gallery.json"):
        try:
            parts.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / name} cannot be read ({error}): evaluate again") from None
    run = folder.resolve().parent
    return Evaluation(folder, run.parent if run.name == "evaluation" else run, *parts)


def write_report(paths: Sequence[str | Path], output: str | Path, title: str = "Evaluation") -> Path:
    """Write the page for run or evaluation folders to `output`; returns its path. Raises as `find_evaluations`."""
    evaluations = find_evaluations(paths)
    environment = Environment(
        loader=PackageLoader("eval"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures, tables = _Pictures(), _tables(evaluations)
    page = environment.get_template("report.html.j2").render(
        title=title,
        evaluations=evaluations,
        columns=COLUMNS,
        tables=tables,
        bars=_bars(tables, "img_r1"),
        curves=_loss_curves(evaluations),
        galleries=_galleries(evaluations, pictures),
        pictures=json.dumps(pictures.data),
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


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


def _galleries(evaluations: Sequence[Evaluation], pictures: _Pictures) -> list[dict[str, Any]]:
    """The queries of each evaluation and test set, numbers as keys, pictures by their number on the page."""
    galleries = []
    for evaluation in evaluations:
        for split, gallery in evaluation.gallery.items():
            visuals = {}
            for number, visual in gallery["visuals"].items():
                name = visual["picture"]
                visuals[int(number)] = visual | {"picture": name and pictures.add(evaluation.folder / name)}
            texts = {int(number): text for number, text in gallery["texts"].items()}
            galleries.append({**gallery, "title": evaluation.title, "split": split, "visuals": visuals, "texts": texts})
    return galleries


def _splits(evaluations: Sequence[Evaluation]) -> list[str]:
    return list(dict.fromkeys(split for evaluation in evaluations for split in evaluation.details["splits"]))


def _tables(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each test set its size, chance level and one row an evaluation and ranking; the best of a column marked."""
    tables = []
    for split in _splits(evaluations):
        rows = []
        for number, evaluation in enumerate(evaluations):
            details = evaluation.details["splits"].get(split)
            for key, ranking in ((f"{split}/", "re-ranked"), (f"{split}_emb/", "dual encoder")):
                if details and key in evaluation.metrics:
                    rows.append(
                        {
                            "color": number % COLORS,
                            "title": evaluation.title,
                            "ranking": ranking,
                            "values": evaluation.metrics[key],
                            "details": details,
                            "ties": details["depends_on_ties"].get(key, []),
                        }
                    )
        best = {column: max(row["values"][column] for row in rows) for column in COLUMNS}
        tables.append({"split": split, "rows": rows, "best": best, **rows[0]["details"]})
    return tables


def _bars(tables: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Bars of one metric: for each test set its evaluations, re-ranked where they are, and chance; scaled alike."""
    values = [row["values"][column] for table in tables for row in table["rows"]]
    scale = max([1.0, *values, *(table["chance"][column] for table in tables)])
    groups = []
    for table in tables:
        rows = {row["title"]: row for row in reversed(table["rows"])}
        chance = table["chance"][column]
        bars = [
            {
                "title": row["title"],
                "color": row["color"],
                "value": row["values"][column],
                "width": 100 * row["values"][column] / scale,
                "times": row["values"][column] / chance if chance else 0.0,
            }
            for row in reversed(rows.values())
        ]
        groups.append({"split": table["split"], "bars": bars, "chance": chance, "mark": 100 * chance / scale})
    return groups


def _loss_curves(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A chart for each distinct run that has a metrics.jsonl."""
    curves = []
    for run in dict.fromkeys(evaluation.run for evaluation in evaluations):
        steps = _training_log(run / "metrics.jsonl")
        lines = [
            Line(name, [(step["step"], step[key]) for step in steps if isinstance(step.get(key), int | float)])
            for key, name in LOSSES.items()
        ]
        lines = [line for line in lines if line.points]
        if lines:
            last = {line.name: line.points[-1][1] for line in lines}
            curves.append({"run": run.name, "chart": line_chart(lines, "step"), "last": last})
    return curves


def _training_log(path: Path) -> list[dict[str, Any]]:
    """The training steps of a metrics.jsonl; a line cut short by an interruption is left out."""
    steps = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(text)
            except json.JSONDecodeError:
                continue
            if "step" in step:
                steps.append(step)
    return steps


def console_table(evaluations: Sequence[Evaluation]) -> str:
    """The evaluations' metrics, and chance, as a plain table."""
    metrics = {f"{e.title}: {name}": values for e in evaluations for name, values in e.metrics.items()}
    chance = {split: d["chance"] for e in evaluations for split, d in e.details["splits"].items()}
    return format_table(metrics, chance)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: evaluation folders of several runs into one page and a table."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or single RUN/evaluation/LABEL folders")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="page to write (default: %(default)s)")
    parser.add_argument("--title", default="Evaluation", help="heading of the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        output = write_report(options.runs, options.output, options.title)
        table = console_table(find_evaluations(options.runs))
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{table}\n\nreport: {output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
