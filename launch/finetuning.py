"""Fine-tuning: training with an evaluation after it, and after each epoch where that chooses the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from eval.run import FINAL, Metrics, evaluate_splits
from launch.training import train
from model.building import Model
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.config.files import Settings
from train.loop import Evaluate
from train.prepare import Prepared

ENTRY_POINTS = {"retrieval": "finetune_retrieval", "choice": "finetune_retrieval", "qa": "finetune_qa"}


def finetune(settings: Settings, ranks: Ranks, tasks: Sequence[str]) -> None:
    """Fine-tune for one of `tasks`. Raises ValueError for another one, or when there is nothing to evaluate."""
    run = settings.config
    if run.task not in tasks:
        raise UserError(f"the configuration is for task={run.task}: start it with launch/{ENTRY_POINTS[run.task]}.py")
    if not run.test_corpus:
        raise UserError("test_corpus is empty: name the packed corpora to evaluate, test_corpus.NAME=URL")
    train(settings, ranks, evaluation)


def evaluation(prepared: Prepared, device: torch.device) -> Evaluate:
    """The evaluation of a run's splits, for its trainer."""
    return partial(_evaluate, prepared, device)


def _evaluate(prepared: Prepared, device: torch.device, model: Model, splits: list[str], label: str) -> Metrics:
    folder = prepared.folder.path / "evaluation" / label
    # Features of weights that change are of no use later: kept on disk they would only fill it, epoch after epoch.
    run, ranks = replace(prepared.run, feature_cache=None), prepared.ranks
    assert prepared.task is not None, "prepared without an evaluation"
    save_scores = run.save_scores or label == FINAL
    return evaluate_splits(
        prepared.task, model, prepared.tokenizer, run, ranks, device, splits, folder, save_scores=save_scores
    )
