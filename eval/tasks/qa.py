"""Question answering: ranks a closed list of answers for each question about a visual."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import fsspec
import numpy as np
import torch
from tqdm import tqdm

from eval.cache import Block, CachedBlocks
from eval.config import EvalConfig, EvalRunConfig
from eval.features import evaluating, missing_visuals, visual_blocks
from eval.metrics import NOT_FINITE
from eval.outputs import SplitOutput
from eval.tasks.answers import Annotated, accuracies, accuracy_by_type, answer_baselines
from eval.tasks.questions import questions_output
from eval.tasks.task import Task, TaskResult
from loaders.evaluation import QASet, Question
from model.vqa import SingularityQA
from preprocessing.text import Tokenizer
from runtime.activity import progress
from runtime.collectives import gather_rows
from runtime.errors import MissingError, UserError
from runtime.ranks import ALONE, Ranks

QUESTIONS_AT_ONCE = 16
ANNOTATORS = 10  # of a VQA question
LISTED = 5  # answers of a question in predictions.json and in the report


@dataclass(frozen=True, kw_only=True)
class QAResult(TaskResult):
    """Metrics {"NAME": {"overall": percent, "answer_type/X": ...}}, nothing where no question is annotated.

    answers (Q, k) int64: numbers in the answer list, most likely first, -1 where the visual could not be read;
    probabilities (Q, k) float32 among the k. predictions: each question's most likely answer; accuracies: in [0, 1], 0
    without a prediction, None where the question is not annotated.
    """

    answers: np.ndarray
    probabilities: np.ndarray
    predictions: list[str | None]
    accuracies: list[float | None]


class QATask(Task[QASet, QAResult]):
    """Answering each question with one of `answers`, at least one."""

    texts = "questions"

    def __init__(self, answers: Sequence[str]) -> None:
        if not answers:
            raise UserError("the answer list is empty: give the candidate answers, one string each")
        self.answers = answers

    def open(self, url: str, config: EvalRunConfig) -> QASet:
        """The corpus' visuals and the questions about them."""
        return QASet(url, config)

    def evaluate(
        self,
        model: SingularityQA,
        dataset: QASet,
        tokenizer: Tokenizer,
        config: EvalConfig,
        num_frames: int,
        ranks: Ranks = ALONE,
    ) -> QAResult:
        """Rank the answers for every question: the `k_test` with the most likely first token, by their likelihood."""
        if config.k_test < 1:
            raise UserError(f"k_test is {config.k_test}, must be at least 1 for question answering")
        start = time.perf_counter()
        owners = np.array([item.visual for item in dataset.questions])
        with evaluating(model, config):
            asked = dataset.as_written((item.question for item in dataset.questions), tokenizer.clean)
            questions = tokenizer.encode(asked, dataset.config.max_q_len)
            length = getattr(dataset.config.max_a_len, dataset.media_type)
            candidates = tokenizer.encode(list(map(tokenizer.answer, self.answers)), length)
            blocks = visual_blocks(model, dataset, config, num_frames, ranks)
            # Encoding while iterating has its own progress bar.
            hidden = not ranks.is_first or not isinstance(blocks, CachedBlocks)
            bar = tqdm(blocks, desc=f"answering {dataset.name}", leave=False, disable=hidden or None)
            own = [rank_for_block(model, block, questions, owners, candidates, config) for block in bar]
        k = min(config.k_test, len(self.answers))
        nothing = (torch.empty(0, dtype=torch.int64), torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
        rows, ids, values = (gather_rows(torch.cat(part), ranks.world_size).numpy() for part in zip(nothing, *own))
        if np.isnan(values).any():
            raise UserError(NOT_FINITE)
        answers = np.full((len(owners), k), -1)
        probabilities = np.zeros((len(owners), k), dtype=np.float32)
        answers[rows], probabilities[rows] = ids, values
        predictions = [self.answers[first] if first >= 0 else None for first in answers[:, 0].tolist()]
        annotated = [annotator_answers(item) for item in dataset.questions]
        each = accuracies(annotated, predictions, config.accuracy)
        table = accuracy_by_type(annotated, each)
        present = np.ones(dataset.num_visuals, dtype=bool)
        present[owners[answers[:, 0] < 0]] = False
        return QAResult(
            name=dataset.name,
            num_frames=num_frames,
            metrics={dataset.name: table} if table else {},
            missing=missing_visuals(dataset, present, ranks),
            seconds={"answer": time.perf_counter() - start},
            answers=answers,
            probabilities=probabilities,
            predictions=predictions,
            accuracies=each,
        )

    def output(self, result: QAResult, dataset: QASet, config: EvalConfig) -> SplitOutput:
        """The answers, baselines that ignore the visual, and examples."""
        items = [self._item(result, dataset, number) for number in range(len(dataset.questions))]
        k = min(config.k_test, len(self.answers))
        baselines = answer_baselines(list(map(annotator_answers, dataset.questions)), self.answers, config.accuracy)
        details = {
            "task": "qa",
            "protocol": f"{k} of a list of {len(self.answers)} answers ranked by likelihood",
            "accuracy": {"exact": "exact match", "vqa": "VQA soft accuracy"}[config.accuracy],
            "num_answers": len(self.answers),
            "chance": baselines.chance,
            "constant": {"answer": baselines.answer, "values": baselines.constant},
        }
        return questions_output(result, dataset, items, details, [item["answer"] or "" for item in items], config)

    def _item(self, result: QAResult, dataset: QASet, number: int) -> dict[str, Any]:
        """A question as `questions_output` takes it."""
        question = dataset.questions[number]
        ranked = zip(result.answers[number].tolist(), result.probabilities[number].tolist())
        top = [
            {"text": self.answers[one], "score": round(value, 4), "correct": self.answers[one] in question.answers}
            for one, value in list(ranked)[:LISTED]
            if one >= 0
        ]
        shares = zip(question.answers, question.weights)
        return {
            "visual": question.visual,
            "source": dataset.sources[question.visual],
            "question_id": question.question_id,
            "question": question.question,
            "question_type": question.question_type,
            "answer_type": question.answer_type,
            "answer": result.predictions[number],
            "correct": [{"text": text, "share": round(float(share), 4)} for text, share in shares],
            "accuracy": result.accuracies[number],
            "confidence": top[0]["score"] if top else 0.0,
            "top": top,
        }


def read_answer_list(config: EvalRunConfig) -> list[str]:
    """The answers in `config.answer_list`.

    Raises MissingError, or UserError when the setting is missing or the file is not a list of texts.
    """
    path = config.answer_list
    if path is None:
        raise UserError("answer_list is not set: give a JSON list of the candidate answers, answer_list=FILE")
    try:
        with fsspec.open(path, "rt", encoding="utf-8", **dict(config.storage)) as file:
            answers = json.load(file)
    except FileNotFoundError:
        raise MissingError(f"answer_list={path} does not exist: give a JSON list of answers") from None
    except ValueError as error:
        raise UserError(f"answer_list={path} is not JSON ({error}): give a JSON list of answers") from None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"answer_list={path} must be a JSON list of texts, one for each answer")
    return answers


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
    row_of_visual = {int(visual): row for row, visual in enumerate(block.indices)}
    mine = np.flatnonzero(np.isin(owners, block.indices))
    answer_ids, answer_mask = (part.to(device) for part in candidates)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(mine), QUESTIONS_AT_ONCE):
        progress(f"answering about {len(block.indices)} visuals, question {start} of {len(mine)}")
        numbers = mine[start : start + QUESTIONS_AT_ONCE]
        ids, mask = (part[torch.from_numpy(numbers)].to(device) for part in questions)
        seen = tokens[[row_of_visual[int(owners[number])] for number in numbers]]
        states = model.frame_states(seen, ids, mask)
        best, probability = model.rank_answers(
            states, mask, answer_ids, answer_mask, config.k_test, config.eval_frame_ensemble
        )
        found.append((best.cpu(), probability.float().cpu()))
    k = min(config.k_test, len(answer_ids))
    empty = (torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
    best, probability = (torch.cat(part) for part in zip(empty, *found))
    return torch.from_numpy(mine), best, probability


def annotator_answers(question: Question) -> Annotated:
    """Each annotator's answer, from the distinct answers and their shares: ten annotators where the shares allow it."""
    shares = [Fraction(float(weight)).limit_denominator(100) for weight in question.weights]
    fewest = lcm(*(share.denominator for share in shares))
    annotators = ANNOTATORS if ANNOTATORS % fewest == 0 else fewest
    answers = [a for a, share in zip(question.answers, shares) for _ in range(round(share * annotators))]
    return Annotated(answers, question.question_type, question.answer_type)
