"""The course of a training run, whatever its task: check, join the other processes, train, leave."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from launch.command import log_to_file
from train.config_files import Settings
from train.devices import check_precision, choose_kernels, describe, device_for, start_processes
from train.loop import Evaluate, Trainer
from train.prepare import Prepared, prepare_training
from train.ranks import Ranks
from train.stopped import Stopped
from train.stopping import StopRequest

log = logging.getLogger(__name__)


def train(
    settings: Settings, ranks: Ranks, evaluate: Callable[[Prepared, torch.device], Evaluate] | None = None
) -> None:
    """Train as the settings say; `evaluate` makes the evaluation of a prepared run."""
    device = device_for(ranks)
    choose_kernels(settings.config.deterministic)
    check_precision(settings.config.precision, device)
    prepared = prepare_training(settings, ranks, evaluates=evaluate is not None, device=device)
    request = StopRequest(prepared.folder.note_stopping)
    request.install()
    if ranks.is_first:
        prepared.folder.begin(prepared.run)
        log_to_file(prepared.folder.log)
        log.info("Computing on %s", describe(device))
    start_processes(device, prepared.run.stall_seconds)
    trainer = Trainer(prepared, device, request)
    try:
        trainer.train(evaluate(prepared, device) if evaluate else None)
    except Stopped:
        trainer.close()
        raise
    except RuntimeError:  # a collective, as a rule: was another rank the cause?
        gone = trainer.watchdog.after_failure()
        if gone:
            log.error("%s; the job ends, the same command goes on from the last checkpoint", gone)
        raise
    trainer.close()
    torch.distributed.barrier()
    prepared.folder.release()
