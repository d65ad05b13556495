"""Multiple choice: of each item's texts, the one that matches the visual best."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
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
from eval.metrics import NOT_FINITE
from loaders.evaluation import Choice
from model.singularity import Singularity
from runtime.collectives import share
from runtime.errors import UserError

NO_CHOICE = -1  # of an item whose visual could not be read


class ChoiceData(VisualData, Protocol):
    """What evaluation needs of a test set; `loaders.evaluation.ChoiceSet` is one."""

    choices: list[Choice]


@dataclass(frozen=True)
class ChoiceResult:
    """One test set's evaluation, the same on all ranks. metrics: {"NAME": {"overall": percent}}.

    chosen: for each item the number of its option, ties by index, -1 where the visual could not be read (counted as
    wrong); scores: of all its options.
    """

    name: str
    num_frames: int
    metrics: dict[str, dict[str, float]]
    missing: dict[int, str] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def evaluate_choice(
    model: Singularity,
    dataset: ChoiceData,
    tokenizer: TextEncoding,
    config: EvalConfig,
    num_frames: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
) -> ChoiceResult:
    """Choose an option for each item; parameters and errors as `eval.tasks.retrieval.evaluate_retrieval`.

    Items without a known answer are predicted, and left out of the metric.
    """
    model.check_ensemble(config.eval_frame_ensemble, config.ensemble_skips_temporal)
    start = time.perf_counter()
    length = max_length or int(getattr(dataset.config.max_txt_l, dataset.media_type))
    options = [choice.options for choice in dataset.choices]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(text for texts in options for text in texts))}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            blocks = visual_blocks(model, dataset, config, num_frames, rank, world_size, device)
            visuals = collect_visuals(model, blocks, dataset.num_visuals, config, world_size)
            texts = encode_texts(model, *tokenizer.encode(list(numbers), length), rank, world_size)
            items = [(choice.visual, [numbers[text] for text in choice.options]) for choice in dataset.choices]
            scores = score_options(model, visuals, texts, items, config, world_size, rank)
    finally:
        model.train(training)
    if any(np.isnan(row).any() for row in scores):
        raise UserError(NOT_FINITE)
    chosen = [int(row.argmax()) if np.isfinite(row).all() else NO_CHOICE for row in scores]
    known = [(choice.answer, one) for choice, one in zip(dataset.choices, chosen) if choice.answer >= 0]
    correct = sum(answer == one for answer, one in known)
    metrics = {dataset.name: {"overall": round(100 * correct / len(known), 2)}} if known else {}
    missing = missing_visuals(dataset, visuals.present, world_size)
    seconds = {"match": time.perf_counter() - start}
    return ChoiceResult(dataset.name, num_frames, share(metrics, world_size), missing, chosen, scores, seconds)


def score_options(
    model: Singularity,
    visuals: VisualFeatures,
    texts: TextFeatures,
    items: list[tuple[int, list[int]]],
    config: EvalConfig,
    world_size: int = 1,
    rank: int = 0,
) -> list[np.ndarray]:
    """Match logits, float32, of each item's options; -inf where the visual is missing.

    items: the visual's number and those of the texts. The same on all ranks.
    """
    pairs = np.zeros((len(visuals.present), len(texts.mask)), dtype=bool)
    for visual, options in items:
        pairs[visual, options] = True
    scores = match_marked(model, visuals, texts, pairs, config, -np.inf, rank, world_size)
    return [scores[visual, options] for visual, options in items]
