"""The numbers in the report: a table for each test set, bars over all of them, curves by test frames and by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.metrics import RECALL_AT, reranking_helps
from eval.report.evaluations import Evaluation
from eval.report.grouping import Member, TestSet, group_test_sets
from eval.report.losses import by_medium, loss_weights, read_metrics, weighted_name
from eval.report.published import Published, published
from runtime.charts import COLORS, Curve, Panel, panel_svg

COLUMNS = [*(f"img_r{k}" for k in RECALL_AT), *(f"txt_r{k}" for k in RECALL_AT), "r_mean"]
SHORT = {"r_mean": "mean", "txt_r_mean": "txt_mean", "img_r_mean": "img_mean"}  # in plain tables
LOSSES = {
    "loss": "total", "loss_itc": "VTC", "loss_itm": "VTM", "loss_mlm": "MLM", "loss_qa": "answers",
}  # fmt: skip


def tables(test_sets: Sequence[TestSet]) -> list[dict[str, Any]]:
    """For each test set its size, columns, rows of ours, rows as published, and baselines; the best of ours marked.

    Each row has the evaluation's title and colour, values and intervals by column, and the columns that depend on
    how ties are broken.
    """
    found = []
    for test_set in test_sets:
        details, rows = test_set.details, _rows(test_set)
        theirs: dict[str, Published] = {}
        for member in test_set.members:
            about = member.evaluation.details
            theirs |= {row.title: row for row in published(about["benchmark"], member.split, about["zero_shot"])}
        columns = COLUMNS if details["task"] == "retrieval" else _columns(rows)
        found.append(
            {
                "title": test_set.title,
                "distinction": test_set.distinction,
                "splits": list(dict.fromkeys(member.split for member in test_set.members)),
                "task": details["task"],
                "details": details,
                "columns": [{"key": key, "label": _label(key), "side": key[:3]} for key in columns],
                "rows": rows,
                "published": [{"title": title, "row": row} for title, row in theirs.items()],
                "chance": details.get("chance", {}),
                "baselines": _baselines(details),
                "best": {c: max((r["values"][c] for r in rows if c in r["values"]), default=None) for c in columns},
                "types": _type_columns(rows, "question_type/")[1:],
                "notes": [note for row in rows if not row["secondary"] and (note := _ranking_note(row))],
            }
        )
    return found


def _rows(test_set: TestSet) -> list[dict[str, Any]]:
    several_names = len({member.split for member in test_set.members}) > 1
    return [
        {
            "member": member,
            "number": member.number,
            "color": member.number % len(COLORS),
            "title": f"{member.evaluation.title}: {member.split}" if several_names else member.evaluation.title,
            "key": key,
            "ranking": ranking,
            "secondary": place > 0,
            "values": member.evaluation.metrics[key],
            "intervals": member.evaluation.details["intervals"].get(key, {}),
            "details": member.details,
            "packing": packing,
            "ties": member.details.get("depends_on_ties", {}).get(key, []),
        }
        for member, packing in zip(test_set.members, test_set.packings, strict=True)
        for place, (key, ranking) in enumerate(_rankings(member).items())
        if key in member.evaluation.metrics
    ]


def _baselines(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Baselines that ignore the visual: title, meaning, values by column."""
    how = "ranking" if details["task"] == "retrieval" else "choosing"
    rows = [{"title": "chance", "note": f"{how} at random", "values": details.get("chance", {})}]
    if constant := details.get("constant"):
        note = "the most frequent answer of this test set, for every question"
        rows.append({"title": f"always “{constant['answer']}”", "note": note, "values": constant["values"]})
    return [row for row in rows if row["values"]]


def _rankings(member: Member) -> dict[str, str]:
    if member.details["task"] != "retrieval":
        return {member.split: member.details.get("accuracy", member.details["task"])}
    score = member.evaluation.details["settings"].get("rerank_score", "itm")
    reranked = "re-ranked" if score == "itm" else f"re-ranked by {score}"
    both = {f"{member.split}/": reranked, f"{member.split}_emb/": "dual encoder"}
    rankings = [item for item in both.items() if item[0] in member.evaluation.metrics]
    return dict(rankings if _reranks(member) else reversed(rankings))


def _reranks(member: Member) -> bool:
    """Whether re-ranking counts, as the validation of the weights found; unknown of old ones, where it does.

    An evaluation after an epoch of training is itself the validation.
    """
    about = member.evaluation
    found = member.details.get("reranks")
    if found is None and about.folder.name.startswith("epoch_") and not about.details["checkpoint"]:
        found = reranking_helps(about.metrics, member.split)
    return found is not False and member.details.get("matching_trained", True)


def _ranking_note(row: Mapping[str, Any]) -> str:
    """Why the dual encoder comes first, or stands alone; empty where it does not, or on demand."""
    if row["ranking"] != "dual encoder":
        return ""
    reranked = f"{row['member'].split}/" in row["member"].evaluation.metrics
    order = f"{row['title']}: {'dual encoder first' if reranked else 'not re-ranked'}, because"
    if not row["details"].get("matching_trained", True):
        return f"{order} no loss trained the matching head (loss_weight.itm=0)."
    return f"{order} re-ranking was no better in the validation of the weights." if reranked else ""


def _type_columns(rows: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    names = sorted({name for row in rows for name in row["values"] if name.startswith(prefix)})
    return ["overall", *names]


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """`overall`, the accuracies by type of answer, and the metrics of a task of one's own."""
    names = dict.fromkeys(name for row in rows for name in row["values"])
    own = [name for name in names if name != "overall" and not name.startswith(("answer_type/", "question_type/"))]
    known = _type_columns(rows, "answer_type/")
    return [*known, *own] if not rows or "overall" in names else [*known[1:], *own]


def _label(column: str) -> str:
    of_type = column.partition("/")[2]
    if of_type or column not in COLUMNS:
        return of_type or {"overall": "all"}.get(column, column)
    return "mean" if column == "r_mean" else f"R@{column.rpartition('r')[2]}"


def bars(all_tables: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """Bars of one metric for the test sets of a kind: their evaluations, re-ranked where they are, and a baseline:
    chance, or of questions always the same answer.
    """
    column = "img_r1" if task == "retrieval" else "overall"
    mine = [table for table in all_tables if (table["task"] == "retrieval") == (task == "retrieval") and table["rows"]]
    mine = [table for table in mine if all(column in row["values"] for row in table["rows"])]
    values = [row["values"][column] for table in mine for row in table["rows"]]
    values += [row["values"].get(column, 0.0) for table in mine for row in table["baselines"]]
    scale = max([1.0, *values])
    groups = []
    for table in mine:
        rows = {(row["number"], row["title"]): row for row in reversed(table["rows"])}  # of several the first
        name, low = "", 0.0
        for baseline in table["baselines"]:
            name, low = baseline["title"], baseline["values"].get(column, 0.0)
        each = [
            {
                "title": row["title"],
                "color": row["color"],
                "value": row["values"][column],
                "width": 100 * row["values"][column] / scale,
                "times": row["values"][column] / low if low else 0.0,
            }
            for row in reversed(rows.values())
        ]
        shown = {"name": name, "value": low, "mark": 100 * low / scale}
        groups.append({"title": table["title"], "bars": each, "baseline": shown})
    return groups


def frame_curves(test_sets: Sequence[TestSet]) -> list[dict[str, Any]]:
    """For each test set of clips that was evaluated with several numbers of frames: a chart of its metric by them.

    A line for each run, way of combining frames, and ranking.
    """
    curves = []
    runs = {member.evaluation.run for test_set in test_sets for member in test_set.members}
    for test_set in test_sets:
        lines: dict[str, dict[int, float]] = {}
        ranked = test_set.details["task"] == "retrieval"
        metric = "img_r_mean" if ranked else "overall"
        if test_set.details["media_type"] != "video":
            continue
        for row in _rows(test_set):
            evaluation = row["member"].evaluation
            words = [evaluation.run_name] if len(runs) > 1 else []
            words += [evaluation.details["settings"]["eval_frame_ensemble"]]
            words += [row["ranking"]] if ranked else []
            if metric in row["values"]:
                lines.setdefault(", ".join(words), {})[row["details"]["num_frames"]] = row["values"][metric]
        several = {name: sorted(points.items()) for name, points in lines.items() if len(points) > 1}
        drawn = [
            Curve(name, points, color=number, markers=True) for number, (name, points) in enumerate(several.items())
        ]
        if drawn:
            what = "mean of R@1, 5, 10, text to clip" if ranked else "accuracy"
            chart = panel_svg(Panel(drawn, x_label="test frames"))
            curves.append({"title": test_set.title, "what": what, "chart": chart, "names": list(several)})
    return curves


def loss_curves(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A chart for each distinct run that has a metrics.jsonl, and each medium that it was trained on."""
    curves = []
    for run, name_of_run in {evaluation.run: evaluation.run_name for evaluation in evaluations}.items():
        weights = loss_weights(run)
        log = run / "metrics.jsonl"
        media = by_medium(read_metrics(log) if log.is_file() else [])
        for medium, steps in media.items():
            lines: list[Curve] = []
            own = dict.fromkeys(key for step in steps for key in step if key.startswith("loss_"))
            for key in dict.fromkeys([*LOSSES, *own]):
                name = LOSSES.get(key, key.removeprefix("loss_"))
                points = [(step["step"], step[key]) for step in steps if isinstance(step.get(key), int | float)]
                if points:
                    lines.append(Curve(weighted_name(key, weights, name), points, color=len(lines)))
            if lines:
                last = {line.name: line.points[-1][1] for line in lines}
                title = f"{name_of_run}, {medium}" if len(media) > 1 else name_of_run
                curves.append({"run": title, "chart": panel_svg(Panel(lines, from_zero=True)), "last": last})
    return curves


def console_table(evaluations: Sequence[Evaluation]) -> str:
    """The evaluations' metrics, and baselines, as plain tables: one of recalls, one of accuracies."""
    texts = []
    all_tables = tables(group_test_sets(evaluations))
    for retrieval in (True, False):
        mine = [table for table in all_tables if (table["task"] == "retrieval") == retrieval]
        metrics: dict[str, dict[str, float]] = {}
        low: dict[str, dict[str, float]] = {}
        for table in mine:
            for row in table["rows"]:
                metrics[_console_name(table, row)] = _shown(row["values"])
            for baseline in table["baselines"]:
                low[f"{baseline['title']} {table['title']}"] = _shown(baseline["values"])
        if metrics:
            texts.append(format_table(metrics, low))
    notes = [note for table in all_tables for note in table["notes"]]
    notes += [f"{name}: training started from {origin}" for name, origin in origins(evaluations).items()]
    return "\n\n".join([*texts, *(["\n".join(notes)] if notes else [])])


def origins(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """What the training of the evaluated models started from, as far as recorded, by the name of the run.

    By the evaluation's title where those of a run are of several checkpoints.
    """
    models = {(each.run, each.details["checkpoint"]): each for each in reversed(evaluations)}
    found = {}
    for (run, _), each in reversed(models.items()):
        several = sum(other == run for other, _ in models) > 1
        if origin := each.details.get("started_from"):
            found[each.title if several else each.run_name] = origin
    return found


def _console_name(table: dict[str, Any], row: dict[str, Any]) -> str:
    evaluation, of = row["member"].evaluation, [name for name in (table["distinction"], row["packing"]) if name]
    return f"{evaluation.title}: {row['key'].rstrip('/')}" + (f" ({', '.join(of)})" if of else "")


def _shown(values: Mapping[str, float]) -> dict[str, float]:
    return {
        name.removeprefix("answer_type/"): value
        for name, value in values.items()
        if not name.startswith("question_type/")
    }


def format_table(
    metrics: Mapping[str, Mapping[str, float]], baselines: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Lines of a table: a row an entry of `metrics` ("SPLIT/": {"txt_r1": ...}), in percent, a column a metric.

    baselines: rows of the same form, set off below, such as chance.
    """
    rows = [(name.rstrip("/"), values) for name, values in metrics.items()]
    low = [(name, values) for name, values in (baselines or {}).items()]
    columns = list(dict.fromkeys(column for _, values in rows for column in values))
    width = max([len(name) for name, _ in rows + low], default=0)
    widths = [max(6, len(SHORT.get(column, column))) for column in columns]
    head = " " * width + "".join(f"  {SHORT.get(c, c):>{w}}" for c, w in zip(columns, widths))
    rule = "-" * len(head)
    lines = [head, rule, *(_line(name, values, columns, width, widths) for name, values in rows)]
    if low:
        lines += [rule, *(_line(name, values, columns, width, widths) for name, values in low)]
    return "\n".join(lines)


def _line(name: str, values: Mapping[str, float], columns: list[str], width: int, widths: list[int]) -> str:
    cells = (f"{values[c]:>{w}.2f}" if c in values else " " * w for c, w in zip(columns, widths))
    return f"{name:<{width}}" + "".join(f"  {cell}" for cell in cells)
