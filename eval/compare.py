"""Compares two evaluations query by query: differences with intervals, and the queries that changed most."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import with_means
from eval.outcomes import Outcomes, VisualSums, bootstrap, read_outcomes, sum_by_visual
from eval.report.evaluations import Evaluation, find_evaluations
from eval.report.grouping import item_key, read_predictions, recorded_digest
from runtime.errors import UserError, command
from runtime.program import command_line

log = logging.getLogger(__name__)

CHUNK = 1 << 22  # signs drawn at once


@dataclass(frozen=True)
class Difference:
    """A metric of both evaluations on the queries they share, in percent.

    low, high: 95 % interval of the difference, bootstrap over visuals. p: of a permutation test, in which the two
    evaluations are exchanged at random, visual by visual.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Change:
    """A query with another result: ranks from 1 (none: not ranked), or accuracies from 0 to 1."""

    query: str
    visual: str
    first: float | None
    second: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything about one entry of metrics.json that both evaluations have.

    metrics: the name of the entry. shared: queries of both; only_first, only_second: queries left out.
    better, worse: counts of queries by kind; improved, worsened: the largest changes by kind.
    """

    metrics: str
    shared: int
    only_first: int
    only_second: int
    differences: dict[str, Difference]
    better: dict[str, int]
    worse: dict[str, int]
    improved: dict[str, list[Change]]
    worsened: dict[str, list[Change]]


def compare(
    first: Sequence[Outcomes], second: Sequence[Outcomes], resamples: int = 2000, changes: int = 5
) -> list[Comparison]:
    """Compare the test sets found in both evaluations, matched by content or, failing that, by name.

    Raises UserError where there is none.
    """
    found, refused = [], ""
    for name in dict.fromkeys(part.metrics for part in first):
        outcomes_a = [part for part in first if part.metrics == name]
        outcomes_b = _counterparts(outcomes_a, second)
        pairs = [(a, b) for a in outcomes_a for b in outcomes_b if a.kind == b.kind]
        if not pairs:
            continue
        if problem := _incompatibility(pairs):
            refused = f"{name}: {problem}"
            log.warning("%s", refused)
            continue
        pairs = [_paired(a, b) for a, b in pairs]
        shared = sum(len(a.queries) for a, _ in pairs)
        other_name = outcomes_b[0].metrics
        found.append(
            Comparison(
                metrics=name if name == other_name else f"{name} of A, {other_name} of B",
                shared=shared,
                only_first=sum(len(part.queries) for part in outcomes_a) - shared,
                only_second=sum(len(part.queries) for part in outcomes_b) - shared,
                differences=_differences(pairs, resamples),
                better={a.kind: int((_gain(a, b) > 0).sum()) for a, b in pairs},
                worse={a.kind: int((_gain(a, b) < 0).sum()) for a, b in pairs},
                improved={a.kind: _changes(a, b, changes, 1) for a, b in pairs},
                worsened={a.kind: _changes(a, b, changes, -1) for a, b in pairs},
            )
        )
    if not found:
        a, b = (", ".join(dict.fromkeys(part.metrics for part in parts)) or "none" for parts in (first, second))
        raise UserError(refused or f"the evaluations share no test set: the first has {a}, the second {b}")
    return found


def _counterparts(outcomes_a: Sequence[Outcomes], second: Sequence[Outcomes]) -> list[Outcomes]:
    """The second evaluation's outcomes of the same test set and ranking: same items, else same name."""
    name, test_set = outcomes_a[0].metrics, outcomes_a[0].test_set
    same_items = [p for p in second if test_set and p.test_set == test_set and _ranking(p.metrics) == _ranking(name)]
    names = [part.metrics for part in same_items]
    chosen = names[0] if names and name not in names else name
    return [part for part in second if part.metrics == chosen]


def _ranking(metrics: str) -> str:
    """The suffix of an entry's name in metrics.json that identifies its scores."""
    return next((end for end in ("_emb/", "/") if metrics.endswith(end)), "")


def _incompatibility(pairs: Sequence[tuple[Outcomes, Outcomes]]) -> str:
    """The reason why two evaluations cannot be compared; empty where they can."""
    for a, b in pairs:
        same_items = not (a.test_set and b.test_set) or a.test_set == b.test_set
        if a.kind == "accuracy" and not same_items and not (a.keys and b.keys):
            return (
                "the evaluations ask different questions, and without predictions.json of both it is not known which "
                "they share: evaluate both on one corpus, or keep that file"
            )
        if a.kind != "accuracy" and not (same_items and Counter(a.queries) == Counter(b.queries)):
            return (
                "the evaluations rank different candidates, so their ranks cannot be compared: "
                "evaluate both on one corpus to compare them"
            )
    if not any(set(keys_a) & set(keys_b) for keys_a, keys_b in (_keys(a, b) for a, b in pairs)):
        return "the evaluations share no query: evaluate both on one corpus"
    return ""


def _paired(first: Outcomes, second: Outcomes) -> tuple[Outcomes, Outcomes]:
    """Both with only the queries that they share, in the same order."""
    keys, others = map(_numbered, _keys(first, second))
    row_of_key = {key: i for i, key in enumerate(others)}
    own = [i for i, key in enumerate(keys) if key in row_of_key]
    return _select(first, own), _select(second, [row_of_key[keys[i]] for i in own])


def _keys(first: Outcomes, second: Outcomes) -> list[list[tuple[str, ...]]]:
    """Identifies both evaluations' queries: by their whole content where both know it, else texts and visuals by
    their names, questions by their visual too.
    """
    if first.keys and second.keys:
        return [[(key,) for key in part.keys] for part in (first, second)]
    names = [(part.queries, part.visuals) if part.kind == "accuracy" else (part.queries,) for part in (first, second)]
    return [list(zip(*columns)) for columns in names]


def _numbered(queries: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """(query, n): n counts earlier queries with the same name, which are different queries."""
    earlier: dict[tuple[str, ...], count[int]] = defaultdict(count)
    return [(query, next(earlier[query])) for query in queries]


def _select(part: Outcomes, rows: Sequence[int]) -> Outcomes:
    types = {kind: [names[i] for i in rows] for kind, names in part.types.items()}
    queries, visuals = [part.queries[i] for i in rows], [part.visuals[i] for i in rows]
    return Outcomes(part.metrics, part.kind, queries, visuals, part.values[rows], types)


def _differences(pairs: Sequence[tuple[Outcomes, Outcomes]], resamples: int) -> dict[str, Difference]:
    change = [
        {name: b.points[name] - values for name, values in a.points.items() if name in b.points} for a, b in pairs
    ]
    first, second, mean = (
        _means(parts) for parts in ([a.points for a, _ in pairs], [b.points for _, b in pairs], change)
    )
    sums = sum_by_visual([a for a, _ in pairs], change)
    drawn, exchanged = with_means(bootstrap(sums, resamples)), with_means(_exchanged(sums, resamples))
    return {
        name: Difference(
            first=round(float(first[name]), 2),
            second=round(float(second[name]), 2),
            difference=round(float(mean[name]), 2),
            low=round(float(np.percentile(drawn[name], 2.5)), 2),
            high=round(float(np.percentile(drawn[name], 97.5)), 2),
            p=round(float((1 + (np.abs(exchanged[name]) >= abs(mean[name]) - 1e-9).sum()) / (1 + resamples)), 4),
        )
        for name in mean
    }


def _means(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Means in percent by metric, each a single number."""
    return with_means({name: np.asarray(100 * np.nanmean(values)) for part in parts for name, values in part.items()})


def _exchanged(sums: VisualSums, resamples: int) -> dict[str, np.ndarray]:
    """Mean differences in percent, (resamples,) by metric, when the sign of each visual's change is random."""
    generator, drawn = np.random.default_rng(1), []
    step = max(1, CHUNK // len(sums.sums))
    for start in range(0, resamples, step):
        signs = generator.integers(0, 2, (min(step, resamples - start), len(sums.sums)), dtype=np.int8)
        drawn.append((2.0 * signs - 1) @ sums.sums)
    result = 100 * np.concatenate(drawn) / np.maximum(1, sums.counts.sum(0))
    return {name: result[:, i] for i, name in enumerate(sums.names)}


def _gain(first: Outcomes, second: Outcomes) -> np.ndarray:
    """Improvement of each query in the second evaluation: in accuracy, or in the logarithm of its rank."""
    if first.kind == "accuracy":
        return second.values - first.values
    worst = 2 * max([1.0, *(float(v) for p in (first, second) for v in p.values[np.isfinite(p.values)])])
    return np.log(np.minimum(first.values, worst)) - np.log(np.minimum(second.values, worst))


def _changes(first: Outcomes, second: Outcomes, count: int, sign: int) -> list[Change]:
    gain = sign * _gain(first, second)
    chosen = [int(i) for i in np.argsort(-gain, kind="stable")[:count] if gain[i] > 0]
    values = ([float(v) if np.isfinite(v) else None for v in part.values[chosen]] for part in (first, second))
    return [Change(first.queries[i], first.visuals[i], *both) for i, *both in zip(chosen, *values)]


def load(path: str | Path) -> tuple[str, list[Outcomes]]:
    """Name and outcomes of a run's newest evaluation, of an evaluation folder, or of an outcomes.parquet."""
    path = Path(path)
    if path.is_file():
        return str(path), read_outcomes(path)
    evaluation = find_evaluations([path])[-1]
    outcomes = []
    for part in read_outcomes(evaluation.folder / "outcomes.parquet"):
        split = part.metrics.removesuffix(_ranking(part.metrics))
        digest = recorded_digest(evaluation, split) if split in evaluation.details["splits"] else ""
        keys = _question_keys(evaluation, split) if part.kind == "accuracy" else []
        outcomes.append(replace(part, test_set=digest, keys=keys))
    return str(evaluation.folder), outcomes


def _question_keys(evaluation: Evaluation, split: str) -> list[str]:
    """The whole content of each question, as ids may be reused elsewhere; empty where the predictions do not tell."""
    try:
        items = read_predictions(evaluation, split)
        return [item_key(item) for item in items if item["accuracy"] is not None]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def as_text(names: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    """The comparisons as plain tables."""
    lines = [f"A: {names[0]}", f"B: {names[1]}"]
    for one in comparisons:
        some_left_out = one.only_first + one.only_second
        left_out = f", without {one.only_first} of A and {one.only_second} of B" if some_left_out else ""
        lines += ["", f"{one.metrics}  ({one.shared} queries{left_out})"]
        lines.append(f"  {'':24}{'A':>8}{'B':>8}{'B - A':>8}   {'95 % interval':<18}{'p':>7}")
        for name, d in one.differences.items():
            interval = f"{d.low:+.2f} to {d.high:+.2f}"
            mark = " *" if d.p < 0.05 else ""
            lines.append(
                f"  {name:24}{d.first:8.2f}{d.second:8.2f}{d.difference:+8.2f}   {interval:<18}{d.p:7.4f}{mark}"
            )
        for kind in one.better:
            lines.append(f"  {kind.replace('_', ' ')}: B is better for {one.better[kind]}, worse for {one.worse[kind]}")
            for word, changes in (("better", one.improved[kind]), ("worse", one.worsened[kind])):
                lines += [
                    f"    {word}: {_format(c.first)} -> {_format(c.second)}  {c.query}  [{c.visual}]" for c in changes
                ]
    return "\n".join(lines)


def _format(value: float | None) -> str:
    return "not ranked" if value is None else f"{value:g}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog=command_line("eval.compare"), description=__doc__)
    result.add_argument("first", metavar="RUN_A", help="a run (its newest evaluation), evaluation or outcomes.parquet")
    result.add_argument("second", metavar="RUN_B", help="the same forms; differences are RUN_B minus RUN_A")
    result.add_argument(
        "--resamples", type=int, default=2000, metavar="N", help="resamples for intervals and p (default: %(default)s)"
    )
    result.add_argument(
        "--changes", type=int, default=5, metavar="N", help="changed queries listed of each kind (default: %(default)s)"
    )
    result.add_argument("--json", metavar="FILE", help="also write the comparison to this file")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    (first, outcomes_a), (second, outcomes_b) = load(options.first), load(options.second)
    found = compare(outcomes_a, outcomes_b, max(1, options.resamples), max(0, options.changes))
    if options.json:
        content: dict[str, Any] = {"first": first, "second": second, "comparisons": [asdict(one) for one in found]}
        Path(options.json).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(as_text((first, second), found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
