"""Retrieval metrics of score matrices: recall in both directions, ties, chance level; and the top-k of each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from runtime.activity import progress
from runtime.errors import UserError

RECALL_AT = (1, 5, 10)
BLOCK_CELLS = 1 << 24  # cells of a score matrix handled at once
NOT_RANKED = np.iinfo(np.int64).max  # rank of a true item that was never scored
NOT_FINITE = "scores hold NaN: the model's weights or its input are not finite"
Truth = Sequence[Sequence[int]]  # for each query the indices of its true items


@dataclass(frozen=True)
class TrueRanks:
    """For each of Q queries the rank of its best true item, from 0; each (Q,) int64.

    `by_index` breaks ties by index, `best` and `worst` in favour of and against the true items.
    """

    by_index: np.ndarray
    best: np.ndarray
    worst: np.ndarray


@dataclass(frozen=True)
class RetrievalMetrics:
    """Metrics in percent by their official names, for the orders of ties as in `TrueRanks`: `values` by index."""

    values: dict[str, float]
    best: dict[str, float]
    worst: dict[str, float]

    @property
    def depends_on_ties(self) -> list[str]:
        """Names of the metrics that another order of equal scores would change."""
        return [name for name in self.values if self.best[name] != self.worst[name]]


def true_ranks(scores: np.ndarray, truth: Truth) -> TrueRanks:
    """Rank of the best true item of each query that has one.

    scores (Q, G): a row a query, a column an item of the gallery; -inf marks what was never scored and cannot be
    found. truth: the true columns of each row; rows without any are left out.

    Raises:
        ValueError: scores and truth have different numbers of rows, or scores hold NaN.
    """
    if scores.ndim != 2 or len(scores) != len(truth):
        raise ValueError(f"scores of shape {scores.shape} do not fit {len(truth)} queries: must have one row per query")
    queries = np.array([query for query, items in enumerate(truth) if len(items)], dtype=np.int64)
    by_index, best, worst = (np.full(len(queries), NOT_RANKED) for _ in range(3))
    columns = np.arange(scores.shape[1])
    for block in row_blocks(len(queries), scores.shape[1]):
        rows = scores[queries[block]]
        if np.isnan(rows).any():
            raise UserError(NOT_FINITE)
        is_true = np.zeros(rows.shape, dtype=bool)
        for row, query in enumerate(queries[block]):
            is_true[row, truth[query]] = True
        masked = np.where(is_true, rows, -np.inf)
        first_true = masked.argmax(1)  # of equally high true items the one of lowest index
        target = masked.max(1)[:, None]
        above = (rows > target).sum(1)
        equal = rows == target
        found = np.isfinite(target[:, 0])
        before = equal & (columns < first_true[:, None])
        by_index[block] = np.where(found, above + before.sum(1), NOT_RANKED)
        best[block] = np.where(found, above, NOT_RANKED)
        worst[block] = np.where(found, above + (equal & ~is_true).sum(1), NOT_RANKED)
    return TrueRanks(by_index, best, worst)


def retrieval_metrics(
    visual_to_text: np.ndarray, text_to_visual: np.ndarray, texts_of_visual: Truth, visuals_of_text: Truth
) -> RetrievalMetrics:
    """R@1, R@5, R@10 of both directions in percent, and their means, rounded to two decimals.

    visual_to_text (N, M) and text_to_visual (M, N) scores of N visuals and M texts. `txt_*` is the recall of texts for
    a visual, `img_*` that of visuals for a text; of several true items the best-ranked counts.
    """
    texts = true_ranks(visual_to_text, texts_of_visual)
    visuals = true_ranks(text_to_visual, visuals_of_text)
    return RetrievalMetrics(
        values=_named(_recalls(texts.by_index), _recalls(visuals.by_index)),
        best=_named(_recalls(texts.best), _recalls(visuals.best)),
        worst=_named(_recalls(texts.worst), _recalls(visuals.worst)),
    )


def chance_metrics(texts_of_visual: Truth, visuals_of_text: Truth) -> dict[str, float]:
    """The expected metrics of a random ranking, under the names of `retrieval_metrics`."""
    num_visuals, num_texts = len(texts_of_visual), len(visuals_of_text)
    return _named(_chance(texts_of_visual, num_texts), _chance(visuals_of_text, num_visuals))


def _recalls(ranks: np.ndarray) -> list[float]:
    return [100.0 * float((ranks < k).mean()) if len(ranks) else 0.0 for k in RECALL_AT]


def _chance(truth: Truth, gallery: int) -> list[float]:
    sizes = [len(items) for items in truth if len(items)]
    counts = {size: sizes.count(size) for size in set(sizes)}
    recalls = []
    for k in RECALL_AT:
        cut = min(k, gallery)
        hits = sum(n * (1 - comb(gallery - size, cut) / comb(gallery, cut)) for size, n in counts.items())
        recalls.append(100.0 * hits / len(sizes) if sizes else 0.0)
    return recalls


def _named(texts: list[float], visuals: list[float]) -> dict[str, float]:
    values: dict[str, float] = {}
    for prefix, recalls in (("txt", texts), ("img", visuals)):
        values = with_means(values | {f"{prefix}_r{k}": recall for k, recall in zip(RECALL_AT, recalls)})
    return {name: round(value, 2) for name, value in values.items()}


def with_means(values: Mapping[str, Any]) -> dict[str, Any]:
    """Recalls completed by their means under the official names; other metrics as they are."""
    result = dict(values)
    for prefix in ("txt", "img"):
        recalls = [values[name] for name in (f"{prefix}_r{k}" for k in RECALL_AT) if name in values]
        if recalls:
            result[f"{prefix}_r_mean"] = sum(recalls) / len(recalls)
    if "txt_r_mean" in result and "img_r_mean" in result:
        result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result


def reranking_helps(metrics: Mapping[str, Mapping[str, float]], split: str) -> bool | None:
    """Whether a split's `r_mean` is higher re-ranked than by the dual encoder alone, which costs less at a tie.

    metrics: entries of metrics.json. None for a split that was not ranked in both ways.
    """
    reranked, dual_encoder = (metrics.get(f"{split}{end}", {}).get("r_mean") for end in ("/", "_emb/"))
    return None if reranked is None or dual_encoder is None else reranked > dual_encoder


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `columns` cells in blocks of a bounded size."""
    step = max(1, BLOCK_CELLS // max(1, columns))
    for start in range(0, rows, step):
        progress(f"ranking scores, row {start} of {rows}")
        yield slice(start, min(start + step, rows))


def top_k_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """Marks the k highest of each row of scores (Q, G), ties by index; (Q, G) bool.

    Cells of -inf are never marked. A row with fewer than k other cells has all of them marked.
    """
    if k >= scores.shape[1]:
        return scores > -np.inf
    mask = np.zeros(scores.shape, dtype=bool)
    if k <= 0:
        return mask
    for block in row_blocks(*scores.shape):
        rows = scores[block]
        # Negated, because np.partition from the end is 20x slower where most scores are equal, as after re-ranking.
        threshold = -np.partition(-rows, k - 1, axis=1)[:, k - 1, None]
        above, equal = rows > threshold, rows == threshold
        vacant = k - above.sum(1, keepdims=True)
        crowded = equal.sum(1) > vacant[:, 0]
        equal[crowded] &= equal[crowded].cumsum(1) <= vacant[crowded]
        mask[block] = (above | equal) & (rows > -np.inf)
    return mask


def top_items(row: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest of scores (G,), best first, ties by index; fewer where only -inf is left."""
    return ordered(row, np.flatnonzero(top_k_mask(row[None], k)[0]))


def ordered(row: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Some items (K,) of scores (G,), ascending, best first, ties by index."""
    return items[np.argsort(-row[items], kind="stable")]
