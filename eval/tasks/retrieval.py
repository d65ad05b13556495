"""Retrieval: ranks visuals for each text and texts for each visual, by the dual encoder and re-ranked by matching."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from eval.config import EvalConfig
from eval.features import (
    TextEncoding,
    TextFeatures,
    VisualData,
    VisualFeatures,
    collect_visuals,
    encode_texts,
    missing_visuals,
    visual_blocks,
)
from eval.matching import match_marked
from eval.metrics import chance_metrics, retrieval_metrics
from eval.ranking import top_k_mask
from model.singularity import Singularity
from runtime.collectives import share

NOT_RERANKED = -100.0  # score of what is not among a query's candidates


class RetrievalData(VisualData, Protocol):
    """What evaluation needs of a test set; `loaders.evaluation.RetrievalSet` is one."""

    texts: list[str]
    visuals_of_text: list[list[int]]
    texts_of_visual: list[list[int]]


@dataclass(frozen=True)
class Scores:
    """Score matrices in float32 of N visuals and M texts; -inf in the rows and columns of missing visuals.

    similarity (N, M) of the dual encoder; visual_to_text (N, M) and text_to_visual (M, N) re-ranked, -100 outside
    the candidates; None where nothing was re-ranked.
    """

    similarity: np.ndarray
    visual_to_text: np.ndarray | None = None
    text_to_visual: np.ndarray | None = None


@dataclass(frozen=True)
class RetrievalResult:
    """One test set's evaluation. Metrics and counts stand on all ranks, `scores` on rank 0 only.

    metrics: "NAME/" re-ranked and "NAME_emb/" dual encoder, official names, percent. depends_on_ties: of each, the
    metrics that another order of equal scores would change. missing: visuals that could not be read and why.
    """

    name: str
    num_frames: int
    num_visuals: int
    num_texts: int
    metrics: dict[str, dict[str, float]]
    depends_on_ties: dict[str, list[str]]
    chance: dict[str, float]
    missing: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scores: Scores | None = None


def evaluate_retrieval(
    model: Singularity,
    dataset: RetrievalData,
    tokenizer: TextEncoding,
    config: EvalConfig,
    num_frames: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
) -> RetrievalResult:
    """Evaluate `model`, which lies on `device`, on a test set with `num_frames` frames a clip.

    max_length: tokens of a text; by default what `dataset.config.max_txt_l` says for its media. To be called by all
    ranks; the result does not depend on their number, nor on the batch sizes, beyond rounding. Raises ValueError for
    settings that do not fit the model.
    """
    model.check_ensemble(config.eval_frame_ensemble, config.ensemble_skips_temporal)
    max_length = max_length or int(getattr(dataset.config.max_txt_l, dataset.media_type))
    start = time.perf_counter()
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            blocks = visual_blocks(model, dataset, config, num_frames, rank, world_size, device)
            visuals = collect_visuals(model, blocks, dataset.num_visuals, config, world_size)
            texts = encode_texts(model, *tokenizer.encode(dataset.texts, max_length), rank, world_size)
            encoded = time.perf_counter()
            scores = score(model, visuals, texts, config, rank, world_size)
    finally:
        model.train(training)
    result = RetrievalResult(
        name=dataset.name,
        num_frames=num_frames,
        num_visuals=dataset.num_visuals,
        num_texts=len(dataset.texts),
        metrics={},
        depends_on_ties={},
        chance=chance_metrics(dataset.texts_of_visual, dataset.visuals_of_text),
        missing=missing_visuals(dataset, visuals.present, world_size),
        seconds={"encode": encoded - start, "match": time.perf_counter() - encoded},
        scores=scores,
    )
    return _with_metrics(result, dataset, world_size)


def score(
    model: Singularity,
    visuals: VisualFeatures,
    texts: TextFeatures,
    config: EvalConfig,
    rank: int = 0,
    world_size: int = 1,
) -> Scores | None:
    """Score matrices from features: dual encoder, then each query's `k_test` best by the match logit.

    A pair that both its text and its visual ask for is computed once. Returns None on all ranks but 0.
    """
    similarity = (visuals.embeddings @ texts.embeddings.T).cpu().numpy()
    similarity[~visuals.present] = -np.inf
    if config.k_test == 0 and not config.eval_x_only:
        return Scores(similarity) if rank == 0 else None
    everything = max(similarity.shape)
    k = everything if config.eval_x_only else config.k_test
    of_visual = top_k_mask(similarity, k)
    of_text = top_k_mask(similarity.T, k)
    matched = match_marked(model, visuals, texts, of_visual | of_text.T, config, NOT_RERANKED, rank, world_size)
    if rank:
        return None
    visual_to_text = np.where(of_visual, matched, np.float32(NOT_RERANKED))
    text_to_visual = np.where(of_text, matched.T, np.float32(NOT_RERANKED))
    visual_to_text[~visuals.present] = -np.inf
    text_to_visual[:, ~visuals.present] = -np.inf
    return Scores(similarity, visual_to_text, text_to_visual)


def score_matrices(name: str, scores: Scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Visual to text (N, M) and text to visual (M, N) by the entry of metrics.json, the final ones first."""
    matrices = {f"{name}_emb/": (scores.similarity, scores.similarity.T)}
    if scores.visual_to_text is not None and scores.text_to_visual is not None:
        matrices = {f"{name}/": (scores.visual_to_text, scores.text_to_visual), **matrices}
    return matrices


def _with_metrics(result: RetrievalResult, dataset: RetrievalData, world_size: int) -> RetrievalResult:
    """The result with metrics, computed on rank 0 and shared."""
    computed = None
    if result.scores is not None:
        metrics = {
            key: retrieval_metrics(*pair, dataset.texts_of_visual, dataset.visuals_of_text)
            for key, pair in score_matrices(result.name, result.scores).items()
        }
        ties = {key: value.depends_on_ties for key, value in metrics.items()}
        computed = ({key: value.values for key, value in metrics.items()}, ties)
    metrics_by_name, depends_on_ties = share(computed, world_size)
    return replace(result, metrics=metrics_by_name, depends_on_ties=depends_on_ties)
