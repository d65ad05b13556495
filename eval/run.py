"""Evaluates a model on a run's splits, whatever its task, and writes RUN/evaluation/LABEL."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from eval.config import EvalRunConfig
from eval.earlier import SplitInput
from eval.outputs import SplitOutput, Subject, write_evaluation
from eval.report.evaluations import read_evaluation
from eval.report.tables import console_table
from eval.tasks.choice import evaluate_choice
from eval.tasks.qa import evaluate_answers
from eval.tasks.question_output import choice_output, qa_output
from eval.tasks.retrieval import evaluate_retrieval
from eval.tasks.retrieval_output import retrieval_output
from loaders.evaluation import ChoiceSet, QASet, RetrievalSet, VisualSet, corpus_digest
from loaders.shards import describe
from loaders.text import Tokenizer
from model.singularity import Singularity
from model.vqa import SingularityQA
from runtime.activity import begin, progress
from runtime.errors import file_errors
from runtime.ranks import Ranks

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]
FINAL = "final"  # label of the evaluation that ends a training


def evaluate_splits(
    model: Singularity | SingularityQA,
    tokenizer: Tokenizer,
    run: EvalRunConfig,
    ranks: Ranks,
    device: torch.device,
    splits: Iterable[str],
    folder: Path,
    subject: Subject | None = None,
    answers: Sequence[str] = (),
    num_frames: int | None = None,
    save_scores: bool = True,
) -> Metrics:
    """Evaluate `splits` of `run.test_corpus` on all ranks; the first one writes `folder` and logs the table.

    subject: what reports say of the model. answers: that may be given, for questions. num_frames: of a clip, by
    default `video_input.num_frames_test`.
    save_scores: whether scores.npz is written, gigabytes for a large test set.
    Returns the metrics, {"SPLIT/": {...}, "SPLIT_emb/": {...}} or {"SPLIT": {...}}, on all ranks.
    """
    metrics: Metrics = {}
    outputs: list[SplitOutput] = []
    for split, url in run.test_urls().items():
        if split not in splits:
            continue
        begin(f"evaluating {split}")
        one, output = _evaluate_split(
            model, tokenizer, run, ranks, device, split, url, answers, num_frames or run.video_input.num_frames_test
        )
        metrics |= one
        outputs += [output] if output else []
    progress("writing the results")
    if ranks.is_first:
        with file_errors(folder):
            write_evaluation(folder, outputs, run, subject or subject_of(model), save_scores)
        log.info("Evaluation in %s\n%s", folder, console_table([read_evaluation(folder)]))
    return metrics


def _evaluate_split(
    model: Singularity | SingularityQA,
    tokenizer: Tokenizer,
    run: EvalRunConfig,
    ranks: Ranks,
    device: torch.device,
    split: str,
    url: str,
    answers: Sequence[str],
    num_frames: int,
) -> tuple[Metrics, SplitOutput | None]:
    """A split's metrics, and on the first rank what is to be written of it."""
    where = (ranks.rank, ranks.world_size, device)
    if isinstance(model, SingularityQA):
        questions = QASet(url, run)
        questions.name = split
        answered = evaluate_answers(model, questions, tokenizer, answers, run, _frames(questions, num_frames), *where)
        written = qa_output(answered, questions, answers, run) if ranks.is_first else None
        questions.close()
        return answered.metrics, _with_corpus(written, url, questions)
    if run.task == "choice":
        choices = ChoiceSet(url, run)
        choices.name = split
        chosen = evaluate_choice(model, choices, tokenizer, run, _frames(choices, num_frames), *where)
        written = choice_output(chosen, choices, run) if ranks.is_first else None
        choices.close()
        return chosen.metrics, _with_corpus(written, url, choices)
    dataset = RetrievalSet(url, run, paragraph=run.paragraph)
    dataset.name = split
    found = evaluate_retrieval(model, dataset, tokenizer, run, _frames(dataset, num_frames), *where)
    written = retrieval_output(found, dataset, run) if ranks.is_first else None
    dataset.close()
    return found.metrics, _with_corpus(written, url, dataset)


def _with_corpus(output: SplitOutput | None, url: str, dataset: VisualSet) -> SplitOutput | None:
    """What is to be written, with the packed corpus that it comes from."""
    if output is None:
        return None
    return replace(output, details=output.details | {"corpus": {"url": url, "sha256": dataset.digest}})


def split_inputs(run: EvalRunConfig, num_frames: int | None = None) -> dict[str, SplitInput]:
    """What the splits to evaluate are, by their names."""
    found = {}
    for name, url in run.test_urls().items():
        corpus = describe(url, run)
        frames = 1 if corpus.media_type == "image" else num_frames or run.video_input.num_frames_test
        found[name] = SplitInput(url, corpus_digest(corpus), corpus.samples, frames)
    return found


def _frames(dataset: RetrievalSet | QASet | ChoiceSet, num_frames: int) -> int:
    return 1 if dataset.media_type == "image" else num_frames


def subject_of(model: Singularity | SingularityQA, checkpoint: str = "", weights: str = "") -> Subject:
    """What reports say of a model. A word head is what only pre-training leaves."""
    return Subject(
        checkpoint=checkpoint,
        weights=weights,
        zero_shot=isinstance(model, Singularity) and model.word_head is not None,
        temporal=model.temporal_vision_encoder is not None,
    )


def evaluation_label(run: EvalRunConfig, num_frames: int | None = None) -> str:
    """The name of an evaluation's folder: as set, or made of frames and ensemble.

    num_frames: where several evaluations differ by it; it then belongs to any name.
    """
    frames = num_frames or run.video_input.num_frames_test
    count = f"{frames}_frame{'s' if frames > 1 else ''}"
    if run.label is not None:
        return run.label if num_frames is None else f"{run.label}_{count}"
    ensemble = [run.eval_frame_ensemble] if run.eval_frame_ensemble != "concat" else []
    return "_".join([count, *ensemble, *(["all_pairs"] if run.eval_x_only else [])])
