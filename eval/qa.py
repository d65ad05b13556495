"""Question answering: ranks a closed list of answers for each question about a visual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import Protocol

import numpy as np
import torch

from eval.answers import Annotated, exact_accuracy, vqa_accuracy
from eval.config import EvalConfig
from eval.features import TextEncoding, VisualData, check_ensemble, encode_tokens, missing_visuals, pixel_batches
from eval.gather import gather_rows
from loaders.evaluation import Question
from model.answering import SingularityQA

QUESTIONS_AT_ONCE = 16
ANNOTATORS = 10  # of a VQA question


class QAData(VisualData, Protocol):
    """What evaluation needs of a test set; `loaders.evaluation.QASet` is one."""

    questions: list[Question]


@dataclass(frozen=True)
class QAResult:
    """The same on all ranks.

    metrics: {"NAME": {"overall": percent, "answer_type/X": ...}}. answers (Q, k) int64: numbers in the answer list,
    likeliest first, -1 where the visual could not be read (counted as wrong); probabilities (Q, k) float32 among
    the k. predictions: the likeliest answer by question id.
    """

    name: str
    metrics: dict[str, dict[str, float]]
    answers: np.ndarray
    probabilities: np.ndarray
    predictions: dict[str, str]
    missing: dict[int, str] = field(default_factory=dict)


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
    soft: bool = False,
    max_question_length: int = 25,
    max_answer_length: int = 5,
) -> QAResult:
    """Rank `answer_list` for every question: the `k_test` with the likeliest first word, by their likelihood.

    soft: VQA's accuracy, which gives part of a point; otherwise exact match. To be called by all ranks. Raises
    ValueError for an empty list and for settings that do not fit the model.
    """
    check_ensemble(model, config)
    if not answer_list:
        raise ValueError("the answer list is empty: give the answers that may be given, one string each")
    if config.k_test < 1:
        raise ValueError(f"k_test is {config.k_test}, must be at least 1 for question answering")
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            questions = tokenizer.encode([item.question for item in dataset.questions], max_question_length)
            candidates = tokenizer.encode([f"{answer} [SEP]" for answer in answer_list], max_answer_length)
            owners = np.array([item.visual for item in dataset.questions])
            pixels = pixel_batches(model, dataset, config, num_frames, rank, world_size, device)
            own = [
                rank_for_block(model, frames, indices.numpy(), questions, owners, candidates, config)
                for frames, indices in pixels
            ]
    finally:
        model.train(training)
    k = min(config.k_test, len(answer_list))
    answers = np.full((len(owners), k), -1)
    probabilities = np.zeros((len(owners), k), dtype=np.float32)
    nothing = (torch.empty(0, dtype=torch.int64), torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
    rows, ids, values = (gather_rows(torch.cat(part), world_size).numpy() for part in zip(nothing, *own))
    answers[rows], probabilities[rows] = ids, values
    predictions = {
        item.question_id: answer_list[first]
        for item, first in zip(dataset.questions, answers[:, 0].tolist())
        if first >= 0
    }
    annotated = {item.question_id: _annotated(item) for item in dataset.questions}
    present = np.ones(dataset.num_visuals, dtype=bool)
    present[owners[answers[:, 0] < 0]] = False
    return QAResult(
        dataset.name,
        {dataset.name: (vqa_accuracy if soft else exact_accuracy)(annotated, predictions)},
        answers,
        probabilities,
        predictions,
        missing_visuals(dataset, present, world_size),
    )


def rank_for_block(
    model: SingularityQA,
    frames: torch.Tensor,
    visuals: np.ndarray,
    questions: tuple[torch.Tensor, torch.Tensor],
    owners: np.ndarray,
    candidates: tuple[torch.Tensor, torch.Tensor],
    config: EvalConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank the candidates for all questions about some visuals, which are encoded once.

    frames (B, T, 3, H, W) of the visuals `visuals` (B,); questions: ids and mask (Q, Lq) of all questions; owners
    (Q,): the visual of each; candidates: ids and mask (C, La). Returns for n questions their numbers (n,), and the k
    best candidates and their probabilities, both (n, k), on the CPU.
    """
    tokens, _ = encode_tokens(model, frames, config)
    place = {int(visual): row for row, visual in enumerate(visuals)}
    mine = np.flatnonzero(np.isin(owners, visuals))
    answer_ids, answer_mask = (part.to(frames.device) for part in candidates)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(mine), QUESTIONS_AT_ONCE):
        numbers = mine[start : start + QUESTIONS_AT_ONCE]
        ids, mask = (part[torch.from_numpy(numbers)].to(frames.device) for part in questions)
        seen = tokens[[place[int(owners[number])] for number in numbers]]
        states = [model.question_states(seen[:, frame], ids, mask) for frame in range(seen.shape[1])]
        best, probability = model.rank_answers(
            states, mask, answer_ids, answer_mask, config.k_test, config.eval_frame_ensemble
        )
        found.append((best.cpu(), probability.float().cpu()))
    k = min(config.k_test, len(answer_ids))
    empty = (torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
    best, probability = (torch.cat(part) for part in zip(empty, *found))
    return torch.from_numpy(mine), best, probability


def server_form(predictions: Mapping[str, str]) -> list[dict[str, int | str]]:
    """Predictions as the VQA evaluation server takes them: [{"question_id": 1, "answer": "red"}, ...]."""
    return [
        {"question_id": int(number) if number.isdecimal() else number, "answer": answer}
        for number, answer in predictions.items()
    ]


def _annotated(question: Question) -> Annotated:
    """The annotators' answers one by one, from the distinct ones and their shares: ten where the shares allow it."""
    shares = [Fraction(float(weight)).limit_denominator(100) for weight in question.weights]
    fewest = lcm(*(share.denominator for share in shares))
    annotators = ANNOTATORS if ANNOTATORS % fewest == 0 else fewest
    answers = [a for a, share in zip(question.answers, shares) for _ in range(round(share * annotators))]
    return Annotated(answers, question.question_type, question.answer_type)
