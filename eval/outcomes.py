"""The outcome of each query, from which confidence intervals and comparisons of two runs are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval.metrics import NOT_RANKED, RECALL_AT, with_means
from runtime.activity import progress
from runtime.errors import MissingError, UserError
from storage.parquet import read_table

TYPES = ("question_type", "answer_type")
PREFIXES = {"text_to_visual": "img", "visual_to_text": "txt"}
SCHEMA = pa.schema(
    [
        ("metrics", pa.string()),  # the entry of metrics.json that the query counts for
        ("kind", pa.string()),  # text_to_visual | visual_to_text | accuracy
        ("query", pa.string()),  # the text, the visual's name or the question's id
        ("visual", pa.string()),  # queries about the same visual are not independent
        ("question_type", pa.string()),  # where it has one
        ("answer_type", pa.string()),
        ("rank", pa.int64()),  # of the best true item, from 1; null where it was not ranked
        ("accuracy", pa.float64()),  # of an answer, from 0 to 1
    ]
)


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of Q queries of one kind that count for one entry of metrics.json.

    values (Q,): ranks from 1, infinity where the true item was not ranked; or accuracies from 0 to 1 where `kind` is
    "accuracy". queries, visuals: Q texts each; types: Q texts, empty where unknown, for each of TYPES that there is.
    test_set: a digest of the evaluated items, empty where unknown. keys: Q texts that identify queries, where their
    names are not unique.
    """

    metrics: str
    kind: str
    queries: Sequence[str]
    visuals: Sequence[str]
    values: np.ndarray
    types: Mapping[str, Sequence[str]] = field(default_factory=dict)
    test_set: str = ""
    keys: Sequence[str] = ()

    @cached_property
    def points(self) -> dict[str, np.ndarray]:
        """Each query's value of each metric, (Q,) float64 by the metric's name; the mean is the metric.

        NaN where a metric does not cover a query.
        """
        if self.kind != "accuracy":
            prefix = PREFIXES[self.kind]
            return {f"{prefix}_r{k}": (self.values <= k).astype(np.float64) for k in RECALL_AT}
        found = {"overall": self.values}
        for kind, types in self.types.items():
            for name in sorted(set(types) - {""}):
                found[f"{kind}/{name}"] = np.where(np.array(types) == name, self.values, np.nan)
        return found


def outcomes_of_ranks(
    metrics: str, kind: str, queries: Sequence[str], visuals: Sequence[str], ranks: np.ndarray
) -> Outcomes:
    """Outcomes from ranks (Q,) that count from 0, as `eval.metrics.true_ranks` has them."""
    values = np.where(ranks == NOT_RANKED, np.inf, ranks.astype(np.float64) + 1)
    return Outcomes(metrics, kind, queries, visuals, values)


def write_outcomes(path: Path, outcomes: Sequence[Outcomes]) -> None:
    """Write all queries' outcomes as one table of SCHEMA."""
    tables = []
    for part in outcomes:
        ranked = part.kind != "accuracy"
        ranks = [int(value) if np.isfinite(value) else None for value in part.values] if ranked else None
        count = len(part.values)
        columns = {
            "metrics": [part.metrics] * count,
            "kind": [part.kind] * count,
            "query": list(part.queries),
            "visual": list(part.visuals),
            **{kind: list(part.types.get(kind, [""] * count)) for kind in TYPES},
            "rank": ranks or [None] * count,
            "accuracy": [None] * count if ranked else part.values.tolist(),
        }
        tables.append(pa.table(columns, schema=SCHEMA))
    pq.write_table(pa.concat_tables(tables) if tables else SCHEMA.empty_table(), path)


def read_outcomes(path: Path) -> list[Outcomes]:
    """What `write_outcomes` wrote. Raises FileNotFoundError, or ValueError for another table."""
    if not path.is_file():
        raise MissingError(f"{path} does not exist: evaluate again with launch/evaluate.py")
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a table of outcomes ({error}): evaluate again") from None
    if not table.schema.equals(SCHEMA):
        raise UserError(f"{path} has other columns than a table of outcomes: evaluate again")
    found = []
    keys = table.select(["metrics", "kind"]).to_pylist()
    for key in dict.fromkeys((row["metrics"], row["kind"]) for row in keys):
        rows = np.flatnonzero([(row["metrics"], row["kind"]) == key for row in keys])
        part = table.take(rows).to_pydict()
        ranks = [np.inf if rank is None else rank for rank in part["rank"]]
        values = np.array(part["accuracy"] if key[1] == "accuracy" else ranks, dtype=np.float64)
        found.append(Outcomes(*key, part["query"], part["visual"], values, {kind: part[kind] for kind in TYPES}))
    return found


def intervals(outcomes: Sequence[Outcomes], resamples: int = 1000) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % intervals in percent of every metric, {"SPLIT/": {"img_r1": (low, high), ...}}.

    Bootstrap over visuals: all queries about a visual are drawn together.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in dict.fromkeys(part.metrics for part in outcomes):
        own = [part for part in outcomes if part.metrics == name]
        drawn = with_means(bootstrap(sum_by_visual(own, [part.points for part in own]), resamples))
        found[name] = {
            metric: (round(float(low), 2), round(float(high), 2))
            for metric, (low, high) in ((m, np.percentile(v, [2.5, 97.5])) for m, v in drawn.items())
        }
    return found


@dataclass(frozen=True)
class VisualSums:
    """Points summed by visual: sums (V, K) and counts (V, K) of V visuals and K metrics, named in `names`."""

    names: list[str]
    sums: np.ndarray
    counts: np.ndarray


def sum_by_visual(outcomes: Sequence[Outcomes], points: Sequence[Mapping[str, np.ndarray]]) -> VisualSums:
    """Sum what queries contribute to each metric, visual by visual.

    points: for each of `outcomes` what its queries contribute to each metric, (Q,), NaN where nothing.
    """
    numbers: dict[str, int] = {}
    owners = [
        np.array([numbers.setdefault(visual, len(numbers)) for visual in part.visuals], dtype=np.int64)
        for part in outcomes
    ]
    names, sums, counts = [], [], []
    for own, part in zip(owners, points, strict=True):
        for metric, values in part.items():
            present = ~np.isnan(values)
            names.append(metric)
            sums.append(np.bincount(own[present], values[present], len(numbers)))
            counts.append(np.bincount(own[present], minlength=len(numbers)).astype(np.float64))
    return VisualSums(names, np.stack(sums, 1), np.stack(counts, 1))


def bootstrap(sums: VisualSums, resamples: int) -> dict[str, np.ndarray]:
    """Means in percent, (resamples,) by metric, of visuals drawn with replacement.

    The same visuals are drawn for all metrics, and the same ones each time.
    """
    generator = np.random.default_rng(0)
    result = np.zeros((resamples, len(sums.names)))
    visuals = len(sums.sums)
    for number in range(resamples if visuals else 0):
        progress(f"confidence intervals, resample {number} of {resamples}")
        weights = np.bincount(generator.integers(visuals, size=visuals), minlength=visuals)
        total = weights @ sums.counts
        result[number] = 100 * (weights @ sums.sums) / np.where(total == 0, 1, total)
    return {name: result[:, i] for i, name in enumerate(sums.names)}
