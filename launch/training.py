"""The course of a training run, whatever its task: check, join the other processes, train, leave."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from launch.command import log_to_file
from runtime.activity import progress
from runtime.collectives import barrier
from runtime.ranks import Ranks
from train.config.files import Settings
from train.devices import check_precision, choose_kernels, describe, device_for, start_processes
from train.interrupted import LostRankError, Stopped
from train.loop import Evaluate, Trainer
from train.prepare import Prepared, prepare_training
from train.stopping import StopRequest
from train.watchdog import NEXT_STEP, Watchdog

log = logging.getLogger(__name__)


def train(
    settings: Settings, ranks: Ranks, evaluate: Callable[[Prepared, torch.device], Evaluate] | None = None
) -> None:
    """Train as the settings say; `evaluate` makes the evaluation of a prepared run."""
    device = device_for(ranks)
    choose_kernels(settings.config.deterministic)
    check_precision(settings.config.precision, device)
    watchdog = Watchdog(ranks, settings.config.stall_seconds, Path(settings.config.output_dir or "."))
    prepared = prepare_training(settings, ranks, evaluates=evaluate is not None, device=device)
    request = StopRequest(prepared.folder.note_stopping)
    request.install()
    if ranks.is_first:
        prepared.folder.begin(prepared.run)
        log_to_file(prepared.folder.path, ranks)
        log.info("Computing on %s; starting DeepSpeed", describe(device))
    progress("joining the other processes")
    start_processes(device, prepared.run.stall_seconds)
    if not ranks.is_first:  # only now is the folder known to be this run's
        log_to_file(prepared.folder.path, ranks)
    progress("starting DeepSpeed's engine")
    trainer = Trainer(prepared, device, request, watchdog)
    try:
        trainer.train(evaluate(prepared, device) if evaluate else None)
    except Stopped:
        trainer.close()
        barrier(ranks.world_size)  # for the first rank's upload: launchers end what is left when a process has ended
        watchdog.close()
        raise
    except RuntimeError as error:  # a collective, as a rule: was another rank the cause?
        gone = watchdog.after_failure()
        if gone:
            raise LostRankError(f"{gone}; the job ends, {NEXT_STEP}") from error
        raise
    trainer.close()
    barrier(ranks.world_size)
    watchdog.close()
    prepared.folder.release()
