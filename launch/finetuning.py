"""Fine-tuning: training with an evaluation after it, and after each epoch where that chooses the checkpoint."""

from __future__ import annotations

from functools import partial

import torch

from launch.training import train
from model.singularity import Singularity
from train.config_files import Settings
from train.evaluation import Metrics, evaluate_splits
from train.loop import Evaluate
from train.prepare import Prepared
from train.ranks import Ranks


def finetune_retrieval(settings: Settings, ranks: Ranks) -> None:
    """Fine-tune for retrieval. Raises ValueError when there is nothing to evaluate."""
    if not settings.config.test_corpus:
        raise ValueError("test_corpus is empty: name the packed corpora to evaluate, test_corpus.NAME=URL")
    train(settings, ranks, _retrieval)


def _retrieval(prepared: Prepared, device: torch.device) -> Evaluate:
    return partial(_evaluate, prepared, device)


def _evaluate(prepared: Prepared, device: torch.device, model: Singularity, splits: list[str], label: str) -> Metrics:
    folder = prepared.folder.path / "evaluation" / label
    return evaluate_splits(model, prepared.tokenizer, prepared.run, prepared.ranks, device, splits, folder)
