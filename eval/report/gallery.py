"""Chooses example queries with their results for the report, and draws their pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from eval.metrics import NOT_RANKED, Truth, row_blocks, top_items, true_ranks
from loaders.evaluation import VisualSet
from runtime.activity import progress
from sharding.media.frames import MediaError
from sharding.media.picture import decode_picture
from sharding.report.contact_sheet import jpeg, side_by_side, square

CELL = 128  # pixels of a frame's side in a strip
SHOWN = 5  # results of a query


@dataclass(frozen=True)
class Hit:
    """One result of a query."""

    item: int
    rank: int  # from 1
    score: float
    correct: bool


@dataclass(frozen=True)
class Query:
    """A query, its first hits, and its best-ranked true item where that is not among them.

    `rank` from 1 of the best true item; None where it was not ranked: outside the candidates, or missing.
    """

    query: int
    rank: int | None
    top: list[Hit]
    correct: Hit | None
    correct_item: int


def choose_queries(
    scores: np.ndarray, truth: Truth, count: int, unranked: float = -np.inf, seed: int = 0
) -> dict[str, list[Query]]:
    """`count` best, worst and random queries of scores (Q, G), each at most once per kind.

    Best: the true item leads by the widest margin. Worst: it has the lowest rank. Random: depends only on `seed` and
    Q, so it is the same for two models. unranked: the score of items that were not among a query's candidates.
    """
    queries = np.array([query for query, items in enumerate(truth) if len(items)], dtype=np.int64)
    ranks = true_ranks(scores, truth).by_index
    margins = _margins(scores, truth, queries)
    best = np.lexsort((-margins, ranks))[:count]
    worst = np.lexsort((margins, -ranks))[:count]
    random = np.sort(np.random.default_rng(seed).permutation(len(queries))[:count])
    return {
        kind: [_query(int(queries[i]), scores, truth, int(ranks[i]), unranked) for i in chosen]
        for kind, chosen in {"best": best, "worst": worst, "random": random}.items()
    }


def draw_visuals(
    visuals: Iterable[int], dataset: VisualSet, split: str, missing: set[int], frames: int
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Name, picture and number of frames of each visual by its number as text; and the pictures, JPEG, by their name.

    What cannot be read has no picture.
    """
    shown: dict[str, Any] = {}
    pictures: dict[str, bytes] = {}
    for visual in visuals:
        progress(f"drawing visual {visual}")
        wanted = frames if dataset.media_type == "video" else 1
        found = [] if visual in missing else dataset.thumbnail(visual, wanted)
        picture, name = strip(found), f"{split}-{visual:06}.jpg"
        if picture:
            pictures[name] = picture
        shown[str(visual)] = {
            "source": dataset.sources[visual],
            "picture": f"thumbnails/{name}" if picture else None,
            "frames": len(found) if picture else 0,
        }
    return shown, pictures


def strip(frames: Sequence[bytes], cell: int = CELL) -> bytes | None:
    """JPEG of frames (bytes of an image file each) side by side, each in a square of `cell` pixels.

    None without frames, or where one is broken, which may be one that the evaluation did not use.
    """
    try:
        pictures = [square(Image.fromarray(decode_picture(data).pixels), cell) for data in frames]
    except MediaError:
        return None
    return jpeg(side_by_side(pictures)) if pictures else None


def data_url(picture: bytes) -> str:
    """A JPEG as a data URL."""
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def _margins(scores: np.ndarray, truth: Truth, queries: np.ndarray) -> np.ndarray:
    """By how much each query's best true item leads the best wrong one; -inf where it was not scored."""
    margins = np.full(len(queries), -np.inf)
    for block in row_blocks(len(queries), scores.shape[1]):
        rows = scores[queries[block]]
        target = np.empty(len(rows))
        for row, query in enumerate(queries[block]):
            target[row] = rows[row, truth[query]].max()
            rows[row, truth[query]] = -np.inf
        scored = np.isfinite(target)
        margins[block][scored] = target[scored] - rows[scored].max(1)
    return margins


def _query(query: int, scores: np.ndarray, truth: Truth, rank: int, unranked: float) -> Query:
    row = scores[query]
    top = [
        Hit(int(item), position + 1, round(float(row[item]), 4), bool(item in truth[query]))
        for position, item in enumerate(top_items(row, SHOWN))
        if row[item] > unranked
    ]
    best_true = int(max(truth[query], key=lambda item: (row[item], -item)))
    ranked = rank != NOT_RANKED and row[best_true] > unranked
    outside = ranked and not any(hit.correct for hit in top)
    correct = Hit(best_true, rank + 1, round(float(row[best_true]), 4), True) if outside else None
    return Query(query, rank + 1 if ranked else None, top, correct, best_true)
