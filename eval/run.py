"""Evaluates a model on a run's splits, whatever its task, and writes RUN/evaluation/LABEL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.config import EvalRunConfig
from eval.earlier import SplitInput
from eval.outputs import SplitOutput, Subject, write_evaluation
from eval.report.evaluations import read_evaluation
from eval.report.tables import console_table
from eval.tasks.multiple_choice import MultipleChoiceTask
from eval.tasks.qa import QATask, read_answer_list
from eval.tasks.retrieval import RetrievalTask
from eval.tasks.task import Task
from loaders.evaluation import corpus_digest
from loaders.shards import describe
from model.building import Model
from model.singularity import Singularity
from preprocessing.text import Tokenizer
from runtime.activity import begin, progress
from runtime.collectives import broadcast
from runtime.errors import UserError, file_errors
from runtime.plugins import Registry
from runtime.ranks import Ranks

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]
FINAL = "final"  # label of the evaluation that ends a training

# What makes the task that `task` names, from the settings of the run: a class of tasks, or a function.
TASKS: Registry[Callable[[EvalRunConfig], Task[Any, Any]]] = Registry("task")
TASKS("retrieval")(lambda _: RetrievalTask())
TASKS("qa")(lambda config: QATask(read_answer_list(config)))
TASKS("choice")(lambda _: MultipleChoiceTask())


def make_task(run: EvalRunConfig) -> Task[Any, Any]:
    """The task that `run.task` names.

    Raises UserError if there is none of this name, a setting of it is invalid, or a split is not a corpus with the
    texts that it needs.
    """
    task = TASKS[run.task](run)
    for name, url in run.test_urls().items():
        progress(f"checking {url}")
        if not sum(describe(url, run).counts(task.texts)):
            raise UserError(f"test_corpus.{name}: {url} has no {task.texts}, which task={run.task} needs")
    return task


def evaluate_splits(
    task: Task[Any, Any],
    model: Model,
    tokenizer: Tokenizer,
    run: EvalRunConfig,
    ranks: Ranks,
    splits: Iterable[str],
    folder: Path,
    subject: Subject | None = None,
    num_frames: int | None = None,
    save_scores: bool = True,
) -> Metrics:
    """Evaluate `splits` of `run.test_corpus` on all ranks; rank 0 writes `folder` and logs the table.

    subject: the model in reports. num_frames: frames per clip, by default `video_input.num_frames_test`.
    save_scores: whether scores.npz is written, gigabytes for a large test set.
    Returns the metrics, {"SPLIT/": {...}, "SPLIT_emb/": {...}} or {"SPLIT": {...}}, on all ranks.
    """
    metrics: Metrics = {}
    outputs: list[SplitOutput] = []
    for split, url in run.test_urls().items():
        if split not in splits:
            continue
        begin(f"evaluating {split}")
        dataset = task.open(url, run)
        dataset.name = split
        frames = _frames(dataset.media_type, run, num_frames)
        result = task.evaluate(model, dataset, tokenizer, run, frames, ranks)
        found = broadcast(result.metrics, ranks.world_size)  # a task of a user's may compute them on rank 0 only
        _check_names(run.task, split, found)
        metrics |= found
        if ranks.is_first:
            output = task.output(result, dataset, run)
            corpus = {"url": url, "sha256": dataset.digest}
            outputs.append(replace(output, details=output.details | {"corpus": corpus}))
        dataset.close()
    progress("writing the results")
    if ranks.is_first:
        with file_errors(folder):
            write_evaluation(folder, outputs, run, subject or subject_of(model), save_scores)
        log.info("Evaluation in %s\n%s", folder, console_table([read_evaluation(folder)]))
    return metrics


def _check_names(task: str, split: str, metrics: Metrics) -> None:
    """Raise UserError for metrics of a task by other names than its split's: tables and `stop_key` read those only."""
    known = {split, f"{split}/", f"{split}_emb/"}
    if not metrics.keys() <= known:
        raise UserError(
            f"task={task} returned metrics named {', '.join(sorted(metrics.keys() - known))}: return one entry named "
            f"dataset.name with all metrics in it, {{{split!r}: {{'overall': 50.0, ...}}}}"
        )


def split_inputs(run: EvalRunConfig, num_frames: int | None = None) -> dict[str, SplitInput]:
    """Corpus, size and frames of the splits to evaluate, by name."""
    found = {}
    for name, url in run.test_urls().items():
        corpus = describe(url, run)
        frames = _frames(corpus.media_type, run, num_frames)
        found[name] = SplitInput(url, corpus_digest(corpus), corpus.samples, frames)
    return found


def _frames(media_type: str, run: EvalRunConfig, num_frames: int | None) -> int:
    return 1 if media_type == "image" else num_frames or run.video_input.num_frames_test


def subject_of(model: Model, checkpoint: str = "", weights: str = "") -> Subject:
    """The model in reports. Zero-shot: the model still has its MLM head, which the recipes remove in fine-tuning."""
    return Subject(
        checkpoint=checkpoint,
        weights=weights,
        zero_shot=isinstance(model, Singularity) and model.word_head is not None,
        temporal=model.temporal_vision_encoder is not None,
        started_from=model.history.origin,
    )


def evaluation_label(run: EvalRunConfig, num_frames: int | None = None) -> str:
    """The name of an evaluation's folder: as set, or made of frames and ensemble.

    num_frames: given where several evaluations differ by it; then it is part of any name.
    """
    frames = num_frames or run.video_input.num_frames_test
    count = f"{frames}_frame{'s' if frames > 1 else ''}"
    if run.label is not None:
        return run.label if num_frames is None else f"{run.label}_{count}"
    ensemble = [run.eval_frame_ensemble] if run.eval_frame_ensemble != "concat" else []
    return "_".join([count, *ensemble, *(["all_pairs"] if run.eval_x_only else [])])
