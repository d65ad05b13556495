"""What an evaluation's folder holds of questions and of multiple choice: answers, submissions, and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from eval.config import EvalConfig
from eval.outcomes import TYPES, Outcomes
from eval.outputs import SplitOutput
from eval.report.gallery import PicturedData, draw_visuals
from eval.tasks.answers import answer_baselines
from eval.tasks.choice import NO_CHOICE, ChoiceData, ChoiceResult
from eval.tasks.qa import QAData, QAResult, annotated_by

LISTED = 5  # answers of a question in predictions.json and in the report
EXAMPLES = ("right", "wrong", "random")


class PicturedQuestions(PicturedData, QAData, Protocol):
    """Questions about visuals that can be shown."""


class PicturedChoices(PicturedData, ChoiceData, Protocol):
    """Multiple choice about visuals that can be shown."""


def qa_output(
    result: QAResult, dataset: PicturedQuestions, answer_list: Sequence[str], config: EvalConfig
) -> SplitOutput:
    """Everything to be written of a result on questions."""
    items = [_answered(result, dataset, answer_list, number) for number in range(len(dataset.questions))]
    k = min(config.k_test, len(answer_list))
    baselines = answer_baselines(list(map(annotated_by, dataset.questions)), answer_list, config.accuracy)
    details = {
        "task": "qa",
        "protocol": f"{k} of a list of {len(answer_list)} answers ranked by likelihood",
        "accuracy": {"exact": "exact match", "vqa": "VQA soft accuracy"}[config.accuracy],
        "num_answers": len(answer_list),
        "chance": baselines.chance,
        "constant": {"answer": baselines.answer, "values": baselines.constant},
    }
    return _output(result, dataset, items, details, [item["answer"] or "" for item in items], config)


def choice_output(result: ChoiceResult, dataset: PicturedChoices, config: EvalConfig) -> SplitOutput:
    """Everything to be written of a result on multiple choice, which holds its scores on rank 0."""
    items = [_chosen(result, dataset, number) for number in range(len(dataset.choices))]
    sizes = [len(choice.options) for choice in dataset.choices if choice.answer >= 0]
    details = {
        "task": "choice",
        "protocol": "the option with the highest match score",
        "accuracy": "exact match",
        "chance": {"overall": round(100 * sum(1 / size for size in sizes) / len(sizes), 2)} if sizes else {},
    }
    return _output(result, dataset, items, details, result.chosen, config)


def _output(
    result: QAResult | ChoiceResult,
    dataset: PicturedData,
    items: Sequence[dict[str, Any]],
    details: dict[str, Any],
    submitted: Sequence[str | int],
    config: EvalConfig,
) -> SplitOutput:
    """The output of Q answered questions `items`, with what is `submitted` for each."""
    gallery, pictures = _gallery(items, dataset, result.name, set(result.missing), config)
    known = [item for item in items if item["accuracy"] is not None]
    outcomes = Outcomes(
        result.name,
        "accuracy",
        [item["question_id"] for item in known],
        [item["source"] for item in known],
        np.array([item["accuracy"] for item in known], dtype=np.float64),
        {kind: [item[kind] for item in known] for kind in TYPES},
    )
    return SplitOutput(
        name=result.name,
        metrics=result.metrics,
        details={
            "media_type": dataset.media_type,
            "num_visuals": dataset.num_visuals,
            "num_questions": len(items),
            "num_annotated": len(known),
            "num_unanswered": sum(item["answer"] is None for item in items),
            "num_frames": result.num_frames,
            "missing": {dataset.sources[i]: reason for i, reason in result.missing.items()},
            "seconds": {stage: round(value, 2) for stage, value in result.seconds.items()},
        }
        | details,
        outcomes=[outcomes] if known else [],
        predictions=[_told(item) for item in items],
        gallery=gallery,
        pictures=pictures,
        submission=[
            {"question_id": _number(item["question_id"]), "answer": answer}
            for item, answer in zip(items, submitted, strict=True)
        ],
    )


def _answered(result: QAResult, dataset: PicturedQuestions, answers: Sequence[str], number: int) -> dict[str, Any]:
    question = dataset.questions[number]
    ranked = zip(result.answers[number].tolist(), result.probabilities[number].tolist())
    top = [
        {"text": answers[one], "score": round(probability, 4), "correct": answers[one] in question.answers}
        for one, probability in list(ranked)[:LISTED]
        if one >= 0
    ]
    return {
        "visual": question.visual,
        "source": dataset.sources[question.visual],
        "question_id": question.question_id,
        "question": question.question,
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "answer": result.predictions[number],
        "correct": [
            {"text": text, "share": round(float(share), 4)} for text, share in zip(question.answers, question.weights)
        ],
        "accuracy": result.accuracies[number],
        "confidence": top[0]["score"] if top else 0.0,
        "top": top,
    }


def _chosen(result: ChoiceResult, dataset: PicturedChoices, number: int) -> dict[str, Any]:
    choice, chosen, scores = dataset.choices[number], result.chosen[number], result.scores[number]
    answered = chosen != NO_CHOICE
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() if answered else np.zeros(len(scores))
    top = [
        {"text": text, "score": round(float(share), 4), "correct": place == choice.answer}
        for place, (text, share) in enumerate(zip(choice.options, shares))
    ]
    return {
        "visual": choice.visual,
        "source": dataset.sources[choice.visual],
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


def _gallery(
    items: Sequence[dict[str, Any]], dataset: PicturedData, split: str, missing: set[int], config: EvalConfig
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The surest right and wrong answers and random ones, and their pictures; random ones are the same for two models.

    Without annotations there are only random ones.
    """
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    by_confidence = sorted(range(len(items)), key=lambda i: -items[i]["confidence"])
    wanted: dict[str, tuple[list[int], Callable[[float | None], bool]]] = {
        "right": (by_confidence, lambda value: value is not None and value >= 0.5),
        "wrong": (by_confidence, lambda value: value is not None and value < 0.5),
        "random": (order, lambda _: True),
    }
    examples = {
        kind: [items[i] for i in numbers if fits(items[i]["accuracy"])][: config.gallery]
        for kind, (numbers, fits) in wanted.items()
    }
    shown = sorted({item["visual"] for chosen in examples.values() for item in chosen})
    visuals, pictures = draw_visuals(shown, dataset, split, missing, config.gallery_frames)
    return {"examples": examples, "visuals": visuals}, pictures


def _told(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("visual", "confidence")}


def _number(question_id: str) -> int | str:
    """Question ids are numbers where the benchmark's are."""
    return int(question_id) if question_id.isdecimal() else question_id
