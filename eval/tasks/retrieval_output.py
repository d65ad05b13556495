"""What an evaluation's folder holds of a retrieval test set: scores, rankings, and queries worth looking at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from eval.config import EvalConfig
from eval.metrics import true_ranks
from eval.outcomes import Outcomes, outcomes_of_ranks
from eval.outputs import SplitOutput
from eval.ranking import ordered, row_blocks, top_k_mask
from eval.report.gallery import PicturedData, Query, choose_queries, draw_visuals
from eval.tasks.retrieval import NOT_RERANKED, RetrievalData, RetrievalResult, score_matrices

PREDICTED = 10  # items listed for each query in predictions.json


class PicturedRetrieval(PicturedData, RetrievalData, Protocol):
    """A retrieval test set that can show its visuals."""


def retrieval_output(result: RetrievalResult, dataset: PicturedRetrieval, config: EvalConfig) -> SplitOutput:
    """Everything to be written of a result that holds its scores; raises ValueError on other ranks than the first."""
    if result.scores is None:
        raise ValueError(f"the result of {result.name} has no scores: only rank 0 holds them, write from there")
    matrices = score_matrices(result.name, result.scores)
    visual_to_text, text_to_visual = next(iter(matrices.values()))
    gallery, shown = _gallery(visual_to_text, text_to_visual, dataset, config)
    visuals, pictures = draw_visuals(sorted(shown), dataset, result.name, set(result.missing), config.gallery_frames)
    named = {
        "i2t_x": result.scores.visual_to_text,
        "t2i_x": result.scores.text_to_visual,
        "i2t_emb": result.scores.similarity,
    }
    return SplitOutput(
        name=result.name,
        metrics=result.metrics,
        details=_details(result, dataset),
        outcomes=[part for key, pair in matrices.items() for part in _outcomes(key, *pair, dataset)],
        predictions=_predictions(visual_to_text, text_to_visual, dataset),
        gallery={**gallery, "visuals": visuals},
        pictures=pictures,
        matrices={key: matrix for key, matrix in named.items() if matrix is not None},
    )


def _details(result: RetrievalResult, dataset: PicturedRetrieval) -> dict[str, Any]:
    return {
        "task": "retrieval",
        "media_type": dataset.media_type,
        "num_visuals": result.num_visuals,
        "num_texts": result.num_texts,
        "num_frames": result.num_frames,
        "chance": result.chance,
        "depends_on_ties": result.depends_on_ties,
        "missing": {dataset.sources[i]: reason for i, reason in result.missing.items()},
        "seconds": {stage: round(value, 2) for stage, value in result.seconds.items()},
    }


def _outcomes(
    key: str, visual_to_text: np.ndarray, text_to_visual: np.ndarray, dataset: PicturedRetrieval
) -> list[Outcomes]:
    sources, found = dataset.sources, []
    texts = [m for m, visuals in enumerate(dataset.visuals_of_text) if visuals]
    visuals = [n for n, own in enumerate(dataset.texts_of_visual) if own]
    ranks = true_ranks(text_to_visual, dataset.visuals_of_text).by_index
    names, owners = [dataset.texts[m] for m in texts], [sources[dataset.visuals_of_text[m][0]] for m in texts]
    found.append(outcomes_of_ranks(key, "text_to_visual", names, owners, ranks))
    ranks = true_ranks(visual_to_text, dataset.texts_of_visual).by_index
    names = [sources[n] for n in visuals]
    found.append(outcomes_of_ranks(key, "visual_to_text", names, names, ranks))
    return found


def _predictions(
    visual_to_text: np.ndarray, text_to_visual: np.ndarray, dataset: PicturedRetrieval
) -> dict[str, list[dict[str, Any]]]:
    """For each text its first visuals, for each visual its first texts."""
    sources, texts = dataset.sources, dataset.texts
    return {
        "text_to_visual": [
            {"text": texts[m], "correct": [sources[n] for n in dataset.visuals_of_text[m]], "found": found}
            for m, found in enumerate(_first(text_to_visual, sources))
        ],
        "visual_to_text": [
            {"visual": sources[n], "correct": [texts[m] for m in dataset.texts_of_visual[n]], "found": found}
            for n, found in enumerate(_first(visual_to_text, texts))
        ],
    }


def _first(scores: np.ndarray, names: Sequence[str]) -> list[list[dict[str, Any]]]:
    found = []
    for block in row_blocks(*scores.shape):
        for row, marked in zip(scores[block], top_k_mask(scores[block], PREDICTED)):
            items = [int(i) for i in ordered(row, np.flatnonzero(marked)) if row[i] > NOT_RERANKED]
            found.append([{"item": names[i], "score": round(float(row[i]), 4)} for i in items])
    return found


def _gallery(
    visual_to_text: np.ndarray, text_to_visual: np.ndarray, dataset: PicturedRetrieval, config: EvalConfig
) -> tuple[dict[str, Any], set[int]]:
    """The chosen queries of both directions with the texts they need, and the visuals to be shown."""
    by_text = choose_queries(text_to_visual, dataset.visuals_of_text, config.gallery, NOT_RERANKED)
    by_visual = choose_queries(visual_to_text, dataset.texts_of_visual, config.gallery, NOT_RERANKED)
    text_queries = [query for queries in by_text.values() for query in queries]
    visual_queries = [query for queries in by_visual.values() for query in queries]
    texts = _items(visual_queries) | {query.query for query in text_queries}
    gallery = {
        "text_to_visual": {kind: [query.to_json() for query in queries] for kind, queries in by_text.items()},
        "visual_to_text": {kind: [query.to_json() for query in queries] for kind, queries in by_visual.items()},
        "texts": {str(m): dataset.texts[m] for m in sorted(texts)},
    }
    return gallery, _items(text_queries) | {query.query for query in visual_queries}


def _items(queries: Sequence[Query]) -> set[int]:
    return {item for query in queries for item in [query.correct_item, *(hit.item for hit in query.top)]}
