"""Writes an evaluation's folder: metrics, scores, predictions, and what the report shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval.config import EvalConfig
from eval.gallery import Query, choose_queries, strip
from eval.ranking import row_blocks, top_items
from eval.report import write_report
from eval.retrieval import NOT_RERANKED, RetrievalData, RetrievalResult

FORMAT_VERSION = 1
PREDICTED = 10  # items listed for each query in predictions.json


class PicturedData(RetrievalData, Protocol):
    """A test set that can show its visuals."""

    def thumbnail(self, i: int, num_frames: int = 4) -> list[bytes]:
        """JPEG bytes of `num_frames` frames of visual `i`."""
        ...


def write_evaluation(
    folder: str | Path,
    results: Sequence[RetrievalResult],
    datasets: Sequence[PicturedData],
    config: EvalConfig,
    title: str = "",
    checkpoint: str = "",
) -> Path:
    """Write the results of one or more test sets to `folder` (RUN/evaluation/LABEL), replacing an older evaluation.

    To be called by rank 0, whose results hold the scores. title: the evaluation's name in reports; by default run and
    label. The folder appears complete or not at all:

    - metrics.json: {"SPLIT/": {"txt_r1": ...}, "SPLIT_emb/": {...}}, re-ranked and dual encoder
    - evaluation.json: sizes, settings, chance level, metrics that depend on ties, missing samples, seconds
    - scores.npz: SPLIT/i2t_x, SPLIT/t2i_x, SPLIT/i2t_emb (its transpose is t2i_emb), float32
    - predictions.json: for each query its first items with scores
    - gallery.json and thumbnails/: queries for the report, with pictures
    - report.html
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "thumbnails").mkdir(parents=True)
    metrics = {name: values for result in results for name, values in result.metrics.items()}
    _write_json(aside / "metrics.json", metrics)
    _write_json(aside / "evaluation.json", _details(results, datasets, config, title, checkpoint))
    np.savez_compressed(aside / "scores.npz", **_matrices(results))  # type: ignore[arg-type]
    _write_json(aside / "predictions.json", {r.name: _predictions(r, d) for r, d in zip(results, datasets)})
    gallery = {r.name: _gallery(r, d, config, aside) for r, d in zip(results, datasets)}
    _write_json(aside / "gallery.json", gallery)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    write_report([folder], folder / "report.html")
    return folder


def ranking_scores(result: RetrievalResult) -> tuple[np.ndarray, np.ndarray]:
    """The result's final scores, visual to text (N, M) and text to visual (M, N): re-ranked ones where there are."""
    if result.scores is None:
        raise ValueError(f"the result of {result.name} has no scores: only rank 0 holds them, write from there")
    scores = result.scores
    if scores.visual_to_text is None or scores.text_to_visual is None:
        return scores.similarity, scores.similarity.T
    return scores.visual_to_text, scores.text_to_visual


def _details(
    results: Sequence[RetrievalResult],
    datasets: Sequence[PicturedData],
    config: EvalConfig,
    title: str,
    checkpoint: str,
) -> dict[str, Any]:
    splits = {
        result.name: {
            "media_type": dataset.media_type,
            "num_visuals": result.num_visuals,
            "num_texts": result.num_texts,
            "num_frames": result.num_frames,
            "chance": result.chance,
            "depends_on_ties": result.depends_on_ties,
            "missing": {dataset.sources[i]: reason for i, reason in result.missing.items()},
            "seconds": {stage: round(value, 2) for stage, value in result.seconds.items()},
        }
        for result, dataset in zip(results, datasets)
    }
    return {
        "version": FORMAT_VERSION,
        "title": title,
        "checkpoint": checkpoint,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {key: value for key, value in asdict(config).items() if key in EvalConfig.__dataclass_fields__},
        "splits": splits,
    }


def _matrices(results: Sequence[RetrievalResult]) -> dict[str, np.ndarray]:
    matrices: dict[str, np.ndarray] = {}
    for result in results:
        ranking_scores(result)
        assert result.scores is not None
        each = {
            "i2t_x": result.scores.visual_to_text,
            "t2i_x": result.scores.text_to_visual,
            "i2t_emb": result.scores.similarity,
        }
        matrices |= {f"{result.name}/{key}": matrix for key, matrix in each.items() if matrix is not None}
    return matrices


def _predictions(result: RetrievalResult, dataset: PicturedData) -> dict[str, list[dict[str, Any]]]:
    """For every text its first visuals, for every visual its first texts."""
    visual_to_text, text_to_visual = ranking_scores(result)
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
        for row in scores[block]:
            items = [int(i) for i in top_items(row, PREDICTED) if row[i] > NOT_RERANKED]
            found.append([{"item": names[i], "score": round(float(row[i]), 4)} for i in items])
    return found


def _gallery(
    result: RetrievalResult, dataset: PicturedData, config: EvalConfig, folder: Path
) -> dict[str, dict[str, Any]]:
    visual_to_text, text_to_visual = ranking_scores(result)
    by_text = choose_queries(text_to_visual, dataset.visuals_of_text, config.gallery, NOT_RERANKED)
    by_visual = choose_queries(visual_to_text, dataset.texts_of_visual, config.gallery, NOT_RERANKED)
    text_queries = [query for queries in by_text.values() for query in queries]
    visual_queries = [query for queries in by_visual.values() for query in queries]
    visuals = _items(text_queries) | {query.query for query in visual_queries}
    texts = _items(visual_queries) | {query.query for query in text_queries}
    return {
        "text_to_visual": {kind: [query.to_json() for query in queries] for kind, queries in by_text.items()},
        "visual_to_text": {kind: [query.to_json() for query in queries] for kind, queries in by_visual.items()},
        "visuals": {str(n): _picture(n, result, dataset, config, folder) for n in sorted(visuals)},
        "texts": {str(m): dataset.texts[m] for m in sorted(texts)},
    }


def _items(queries: Sequence[Query]) -> set[int]:
    return {item for query in queries for item in [query.correct_item, *(hit.item for hit in query.top)]}


def _picture(
    visual: int, result: RetrievalResult, dataset: PicturedData, config: EvalConfig, folder: Path
) -> dict[str, Any]:
    """Name and picture of a visual; what cannot be read has none."""
    source, name = dataset.sources[visual], f"thumbnails/{result.name}-{visual:06}.jpg"
    frames: list[bytes] = []
    if visual not in result.missing:
        frames = dataset.thumbnail(visual, config.gallery_frames if dataset.media_type == "video" else 1)
    try:
        picture = strip(frames) if frames else None
    except OSError:  # a frame that the evaluation did not use may be broken
        picture = None
    if picture is None:
        return {"source": source, "picture": None, "frames": 0}
    (folder / name).write_bytes(picture)
    return {"source": source, "picture": name, "frames": len(frames)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
