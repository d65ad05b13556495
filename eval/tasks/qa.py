"""Question answering: ranks a closed list of answers for each question about a visual."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from eval.cache import Block, CachedBlocks
from eval.config import EvalConfig
from eval.features import TextEncoding, VisualData, missing_visuals, visual_blocks
from eval.metrics import NOT_FINITE
from eval.tasks.answers import Annotated, accuracies, accuracy_by_type
from loaders.evaluation import Question
from model.vqa import SingularityQA
from runtime.activity import progress
from runtime.collectives import gather_rows
from runtime.errors import UserError

QUESTIONS_AT_ONCE = 16
ANNOTATORS = 10  # of a VQA question


class QAData(VisualData, Protocol):
    """What evaluation needs of a test set; `loaders.evaluation.QASet` is one."""

    questions: list[Question]


@dataclass(frozen=True)
class QAResult:
    """One test set's evaluation, the same on all ranks.

    metrics: {"NAME": {"overall": percent, "answer_type/X": ...}}, nothing where no question is annotated. answers
    (Q, k) int64: numbers in the answer list, likeliest first, -1 where the visual could not be read; probabilities
    (Q, k) float32 among the k. predictions: each question's likeliest answer; accuracies: in [0, 1], 0 without a
    prediction, none where nobody has annotated the question.
    """

    name: str
    num_frames: int
    metrics: dict[str, dict[str, float]]
    answers: np.ndarray
    probabilities: np.ndarray
    predictions: list[str | None]
    accuracies: list[float | None]
    missing: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def evaluate_answers(
    model: SingularityQA,
    dataset: QAData,
    tokenizer: TextEncoding,
    answer_list: Sequence[str],
    config: EvalConfig,
    num_frames: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> QAResult:
    """Rank `answer_list` for every question: the `k_test` with the likeliest first word, by their likelihood.

    To be called by all ranks; parameters otherwise as `eval.tasks.retrieval.evaluate_retrieval`. Raises ValueError for
    an empty list and for settings that do not fit the model.
    """
    model.check_ensemble(config.eval_frame_ensemble, config.ensemble_skips_temporal)
    if not answer_list:
        raise UserError("the answer list is empty: give the answers that may be given, one string each")
    if config.k_test < 1:
        raise UserError(f"k_test is {config.k_test}, must be at least 1 for question answering")
    start = time.perf_counter()
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            questions = tokenizer.encode([item.question for item in dataset.questions], dataset.config.max_q_len)
            length = getattr(dataset.config.max_a_len, dataset.media_type)
            candidates = tokenizer.encode([f"{answer} [SEP]" for answer in answer_list], length)
            owners = np.array([item.visual for item in dataset.questions])
            blocks = visual_blocks(model, dataset, config, num_frames, rank, world_size, device)
            hidden = rank > 0 or not isinstance(blocks, CachedBlocks)  # encoding, as one goes, has its own bar
            bar = tqdm(blocks, desc=f"answering {dataset.name}", leave=False, disable=hidden or None)
            own = [rank_for_block(model, block, questions, owners, candidates, config) for block in bar]
    finally:
        model.train(training)
    k = min(config.k_test, len(answer_list))
    answers = np.full((len(owners), k), -1)
    probabilities = np.zeros((len(owners), k), dtype=np.float32)
    nothing = (torch.empty(0, dtype=torch.int64), torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
    rows, ids, values = (gather_rows(torch.cat(part), world_size).numpy() for part in zip(nothing, *own))
    if np.isnan(values).any():
        raise UserError(NOT_FINITE)
    answers[rows], probabilities[rows] = ids, values
    predictions = [answer_list[first] if first >= 0 else None for first in answers[:, 0].tolist()]
    annotated = [annotated_by(item) for item in dataset.questions]
    each = accuracies(annotated, predictions, config.accuracy)
    table = accuracy_by_type(annotated, each)
    present = np.ones(dataset.num_visuals, dtype=bool)
    present[owners[answers[:, 0] < 0]] = False
    return QAResult(
        name=dataset.name,
        num_frames=num_frames,
        metrics={dataset.name: table} if table else {},
        answers=answers,
        probabilities=probabilities,
        predictions=predictions,
        accuracies=each,
        missing=missing_visuals(dataset, present, world_size),
        seconds={"answer": time.perf_counter() - start},
    )


def rank_for_block(
    model: SingularityQA,
    block: Block,
    questions: tuple[torch.Tensor, torch.Tensor],
    owners: np.ndarray,
    candidates: tuple[torch.Tensor, torch.Tensor],
    config: EvalConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank the candidates for all questions about a block of visuals.

    questions: ids and mask (Q, Lq) of all questions; owners (Q,): the visual of each; candidates: ids and mask
    (C, La). Returns for n questions their numbers (n,), and the k best candidates and their probabilities, both
    (n, k), on the CPU.
    """
    device = model.temporal_embeddings.device
    tokens = block.tokens.to(device)
    place = {int(visual): row for row, visual in enumerate(block.indices)}
    mine = np.flatnonzero(np.isin(owners, block.indices))
    answer_ids, answer_mask = (part.to(device) for part in candidates)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(mine), QUESTIONS_AT_ONCE):
        progress(f"answering about {len(block.indices)} visuals, question {start} of {len(mine)}")
        numbers = mine[start : start + QUESTIONS_AT_ONCE]
        ids, mask = (part[torch.from_numpy(numbers)].to(device) for part in questions)
        seen = tokens[[place[int(owners[number])] for number in numbers]]
        states = model.frame_states(seen, ids, mask)
        best, probability = model.rank_answers(
            states, mask, answer_ids, answer_mask, config.k_test, config.eval_frame_ensemble
        )
        found.append((best.cpu(), probability.float().cpu()))
    k = min(config.k_test, len(answer_ids))
    empty = (torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
    best, probability = (torch.cat(part) for part in zip(empty, *found))
    return torch.from_numpy(mine), best, probability


def annotated_by(question: Question) -> Annotated:
    """The annotators' answers one by one, from the distinct ones and their shares: ten where the shares allow it."""
    shares = [Fraction(float(weight)).limit_denominator(100) for weight in question.weights]
    fewest = lcm(*(share.denominator for share in shares))
    annotators = ANNOTATORS if ANNOTATORS % fewest == 0 else fewest
    answers = [a for a, share in zip(question.answers, shares) for _ in range(round(share * annotators))]
    return Annotated(answers, question.question_type, question.answer_type)
