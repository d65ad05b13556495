"""The report's numbers: a table for each test set, bars over all of them, and curves by the number of test frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.charts import COLORS, Line, line_chart
from eval.evaluations import Evaluation
from eval.losses import by_medium, loss_weights, weighted_name
from eval.metrics import RECALL_AT
from eval.published import Published, published
from eval.tables import format_table

COLUMNS = [*(f"img_r{k}" for k in RECALL_AT), *(f"txt_r{k}" for k in RECALL_AT), "r_mean"]
LOSSES = {
    "loss": "total", "loss_itc": "contrast", "loss_itm": "matching", "loss_mlm": "masked words", "loss_qa": "answers",
}  # fmt: skip
OF_TYPE = {"answer_type/": "answers", "question_type/": "questions"}
BY_FRAMES = {"retrieval": "img_r_mean", "qa": "overall", "choice": "overall"}


def tables(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each test set its size, columns, rows of ours, rows as published, and chance; the best of ours marked.

    Each row has the evaluation's title and colour, values and intervals by column, and the columns that depend on
    how ties are broken.
    """
    found = []
    for split, task in _splits(evaluations):
        rows: list[dict[str, Any]] = []
        theirs: dict[str, Published] = {}
        details: dict[str, Any] = {}
        for number, evaluation in enumerate(evaluations):
            own = evaluation.details["splits"].get(split)
            if own is None or own["task"] != task:
                continue
            details = details or own
            rows += _rows(evaluation, number, split, own)
            benchmark, zero_shot = evaluation.details["benchmark"], evaluation.details["zero_shot"]
            theirs |= {row.title: row for row in published(benchmark, split, zero_shot)}
        columns = COLUMNS if task == "retrieval" else _type_columns(rows, "answer_type/")
        found.append(
            {
                "split": split,
                "task": task,
                "details": details,
                "columns": [{"key": key, "label": _label(key), "side": key[:3]} for key in columns],
                "rows": rows,
                "published": [{"title": title, "row": row} for title, row in theirs.items()],
                "chance": details.get("chance", {}),
                "best": {c: max((r["values"][c] for r in rows if c in r["values"]), default=None) for c in columns},
                "types": _type_columns(rows, "question_type/")[1:],
            }
        )
    return found


def _splits(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """Name and task of every test set."""
    pairs = ((split, d["task"]) for e in evaluations for split, d in e.details["splits"].items())
    return list(dict.fromkeys(pairs))


def _rows(evaluation: Evaluation, number: int, split: str, details: dict[str, Any]) -> list[dict[str, Any]]:
    rankings = {f"{split}/": "re-ranked", f"{split}_emb/": "dual encoder"}
    if details["task"] != "retrieval":
        rankings = {split: details["accuracy"]}
    return [
        {
            "color": number % COLORS,
            "title": evaluation.title,
            "ranking": ranking,
            "secondary": ranking == "dual encoder",
            "values": evaluation.metrics[key],
            "intervals": evaluation.details["intervals"].get(key, {}),
            "details": details,
            "ties": details.get("depends_on_ties", {}).get(key, []),
        }
        for key, ranking in rankings.items()
        if key in evaluation.metrics
    ]


def _type_columns(rows: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    names = sorted({name for row in rows for name in row["values"] if name.startswith(prefix)})
    return ["overall", *names]


def _label(column: str) -> str:
    for prefix in OF_TYPE:
        if column.startswith(prefix):
            return column.removeprefix(prefix)
    return {"r_mean": "mean", "overall": "all"}.get(column, f"R@{column.rpartition('r')[2]}")


def bars(all_tables: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Bars of one metric for the test sets of a kind: their evaluations, re-ranked where they are, and chance."""
    mine = [table for table in all_tables if (table["task"] == "retrieval") == (task == "retrieval") and table["rows"]]
    column = "img_r1" if task == "retrieval" else "overall"
    values = [row["values"][column] for table in mine for row in table["rows"]]
    scale = max([1.0, *values, *(table["chance"].get(column, 0.0) for table in mine)])
    groups = []
    for table in mine:
        rows = {row["title"]: row for row in reversed(table["rows"])}
        chance = table["chance"].get(column, 0.0)
        each = [
            {
                "title": row["title"],
                "color": row["color"],
                "value": row["values"][column],
                "width": 100 * row["values"][column] / scale,
                "times": row["values"][column] / chance if chance else 0.0,
            }
            for row in reversed(rows.values())
        ]
        groups.append({"split": table["split"], "bars": each, "chance": chance, "mark": 100 * chance / scale})
    return groups


def frame_curves(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each test set of clips that was evaluated with several numbers of frames: a chart of its metric by them.

    A line for each run, way of combining frames, and ranking.
    """
    curves = []
    for split, task in _splits(evaluations):
        lines: dict[str, dict[int, float]] = {}
        metric = BY_FRAMES[task]
        runs = {e.run for e in evaluations}
        for evaluation in evaluations:
            details = evaluation.details["splits"].get(split)
            if details is None or details["media_type"] != "video" or details["task"] != task:
                continue
            for row in _rows(evaluation, 0, split, details):
                words = [evaluation.run.name] if len(runs) > 1 else []
                words += [evaluation.details["settings"]["eval_frame_ensemble"]]
                words += [row["ranking"]] if task == "retrieval" else []
                lines.setdefault(", ".join(words), {})[details["num_frames"]] = row["values"][metric]
        drawn = [Line(name, sorted(points.items())) for name, points in lines.items() if len(points) > 1]
        if drawn:
            what = "mean of R@1, 5, 10, text to clip" if task == "retrieval" else "accuracy"
            chart = line_chart(drawn, "test frames", from_zero=False)
            curves.append({"split": split, "what": what, "chart": chart, "names": [line.name for line in drawn]})
    return curves


def loss_curves(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A chart for each distinct run that has a metrics.jsonl, and each medium that it was trained on."""
    curves = []
    for run in dict.fromkeys(evaluation.run for evaluation in evaluations):
        weights = loss_weights(run)
        media = by_medium(_training_log(run / "metrics.jsonl"))
        for medium, steps in media.items():
            lines = [
                Line(
                    weighted_name(key, weights, name),
                    [(step["step"], step[key]) for step in steps if isinstance(step.get(key), int | float)],
                )
                for key, name in LOSSES.items()
            ]
            lines = [line for line in lines if line.points]
            if lines:
                last = {line.name: line.points[-1][1] for line in lines}
                title = f"{run.name}, {medium}" if len(media) > 1 else run.name
                curves.append({"run": title, "chart": line_chart(lines, "step"), "last": last})
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
    """The evaluations' metrics, and chance, as plain tables: one of recalls, one of accuracies."""
    texts = []
    for retrieval in (True, False):
        metrics: dict[str, dict[str, float]] = {}
        chance: dict[str, dict[str, float]] = {}
        for evaluation in evaluations:
            for split, details in evaluation.details["splits"].items():
                if (details["task"] == "retrieval") != retrieval:
                    continue
                for key in (f"{split}/", f"{split}_emb/", split):
                    if key in evaluation.metrics:
                        row = evaluation.metrics[key]
                        metrics[f"{evaluation.title}: {key}"] = {
                            name.removeprefix("answer_type/"): value
                            for name, value in row.items()
                            if not name.startswith("question_type/")
                        }
                if details.get("chance"):
                    chance[split] = details["chance"]
        if metrics:
            texts.append(format_table(metrics, chance))
    return "\n\n".join(texts)
