"""Multiple choice: of each item's texts, the one that matches the visual best."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.config import EvalConfig, EvalRunConfig
from eval.features import TextFeatures, VisualFeatures, encode_test_set, evaluating, match_marked, missing_visuals
from eval.metrics import NOT_FINITE
from eval.outputs import SplitOutput
from eval.tasks.questions import questions_output
from eval.tasks.task import Task, TaskResult
from loaders.evaluation import Choice, ChoiceSet
from model.singularity import Singularity
from preprocessing.text import Tokenizer
from runtime.errors import UserError
from runtime.ranks import ALONE, Ranks

NO_CHOICE = -1  # of an item whose visual could not be read


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceResult(TaskResult):
    """Metrics {"NAME": {"overall": percent}}.

    chosen: for each item the number of its option, ties by index, -1 where the visual could not be read (counted as
    wrong); scores: of all its options.
    """

    chosen: list[int]
    scores: list[np.ndarray]


class MultipleChoiceTask(Task[ChoiceSet, MultipleChoiceResult]):
    """Choosing an option for each item by VTM. Items without a known answer are left out of the metric."""

    texts = "choices"

    def open(self, url: str, config: EvalRunConfig) -> ChoiceSet:
        """The corpus' visuals and their options."""
        return ChoiceSet(url, config)

    def evaluate(
        self,
        model: Singularity,
        dataset: ChoiceSet,
        tokenizer: Tokenizer,
        config: EvalConfig,
        num_frames: int,
        ranks: Ranks = ALONE,
    ) -> MultipleChoiceResult:
        """Choose the option with the highest match logit."""
        start = time.perf_counter()
        options = [choice.options for choice in dataset.choices]
        numbers = {text: i for i, text in enumerate(dict.fromkeys(text for texts in options for text in texts))}
        items = [(choice.visual, [numbers[text] for text in choice.options]) for choice in dataset.choices]
        with evaluating(model, config):
            visuals, texts = encode_test_set(model, dataset, tokenizer, list(numbers), config, num_frames, ranks)
            scores = score_options(model, visuals, texts, items, config, ranks)
        if any(np.isnan(row).any() for row in scores):
            raise UserError(NOT_FINITE)
        chosen = [int(row.argmax()) if np.isfinite(row).all() else NO_CHOICE for row in scores]
        known = [(choice.answer, one) for choice, one in zip(dataset.choices, chosen) if choice.answer >= 0]
        correct = sum(answer == one for answer, one in known)
        metrics = {dataset.name: {"overall": round(100 * correct / len(known), 2)}} if known else {}
        return MultipleChoiceResult(
            name=dataset.name,
            num_frames=num_frames,
            metrics=metrics,
            missing=missing_visuals(dataset, visuals.present, ranks),
            seconds={"match": time.perf_counter() - start},
            chosen=chosen,
            scores=scores,
        )

    def output(self, result: MultipleChoiceResult, dataset: ChoiceSet, config: EvalConfig) -> SplitOutput:
        """The options chosen, and examples."""
        items = [
            _item(choice, dataset.sources[choice.visual], chosen, scores)
            for choice, chosen, scores in zip(dataset.choices, result.chosen, result.scores, strict=True)
        ]
        sizes = [len(choice.options) for choice in dataset.choices if choice.answer >= 0]
        details = {
            "task": "choice",
            "protocol": "the option with the highest match score",
            "accuracy": "exact match",
            "chance": {"overall": round(100 * sum(1 / size for size in sizes) / len(sizes), 2)} if sizes else {},
        }
        return questions_output(result, dataset, items, details, result.chosen, config)


def score_options(
    model: Singularity,
    visuals: VisualFeatures,
    texts: TextFeatures,
    items: list[tuple[int, list[int]]],
    config: EvalConfig,
    ranks: Ranks = ALONE,
) -> list[np.ndarray]:
    """Match logits, float32, of each item's options; -inf where the visual is missing.

    items: the visual's number and those of the texts. The same on all ranks.
    """
    pairs = np.zeros((len(visuals.present), len(texts.mask)), dtype=bool)
    for visual, options in items:
        pairs[visual, options] = True
    scores = match_marked(model, visuals, texts, pairs, config, -np.inf, ranks)
    return [scores[visual, options] for visual, options in items]


def _item(choice: Choice, source: str, chosen: int, scores: np.ndarray) -> dict[str, Any]:
    """An item as `questions_output` takes it; shares of options are the softmax of their scores."""
    answered = chosen != NO_CHOICE
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() if answered else np.zeros(len(scores))
    top = [
        {"text": text, "score": round(float(share), 4), "correct": position == choice.answer}
        for position, (text, share) in enumerate(zip(choice.options, shares))
    ]
    return {
        "visual": choice.visual,
        "source": source,
        "question_id": choice.question_id,
        "question": "",
        "options": list(choice.options),
        "question_type": "",
        "answer_type": "",
        "answer": choice.options[chosen] if answered else None,
        "correct": [{"text": choice.options[choice.answer], "share": 1.0}] if choice.answer >= 0 else [],
        "accuracy": float(chosen == choice.answer) if choice.answer >= 0 else None,
        "confidence": float(shares.max()) if answered else 0.0,
        "top": sorted(top, key=lambda option: -option["score"]) if answered else [],
    }
