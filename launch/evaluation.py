"""Runs an evaluation: check, load, join the other processes, evaluate all splits, write the results."""

from __future__ import annotations

import logging
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from eval.cache import model_digest
from eval.earlier import check_replaceable
from eval.report.page import write_report
from eval.run import evaluate_splits, evaluation_label, split_inputs, subject_of
from launch.command import log_to_file
from runtime.activity import progress
from runtime.collectives import barrier
from runtime.ranks import Ranks
from train.config.settings import Settings
from train.deepspeed.engine import DTYPES
from train.job.devices import choose_kernels, describe, device_for, start_processes
from train.job.hang import EVALUATE
from train.job.watchdog import Watchdog
from train.prepare import prepare_evaluation, share_cores

log = logging.getLogger(__name__)

REMEDY = "run the same command to evaluate again"


def evaluate(settings: Settings, ranks: Ranks) -> None:
    """Evaluate `checkpoint` on all splits; writes OUTPUT_DIR/evaluation/LABEL, metrics.json and report.html.

    With `eval_num_frames` once for each number of frames; metrics.json is that of the largest.
    """
    device = device_for(ranks)
    choose_kernels(settings.config.deterministic)
    share_cores(ranks)
    logs = Path(settings.config.output_dir or ".") / "evaluation"
    with closing(Watchdog(ranks, settings.config.stall_seconds, logs, REMEDY)) as watchdog:
        _evaluate(settings, ranks, device, logs, watchdog)


def _evaluate(settings: Settings, ranks: Ranks, device: torch.device, logs: Path, watchdog: Watchdog) -> None:
    task, model, tokenizer = prepare_evaluation(settings)
    run = settings.config
    assert run.output_dir is not None
    output = Path(run.output_dir)
    several: list[int | None] = [*sorted(set(run.eval_num_frames))]
    folders = {frames: output / "evaluation" / evaluation_label(run, frames) for frames in several or [None]}
    subject = subject_of(model, str(run.checkpoint))
    if ranks.is_first:
        subject = replace(subject, weights=model_digest(model))
        for frames, folder in folders.items():
            check_replaceable(folder, subject, run, split_inputs(run, frames))
    log_to_file(logs, ranks)
    if ranks.is_first:
        log.info("Computing on %s", describe(device))
    dtype = torch.float32 if device.type == "cpu" else DTYPES[run.precision]
    progress("joining the other processes")
    if ranks.world_size > 1:
        start_processes(device, run.stall_seconds)
    model.to(device, dtype)
    watchdog.enter(EVALUATE, 0)
    with watchdog.reporting_lost_ranks():
        for frames, folder in folders.items():
            evaluate_splits(task, model, tokenizer, run, ranks, run.test_urls(), folder, subject, frames)
    if ranks.is_first:
        shutil.copyfile(folder / "metrics.json", output / "metrics.json")
        write_report(list(folders.values()), output / "report.html")
        log.info("Wrote metrics and report: %s, %s", output / "metrics.json", output / "report.html")
    barrier(ranks.world_size)
