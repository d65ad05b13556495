"""The output of answered questions, shared by question answering and multiple choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.config import EvalConfig
from eval.outcomes import TYPES, Outcomes
from eval.outputs import SplitOutput
from eval.report.gallery import draw_visuals
from eval.tasks.task import TaskResult, common_details
from loaders.evaluation import VisualSet


def questions_output(
    result: TaskResult,
    dataset: VisualSet,
    items: Sequence[dict[str, Any]],
    details: dict[str, Any],
    submitted: Sequence[str | int],
    config: EvalConfig,
) -> SplitOutput:
    """The output of Q answered questions `items`, with the answers `submitted` to the benchmark.

    An item is an entry of predictions.json with two more keys: `visual`, its number, and `confidence`, by which
    examples are chosen.
    """
    gallery, pictures = _gallery(items, dataset, result, config)
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
            **common_details(result, dataset),
            "num_questions": len(items),
            "num_annotated": len(known),
            "num_unanswered": sum(item["answer"] is None for item in items),
            **details,
        },
        outcomes=[outcomes] if known else [],
        predictions=[
            {key: value for key, value in item.items() if key not in ("visual", "confidence")} for item in items
        ],
        gallery=gallery,
        pictures=pictures,
        submission=[
            {"question_id": _number(item["question_id"]), "answer": answer}
            for item, answer in zip(items, submitted, strict=True)
        ],
    )


def _gallery(
    items: Sequence[dict[str, Any]], dataset: VisualSet, result: TaskResult, config: EvalConfig
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The most confident right and wrong answers, random ones, and their pictures.

    The random ones are the same for two models. Without annotations there are only random ones.
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
    visuals, pictures = draw_visuals(shown, dataset, result.name, set(result.missing), config.gallery_frames)
    return {"examples": examples, "visuals": visuals}, pictures


def _number(question_id: str) -> int | str:
    """Question ids are numbers where the benchmark's are."""
    return int(question_id) if question_id.isdecimal() else question_id
