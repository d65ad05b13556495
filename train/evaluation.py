"""Evaluates a model on a run's splits and writes RUN/evaluation/LABEL."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from eval.outputs import write_evaluation
from eval.report import console_table, read_evaluation
from eval.retrieval import RetrievalResult, evaluate_retrieval
from loaders.evaluation import RetrievalSet
from loaders.text import Tokenizer
from model.singularity import Singularity
from train.config import RunConfig
from train.ranks import Ranks

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]


def evaluate_splits(
    model: Singularity,
    tokenizer: Tokenizer,
    run: RunConfig,
    ranks: Ranks,
    device: torch.device,
    splits: Iterable[str],
    folder: Path,
    checkpoint: str = "",
) -> Metrics:
    """Evaluate `splits` of `run.test_corpus` on all ranks; the first one writes `folder` and logs the table.

    Returns the metrics, {"SPLIT/": {...}, "SPLIT_emb/": {...}}, on all ranks.
    """
    urls = run.test_urls()
    datasets: list[RetrievalSet] = []
    results: list[RetrievalResult] = []
    for split in splits:
        dataset = RetrievalSet(urls[split], run, paragraph=run.paragraph)
        dataset.name = split
        frames = 1 if dataset.media_type == "image" else run.video_input.num_frames_test
        results.append(evaluate_retrieval(model, dataset, tokenizer, run, frames, ranks.rank, ranks.world_size, device))
        datasets.append(dataset)
    if ranks.is_first:
        write_evaluation(folder, results, datasets, run, checkpoint=checkpoint)
        log.info("Evaluation in %s\n%s", folder, console_table([read_evaluation(folder)]))
    for dataset in datasets:
        dataset.close()
    return {name: row for result in results for name, row in result.metrics.items()}


def evaluation_label(run: RunConfig) -> str:
    """The name of an evaluation's folder: as set, or made of frames and ensemble."""
    if run.label is not None:
        return run.label
    frames = run.video_input.num_frames_test
    parts = [f"{frames}_frame{'s' if frames > 1 else ''}"]
    if run.eval_frame_ensemble != "concat":
        parts.append(run.eval_frame_ensemble)
    return "_".join([*parts, *(["all_pairs"] if run.eval_x_only else [])])
