"""Retrieval: ranks visuals for each text and texts for each visual, by the dual encoder and re-ranked by VTM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from eval.config import EvalConfig, EvalRunConfig
from eval.features import TextFeatures, VisualFeatures, encode_test_set, evaluating, match_marked, missing_visuals
from eval.metrics import Truth, chance_metrics, ordered, retrieval_metrics, row_blocks, top_k_mask, true_ranks
from eval.outcomes import Outcomes, outcomes_of_ranks
from eval.outputs import SplitOutput
from eval.report.gallery import choose_queries, draw_visuals
from eval.tasks.task import Task, TaskResult, common_details
from loaders.evaluation import RetrievalSet
from model.history import History
from model.scoring import joint_scores
from model.singularity import Singularity
from preprocessing.text import Tokenizer
from runtime.collectives import broadcast
from runtime.ranks import ALONE, Ranks

NOT_RERANKED = -100.0  # score of what is not among a query's candidates
LISTED = 10  # items listed for each query in predictions.json


@dataclass(frozen=True)
class Scores:
    """Score matrices in float32 of N visuals and M texts; -inf in the rows and columns of missing visuals.

    similarity (N, M) of the dual encoder; visual_to_text (N, M) and text_to_visual (M, N) re-ranked, -100 outside
    the candidates; None where nothing was re-ranked.
    """

    similarity: np.ndarray
    visual_to_text: np.ndarray | None = None
    text_to_visual: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class RetrievalResult(TaskResult):
    """Metrics "NAME/" re-ranked and "NAME_emb/" dual encoder, official names, percent.

    depends_on_ties: of each entry, the metrics that another order of equal scores would change. history: of the
    model's weights. scores: on rank 0.
    """

    depends_on_ties: dict[str, list[str]]
    history: History = field(default_factory=History)
    scores: Scores | None = None


class RetrievalTask(Task[RetrievalSet, RetrievalResult]):
    """Text-to-visual and visual-to-text retrieval."""

    texts = "captions"

    def open(self, url: str, config: EvalRunConfig) -> RetrievalSet:
        """The corpus' visuals and their distinct captions."""
        return RetrievalSet(url, config, paragraph=config.paragraph)

    def evaluate(
        self,
        model: Singularity,
        dataset: RetrievalSet,
        tokenizer: Tokenizer,
        config: EvalConfig,
        num_frames: int,
        ranks: Ranks = ALONE,
    ) -> RetrievalResult:
        """Score all pairs by the dual encoder, and each query's `k_test` best by VTM where its head was trained."""
        history = model.history
        if not history.matching_trained:
            config = replace(config, k_test=0)
        if config.rerank_score != history.rerank_score:  # the validation ranked otherwise
            history = replace(history, reranks=None)
        start = time.perf_counter()
        with evaluating(model, config):
            visuals, texts = encode_test_set(model, dataset, tokenizer, dataset.texts, config, num_frames, ranks)
            encoded = time.perf_counter()
            scores = score(model, visuals, texts, config, ranks)
        missing = missing_visuals(dataset, visuals.present, ranks)
        seconds = {"encode": encoded - start, "match": time.perf_counter() - encoded}
        computed = _metrics(dataset, scores) if scores is not None else None
        metrics, ties = broadcast(computed, ranks.world_size)
        return RetrievalResult(
            name=dataset.name,
            num_frames=num_frames,
            metrics=metrics,
            missing=missing,
            seconds=seconds,
            depends_on_ties=ties,
            history=history,
            scores=scores,
        )

    def output(self, result: RetrievalResult, dataset: RetrievalSet, config: EvalConfig) -> SplitOutput:
        """Metrics, rankings, score matrices and examples."""
        assert result.scores is not None, "only rank 0 has the scores"
        matrices = score_matrices(result.name, result.scores)
        directions = {key: _directions(*pair, dataset) for key, pair in matrices.items()}
        first = f"{result.name}/" if result.history.prefers_reranking else f"{result.name}_emb/"
        final = directions.get(first, next(iter(directions.values())))
        gallery, shown = _gallery(final, config)
        visuals, pictures = draw_visuals(shown, dataset, result.name, set(result.missing), config.gallery_frames)
        named = {
            "i2t_x": result.scores.visual_to_text,
            "t2i_x": result.scores.text_to_visual,
            "i2t_emb": result.scores.similarity,
        }
        return SplitOutput(
            name=result.name,
            metrics=result.metrics,
            details={
                "task": "retrieval",
                **common_details(result, dataset),
                "num_texts": len(dataset.texts),
                "chance": chance_metrics(dataset.texts_of_visual, dataset.visuals_of_text),
                "depends_on_ties": result.depends_on_ties,
                "matching_trained": result.history.matching_trained,
                "reranks": result.history.reranks,
            },
            outcomes=[_outcomes(key, each) for key, both in directions.items() for each in both],
            predictions={each.kind: _predictions(each) for each in final},
            gallery={**gallery, "visuals": visuals},
            pictures=pictures,
            matrices={key: matrix for key, matrix in named.items() if matrix is not None},
        )


def score(
    model: Singularity, visuals: VisualFeatures, texts: TextFeatures, config: EvalConfig, ranks: Ranks = ALONE
) -> Scores | None:
    """Score matrices from features: dual encoder, then each query's `k_test` best by the match logit.

    A pair that both its text and its visual select is computed once. Returns None on all ranks but 0.
    """
    similarity = (visuals.embeddings @ texts.embeddings.T).cpu().numpy()
    similarity[~visuals.present] = -np.inf
    if config.k_test == 0 and not config.eval_x_only:
        return Scores(similarity) if ranks.is_first else None
    k = max(similarity.shape) if config.eval_x_only else config.k_test
    of_visual = top_k_mask(similarity, k)
    of_text = top_k_mask(similarity.T, k)
    with_similarity = config.rerank_score == "itm+itc"
    matched = match_marked(
        model, visuals, texts, of_visual | of_text.T, config, NOT_RERANKED, ranks, log_odds=with_similarity
    )
    if with_similarity:
        matched = np.where(matched == NOT_RERANKED, matched, joint_scores(model, similarity, matched))
    if not ranks.is_first:
        return None
    visual_to_text = np.where(of_visual, matched, np.float32(NOT_RERANKED))
    text_to_visual = np.where(of_text, matched.T, np.float32(NOT_RERANKED))
    visual_to_text[~visuals.present] = -np.inf
    text_to_visual[:, ~visuals.present] = -np.inf
    return Scores(similarity, visual_to_text, text_to_visual)


def score_matrices(name: str, scores: Scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Visual to text (N, M) and text to visual (M, N) by the entry of metrics.json, the re-ranked ones first."""
    matrices = {f"{name}_emb/": (scores.similarity, scores.similarity.T)}
    if scores.visual_to_text is not None and scores.text_to_visual is not None:
        matrices = {f"{name}/": (scores.visual_to_text, scores.text_to_visual), **matrices}
    return matrices


def _metrics(dataset: RetrievalSet, scores: Scores) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """The metrics by entry of metrics.json, and of each entry those that depend on ties."""
    metrics = {
        key: retrieval_metrics(*pair, dataset.texts_of_visual, dataset.visuals_of_text)
        for key, pair in score_matrices(dataset.name, scores).items()
    }
    ties = {key: value.depends_on_ties for key, value in metrics.items()}
    return {key: value.values for key, value in metrics.items()}, ties


@dataclass(frozen=True)
class _Direction:
    """One direction of retrieval: scores (Q, G) of Q queries and G items, their names, and the true items.

    kind: text_to_visual | visual_to_text. asked: text | visual.
    """

    kind: str
    asked: str
    scores: np.ndarray
    truth: Truth
    queries: Sequence[str]
    items: Sequence[str]


def _directions(visual_to_text: np.ndarray, text_to_visual: np.ndarray, dataset: RetrievalSet) -> list[_Direction]:
    sources, texts = dataset.sources, dataset.texts
    return [
        _Direction("text_to_visual", "text", text_to_visual, dataset.visuals_of_text, texts, sources),
        _Direction("visual_to_text", "visual", visual_to_text, dataset.texts_of_visual, sources, texts),
    ]


def _outcomes(key: str, one: _Direction) -> Outcomes:
    """The ranks of the queries that have a true item; `key` is their entry of metrics.json."""
    asked = [query for query, items in enumerate(one.truth) if items]
    names = [one.queries[query] for query in asked]
    visuals = names if one.asked == "visual" else [one.items[one.truth[query][0]] for query in asked]
    return outcomes_of_ranks(key, one.kind, names, visuals, true_ranks(one.scores, one.truth).by_index)


def _predictions(one: _Direction) -> list[dict[str, Any]]:
    """Each query with its true items and those found first."""
    predictions = []
    for block in row_blocks(*one.scores.shape):
        rows = zip(one.scores[block], top_k_mask(one.scores[block], LISTED))
        for query, (row, marked) in enumerate(rows, start=block.start):
            items = [int(i) for i in ordered(row, np.flatnonzero(marked)) if row[i] > NOT_RERANKED]
            predictions.append(
                {
                    one.asked: one.queries[query],
                    "correct": [one.items[i] for i in one.truth[query]],
                    "found": [{"item": one.items[i], "score": round(float(row[i]), 4)} for i in items],
                }
            )
    return predictions


def _gallery(directions: Sequence[_Direction], config: EvalConfig) -> tuple[dict[str, Any], list[int]]:
    """The chosen queries of both directions with the texts they need, and the visuals to be shown."""
    gallery: dict[str, Any] = {}
    needed: dict[str, set[int]] = {"text": set(), "visual": set()}
    for one, other in zip(directions, reversed(directions)):
        chosen = choose_queries(one.scores, one.truth, config.gallery, NOT_RERANKED)
        gallery[one.kind] = {kind: [asdict(query) for query in queries] for kind, queries in chosen.items()}
        for query in (query for queries in chosen.values() for query in queries):
            needed[one.asked].add(query.query)
            needed[other.asked] |= {query.correct_item, *(hit.item for hit in query.top)}
    gallery["texts"] = {str(text): directions[0].queries[text] for text in sorted(needed["text"])}
    return gallery, sorted(needed["visual"])
