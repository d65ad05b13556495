"""Checks and builds all that a run needs before its processes connect, so that errors show at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eval.run import TASKS, make_task
from eval.tasks.task import Task
from loaders.shards import describe
from loaders.train import TrainLoader
from model.backbones import VISION_TYPES
from model.building import Model, build_model
from model.checkpoints.loading import find_weights, fit_weights
from model.checkpoints.pretrained import new_model
from model.config import ModelConfig, with_changes
from model.history import History
from preprocessing.config import Preprocessing
from preprocessing.text import Tokenizer, find_vocabulary
from runtime.activity import progress
from runtime.errors import MissingError, UserError
from runtime.ranks import Ranks, cores_per_process
from sharding.shards.outside import check_outside_corpora
from sharding.shards.schema import Corpus
from train.checkpoints.copies import RemoteCheckpoints
from train.checkpoints.writing import WEIGHTS, check_checkpoint, complete_checkpoints
from train.config.architecture import adopt, changes_to, check_texts, fresh_architecture
from train.config.settings import RunConfig, Settings
from train.deepspeed.engine import deepspeed_config
from train.folder import RunFolder
from train.optimizer import trainable_groups
from train.resolution import check_sizes, image_sizes
from train.tracking.trackers import check_tracking

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """A run that is ready to start: its resolved settings and the objects made of them."""

    run: RunConfig
    ranks: Ranks
    folder: RunFolder
    deepspeed: dict[str, Any]
    tokenizer: Tokenizer
    loader: TrainLoader
    model: Model
    task: Task[Any, Any] | None  # None where the run evaluates nothing
    remote: RemoteCheckpoints | None  # where checkpoints are copied to
    preprocessing: Preprocessing  # recorded with the weights


def prepare_training(settings: Settings, ranks: Ranks, evaluates: bool, device: torch.device) -> Prepared:
    """Check the settings and build the model, the loader and the rest of a training run; rank 0 claims its folder.

    evaluates: whether the test corpora will be evaluated, and so must exist. Raises UserError.
    """
    run = settings.config
    if run.output_dir is None:
        raise UserError("output_dir is not set: give a folder for the run, output_dir=runs/NAME")
    check_outside_corpora(run.output_dir, "output_dir")
    zero = deepspeed_config(run, ranks)
    check_tracking(run)
    task = None
    TASKS[run.task]  # raises for an unknown one
    if evaluates:
        if run.stop_key is not None and run.splits and run.stop_key not in run.splits:
            raise UserError(f"stop_key={run.stop_key} is not among splits={run.splits}: add it, or splits=[] for all")
        task = make_task(run)
    log.info("Checking the corpora: %s", ", ".join(run.train_urls()))
    corpora = []
    for url in run.train_urls():
        progress(f"checking {url}")
        corpora.append(describe(url, run))
    share_cores(ranks)
    torch.manual_seed(run.seed)
    log.info("Building the model")
    progress("building the model")
    model, tokenizer = _model(settings)
    vision, text = model.config.vision_encoder.type, model.config.text_encoder.type
    if vision not in VISION_TYPES or text != "bert":
        log.info("It has vision_encoder.type=%s and text_encoder.type=%s", vision, text)
    model.freeze(run.freeze)
    trainable_groups(model, run.optimizer)
    check_statistics(model)
    check_sizes(model, run, tokenizer)
    progress("opening the corpora")
    quarantine = run.quarantine_file or str(Path(run.output_dir) / "quarantine-{rank}.jsonl")
    loader_settings = replace(run, quarantine_file=quarantine, image_res=model.config.image_res)
    loader = TrainLoader(
        run.train_urls(), tokenizer, loader_settings, ranks.rank, ranks.world_size, ranks.local_world_size, device
    )
    _check_micro_batches(loader, run, ranks)
    folder = RunFolder(run.output_dir)
    remote = RemoteCheckpoints(run.checkpoint_url, run.storage) if run.checkpoint_url else None
    if ranks.is_first:
        _claim(folder, run, remote, tokenizer)
    return Prepared(run, ranks, folder, zero, tokenizer, loader, model, task, remote, preprocessing(run, corpora))


def preprocessing(run: RunConfig, corpora: Sequence[Corpus]) -> Preprocessing:
    """How the inputs of the model are made, and what it is trained on."""
    counted = ("samples", "captions", "questions")
    known = [
        {**each.settings, "name": each.name, "media_type": each.media_type}
        | {unit: sum(each.counts(unit)) for unit in counted}
        for each in corpora
    ]
    return Preprocessing.of({**asdict(run), "corpora": known})


def _claim(folder: RunFolder, run: RunConfig, remote: RemoteCheckpoints | None, tokenizer: Tokenizer) -> None:
    """Take the run's folder, with the checkpoints of `checkpoint_url`, and check the newest checkpoint in it."""
    if remote is not None:
        remote.check()
        if run.resume:
            remote.fetch(folder.path)
    folder.claim(run)
    for path in complete_checkpoints(folder.checkpoints)[-1:]:
        check_checkpoint(path)
        _check_vocabulary(tokenizer, str(path / WEIGHTS), run)


def check_statistics(model: Model) -> None:
    """Raise UserError for running statistics, which each process would collect of its own part of a batch."""
    for name, module in model.named_modules():
        if module.training and getattr(module, "track_running_stats", False):
            raise UserError(
                f"{name} is a {type(module).__name__}, whose running statistics would differ between processes: take "
                f"GroupNorm or LayerNorm, or freeze=[{name}], which keeps it in evaluation mode"
            )


def _check_micro_batches(loader: TrainLoader, run: RunConfig, ranks: Ranks) -> None:
    """Raise UserError unless `accumulate` micro-batches of one size make up each rank's share of a batch."""
    for kind, size in loader.batch_size.items():
        share = size // ranks.world_size
        if share % run.accumulate:
            raise UserError(
                f"batch_size.{kind}={size} over {ranks.world_size} processes is {share} each, which accumulate="
                f"{run.accumulate} does not divide: change one of them"
            )


def prepare_evaluation(settings: Settings) -> tuple[Task[Any, Any], Model, Tokenizer]:
    """The task, and the model and tokenizer that `checkpoint` names; the settings take over its architecture.

    Raises UserError.
    """
    run = settings.config
    if run.checkpoint is None:
        raise UserError("checkpoint is not set: give a run folder, a weights folder or an official .pth to evaluate")
    if run.output_dir is None:
        raise UserError("output_dir is not set: give a folder for the results, output_dir=runs/NAME")
    for name, folder in (("output_dir", run.output_dir), ("feature_cache", run.feature_cache)):
        if folder is not None:
            check_outside_corpora(folder, name)
    if not run.test_corpus:
        raise UserError("test_corpus is empty: name the packed corpora to evaluate, test_corpus.NAME=URL")
    log.info("Checking the corpora: %s", ", ".join(run.test_urls().values()))
    task = make_task(run)
    log.info("Loading the model from %s", run.checkpoint)
    return task, *_from_checkpoint(settings, run.checkpoint, training=False)


def share_cores(ranks: Ranks) -> None:
    """Limit each process on a node to its share of the cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_per_process(ranks.local_world_size))


def _model(settings: Settings) -> tuple[Model, Tokenizer]:
    run = settings.config
    if run.pretrained_path is not None:
        return _from_checkpoint(settings, run.pretrained_path, training=True)
    published = run.dual_encoder or run.text_encoder.pretrained
    if "tokenizer" not in settings.explicit and published and _brings_vocabulary(published):
        run.tokenizer = published
    tokenizer = Tokenizer.load(run.tokenizer)
    config = fresh_architecture(settings, tokenizer)
    adopt(settings, config)
    model = new_model(_at_first_size(config, run), tokenizer.special_ids)
    model.history = replace(History.of_training(config), rerank_score=run.rerank_score)
    return model, tokenizer


def _at_first_size(config: ModelConfig, run: RunConfig) -> ModelConfig:
    """The architecture that a training run begins with; that of the settings is the one it ends with."""
    return with_changes(config, {"image_res": image_sizes(run)[0][1]})


def _brings_vocabulary(name: str) -> bool:
    """Whether published weights have their vocabulary beside them; on the hub they do."""
    return not Path(name).is_dir() or find_vocabulary(Path(name)) is not None


def _from_checkpoint(settings: Settings, path: str, training: bool) -> tuple[Model, Tokenizer]:
    run = settings.config
    found, weights = find_weights(path)
    if weights.config.answer_decoder.enable and run.task != "qa":
        raise UserError(
            f"{path} is a question-answering model without retrieval heads: start from a pre-training checkpoint"
        )
    if run.task == "qa" and not training and not weights.config.answer_decoder.enable:
        raise UserError(f"{path} has no answer decoder: fine-tune it with launch/finetune_qa.py first")
    config = with_changes(weights.config, changes_to(settings, weights.config, str(found), training))
    if found.is_dir() and find_vocabulary(found):
        if "tokenizer" in settings.explicit:
            _check_vocabulary(Tokenizer.load(run.tokenizer), str(found), run)
        tokenizer = Tokenizer.load(str(found))
    else:
        try:
            tokenizer = Tokenizer.load(run.tokenizer)
        except MissingError as error:
            raise MissingError(f"{found} has no vocabulary, and {error}") from None
    check_texts(run, config, tokenizer)
    adopt(settings, config)
    model = build_model(_at_first_size(config, run) if training else config, tokenizer.special_ids)
    report = fit_weights(model, weights, str(found), run.expected_tensors)
    if "rerank_score" not in settings.explicit:
        run.rerank_score = weights.history.rerank_score
    model.history = weights.history
    if training:
        model.history = replace(History.of_training(config, path, weights.history), rerank_score=run.rerank_score)
    log.info("Weights of %s: %s", found, report)
    return model, tokenizer


def _check_vocabulary(tokenizer: Tokenizer, weights: str, run: RunConfig) -> None:
    """Raise ValueError unless the tokenizer is the one that the weights were trained with."""
    trained_with = Tokenizer.load(weights)
    if tokenizer.content != trained_with.content:
        raise UserError(
            f"tokenizer={run.tokenizer} differs from the vocabulary of {weights}: tokenizer=null uses that one"
        )
