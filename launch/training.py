"""Runs a training of any task: check, join the other processes, train, evaluate, exit."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from eval.run import FINAL, Metrics, evaluate_splits
from launch.command import log_to_file
from model.building import Model
from runtime.activity import progress
from runtime.collectives import barrier
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.config.settings import Settings
from train.job.devices import check_precision, choose_kernels, describe, device_for, start_processes
from train.job.interrupted import TrainingInterrupted
from train.job.stopping import StopRequest
from train.job.watchdog import Watchdog
from train.loop import Trainer
from train.prepare import Prepared, prepare_training

log = logging.getLogger(__name__)


def finetune(settings: Settings, ranks: Ranks, answers: bool | None = None) -> None:
    """Fine-tune and evaluate. answers: for task=qa only, or for any other only; by default for any.

    Raises UserError for another task, or without test corpora.
    """
    run = settings.config
    if answers is not None and (run.task == "qa") != answers:
        other = "finetune_retrieval" if answers else "finetune_qa"
        raise UserError(f"the configuration is for task={run.task}: start it with launch/{other}.py")
    if not run.test_corpus:
        raise UserError("test_corpus is empty: name the packed corpora to evaluate, test_corpus.NAME=URL")
    train(settings, ranks, evaluates=True)


def train(settings: Settings, ranks: Ranks, evaluates: bool) -> None:
    """Train with these settings; evaluates: `stop_key` after each epoch, all splits at the end."""
    device = device_for(ranks)
    choose_kernels(settings.config.deterministic)
    check_precision(settings.config.precision, device)
    with closing(Watchdog(ranks, settings.config.stall_seconds, Path(settings.config.output_dir or "."))) as watchdog:
        _train(settings, ranks, evaluates, device, watchdog)


def _train(settings: Settings, ranks: Ranks, evaluates: bool, device: torch.device, watchdog: Watchdog) -> None:
    prepared = prepare_training(settings, ranks, evaluates, device)
    folder = prepared.folder
    with ExitStack() as cleanup:
        cleanup.callback(folder.release)
        request = cleanup.enter_context(StopRequest(folder.note_stopping))
        if ranks.is_first:
            folder.begin(prepared.run)
            log_to_file(folder.path, ranks)
            log.info("Computing on %s; starting DeepSpeed", describe(device))
        progress("joining the other processes")
        start_processes(device, prepared.run.stall_seconds)
        if not ranks.is_first:  # only now is the folder known to be this run's
            log_to_file(folder.path, ranks)
        progress("starting DeepSpeed's engine")
        trainer = Trainer(prepared, device, request, watchdog)
        evaluate = partial(_evaluate, prepared) if evaluates else None
        interruption: TrainingInterrupted | None = None
        with watchdog.reporting_lost_ranks():
            try:
                trainer.train(evaluate)
            except TrainingInterrupted as error:
                interruption = error
        trainer.close()
        barrier(ranks.world_size)  # rank 0 may still upload: launchers kill the others once one process has ended
        if interruption is not None:
            raise interruption


def _evaluate(prepared: Prepared, model: Model, splits: list[str], label: str) -> Metrics:
    folder = prepared.folder.path / "evaluation" / label
    # Features of weights that change are of no use later: kept on disk they would only fill it, epoch after epoch.
    # The schedule's present image size, which the model has.
    run, ranks = replace(prepared.run, feature_cache=None, image_res=model.config.image_res), prepared.ranks
    assert prepared.task is not None, "prepared without an evaluation"
    save_scores = run.save_scores or label == FINAL
    return evaluate_splits(
        prepared.task, model, prepared.tokenizer, run, ranks, splits, folder, save_scores=save_scores
    )
