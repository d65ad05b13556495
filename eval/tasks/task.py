"""The interface of an evaluation task: open a test set, evaluate a model on it, make the output to be written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from eval.config import EvalConfig, EvalRunConfig
from eval.outputs import SplitOutput
from loaders.evaluation import VisualSet
from preprocessing.text import Tokenizer
from runtime.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One test set's evaluation; all but the largest arrays are the same on all ranks.

    metrics: entries of metrics.json, {"NAME": {"overall": percent, ...}}; the first metric, or the one called overall,
    chooses the best checkpoint. missing: visuals that could not be read and why. seconds: by stage.
    """

    name: str
    num_frames: int
    metrics: dict[str, dict[str, float]]
    missing: dict[int, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


TestSet = TypeVar("TestSet", bound=VisualSet)
Result = TypeVar("Result", bound=TaskResult)


class Task(Generic[TestSet, Result]):
    """One evaluation task, an entry of `eval.run.TASKS`. A new one defines `open` and `evaluate`."""

    texts = "captions"  # what a packed corpus must hold: captions | questions | choices

    def __init__(self, config: EvalRunConfig | None = None) -> None:
        """config: of the run, for what the task checks or reads at the start."""

    def open(self, url: str, config: EvalRunConfig) -> TestSet:
        """Open a packed corpus as the task's test set."""
        raise NotImplementedError

    def evaluate(
        self,
        model: Any,
        dataset: TestSet,
        tokenizer: Tokenizer,
        config: EvalConfig,
        num_frames: int,
        ranks: Ranks = ALONE,
    ) -> Result:
        """Evaluate `model` on its device with `num_frames` frames per clip; called by all ranks.

        The result does not depend on the number of ranks, nor on the batch sizes, beyond rounding. Raises UserError
        for settings that do not fit the model.
        """
        raise NotImplementedError

    def output(self, result: Result, dataset: TestSet, config: EvalConfig) -> SplitOutput:
        """What is written of a result, here its metrics; called by rank 0."""
        details = {"task": config.task, "items_sha256": dataset.digest, **common_details(result, dataset)}
        return SplitOutput(result.name, result.metrics, details, [], [], {"examples": {}, "visuals": {}})


def common_details(result: TaskResult, dataset: VisualSet) -> dict[str, Any]:
    """The entry of a test set in evaluation.json, common to all tasks."""
    return {
        "media_type": dataset.media_type,
        "num_visuals": dataset.num_visuals,
        "num_frames": result.num_frames,
        "missing": {dataset.sources[i]: reason for i, reason in result.missing.items()},
        "seconds": {stage: round(value, 2) for stage, value in result.seconds.items()},
    }
