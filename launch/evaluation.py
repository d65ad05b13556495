"""The course of an evaluation: check, load, join the other processes, evaluate all splits, write the folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from train.config_files import Settings
from train.engine import DTYPES, device_for, start_processes
from train.evaluation import evaluate_splits, evaluation_label
from train.prepare import prepare_evaluation, share_cores
from train.ranks import Ranks


def evaluate(settings: Settings, ranks: Ranks) -> None:
    """Evaluate `checkpoint` on all splits; the results come to OUTPUT_DIR/evaluation/LABEL and metrics.json."""
    device = device_for(ranks)
    share_cores(ranks)
    model, tokenizer = prepare_evaluation(settings)
    run = settings.config
    assert run.output_dir is not None
    dtype = torch.float32 if device.type == "cpu" else DTYPES[run.precision]
    if ranks.world_size > 1:
        start_processes(device)
    output = Path(run.output_dir)
    folder = output / "evaluation" / evaluation_label(run)
    model.to(device, dtype)
    evaluate_splits(model, tokenizer, run, ranks, device, run.test_urls(), folder, str(run.checkpoint))
    if ranks.is_first:
        shutil.copyfile(folder / "metrics.json", output / "metrics.json")
    if ranks.world_size > 1:
        torch.distributed.barrier()
