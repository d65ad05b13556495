"""Training: load, step, log, save, epoch after epoch, from wherever the run stopped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import distributed

from eval.gather import share
from loaders.batch import Batch, normalize
from loaders.train import TrainLoader
from model.answering import SingularityQA
from model.building import Model
from model.checkpoint import load_weights
from train.checkpoints import (
    TrainingState,
    checkpoint_step,
    complete_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from train.engine import DTYPES, start_engine
from train.evaluation import Metrics
from train.prepare import Prepared
from train.schedule import Schedule
from train.stopped import Stopped
from train.stopping import StopRequest, StopVote
from train.tracking import Tracker

log = logging.getLogger(__name__)

Evaluate = Callable[[Model, list[str], str], Metrics]  # model, splits, label


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set all generators of PyTorch from (seed, step, rank), so that a step is the same whatever came before it."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))


class Trainer:
    """A run in progress: the engine, where it is, and what it writes."""

    def __init__(self, prepared: Prepared, device: torch.device, request: StopRequest) -> None:
        """Start the engine and, where the run's folder holds a checkpoint, go back to it; all ranks call."""
        self.run, self.ranks, self.folder = prepared.run, prepared.ranks, prepared.folder
        self.tokenizer, self.loader, self.device = prepared.tokenizer, prepared.loader, device
        self.model: Model = prepared.model
        self.model_config = prepared.model.config
        self.model.set_gradient_checkpointing(self.run.gradient_checkpointing)
        self.engine, self.groups = start_engine(self.model, self.run, prepared.deepspeed, device)
        self.state = self._resume()
        per_epoch = self.loader.steps_per_epoch
        self.total_steps = per_epoch * self.run.scheduler.epochs
        self.schedule = Schedule(
            self.run.scheduler.warmup_epochs * per_epoch, self.total_steps, self.run.scheduler.min_lr_multi
        )
        self.vote = StopVote(request, self.ranks.world_size)
        self.tracker: Tracker | None = None
        if self.ranks.is_first:
            self.tracker = Tracker(self.folder, self.run, self.total_steps, self.state.step)
        self._saved_step = self.state.step
        self._clock = _Clock(self.loader)

    def train(self, evaluate: Evaluate | None = None) -> None:
        """Train to the end. With `evaluate`: `stop_key` is evaluated after each epoch, all splits at the end.

        Raises Stopped, after a checkpoint, when the run was asked to stop.
        """
        if self.ranks.is_first:
            log.info(
                "Training: %d epochs of %d steps (%s), %d processes, %s",
                self.run.scheduler.epochs,
                self.loader.steps_per_epoch,
                ", ".join(f"{steps} {kind}" for kind, steps in self.loader.media_steps.items()),
                self.ranks.world_size,
                f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters",
            )
        self.engine.train()
        self._after_epoch(evaluate)
        while self.state.step < self.total_steps:
            self._epoch()
            self._after_epoch(evaluate)
        self.vote.close()
        self.save()
        if evaluate is not None:
            self._evaluate_all(evaluate)
        if self.ranks.is_first:
            self.folder.finish({"step": self.state.step, "best": self.state.best})

    def close(self) -> None:
        """End the loader's threads and the records; not to be called after a failure, when other ranks may be gone."""
        self.loader.close()
        if self.tracker is not None:
            self.tracker.close()

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if self.state.step == self._saved_step and self.state.step > 0:
            return
        started = time.perf_counter()
        path = save_checkpoint(
            self.folder.checkpoints,
            self.engine,
            self.state,
            self.model_config,
            self.tokenizer,
            self.ranks,
            self.run.keep_checkpoints,
        )
        self._saved_step = self.state.step
        self._clock.pause(time.perf_counter() - started)
        if self.ranks.is_first:
            log.info("Saved %s in %.1f s", path, time.perf_counter() - started)

    def _resume(self) -> TrainingState:
        found = complete_checkpoints(self.folder.checkpoints) if self.ranks.is_first else []
        name = share(str(found[-1]) if found else "", self.ranks.world_size)
        packages = {package: version(package) for package in ("torch", "deepspeed", "timm", "transformers")}
        if not name:
            return TrainingState(world_size=self.ranks.world_size, versions=packages)
        path = self.folder.checkpoints / os.path.basename(name)
        state = load_checkpoint(path, self.engine)
        assert state.step == checkpoint_step(path)
        return replace(state, versions=packages)

    def _epoch(self) -> None:
        """The rest of the present epoch."""
        epoch = self.state.epoch
        batches = self.loader.epoch(epoch, self.state.epoch_step)
        with closing(batches):  # type: ignore[type-var]
            for batch in _timed(batches, self._clock):
                losses = self.step(batch)
                self.state.step += 1
                self.state.epoch_step += 1
                if self.state.epoch_step == self.loader.steps_per_epoch:
                    self.state.epoch, self.state.epoch_step = epoch + 1, 0
                if self.state.step % self.run.log_every == 0 or self.state.step == self.total_steps:
                    self._log(batch, losses)
                self._maybe_save_and_stop()

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One optimiser step on this rank's part of a global batch; returns its losses, still on the device."""
        seed_step(self.run.seed, self.state.step, self.ranks.rank)
        multiplier = self.schedule.multiplier(self.state.step)
        for group, settings in zip(self.engine.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = settings.lr * multiplier
        batch = batch.to(self.device)
        frames = normalize(batch.frames, self.model.mean, self.model.std, DTYPES[self.run.precision])
        losses = self.engine(frames, *model_inputs(batch))
        self.engine.backward(torch.stack(list(losses.values())).sum())
        self.engine.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def _log(self, batch: Batch, losses: dict[str, torch.Tensor]) -> None:
        """Record the present step; its losses are means over the ranks. The only place that waits for the device."""
        values = torch.stack([loss.float() for loss in losses.values()])
        if self.ranks.world_size > 1:
            distributed.all_reduce(values)
        if self.tracker is None:
            self._clock.restart()
            return
        means = (values / self.ranks.world_size).tolist()
        figures: dict[str, Any] = {
            "step": self.state.step,
            "epoch": batch.epoch,
            "media_type": batch.media_type,
            "loss": sum(means),
            **dict(zip(losses, means)),
            "lr": self.run.optimizer.lr * self.schedule.multiplier(self.state.step - 1),
            "temperature": _temperature(self.model),
            "grad_norm": _number(self.engine.get_global_grad_norm()),
            **self._clock.figures(),
        }
        self._clock.restart()
        self.tracker.step(figures)

    def _maybe_save_and_stop(self) -> None:
        signal = self.vote.decided()
        if self.state.step % self.run.save_every == 0:
            self.save()
        if signal:
            self.save()
            raise Stopped(signal, self.state.step)

    def _after_epoch(self, evaluate: Evaluate | None) -> None:
        """Evaluate the split that chooses the best checkpoint, and keep its weights when it is one."""
        key, epoch = self.run.stop_key, self.state.epoch
        if evaluate is None or key is None or self.state.epoch_step or self.state.evaluated_epochs >= epoch:
            return
        metrics = evaluate(self.model, [key], f"epoch_{epoch:02}")
        self._record(metrics)
        measure, score = deciding_score(metrics, key)
        if self.state.best is None or score > self.state.best:
            self.state.best = score
            save_weights(self.folder.checkpoints / "best", self.engine, self.model_config, self.tokenizer, self.ranks)
            if self.ranks.is_first:
                log.info("Best so far: %s %s %.2f after epoch %d", key, measure, score, epoch)
        self.state.evaluated_epochs = epoch
        self._clock.restart()

    def _evaluate_all(self, evaluate: Evaluate) -> None:
        """Evaluate all splits with the best weights, or the last where no split chooses."""
        best = self.folder.checkpoints / "best" / "weights"
        if self.run.stop_key is not None:
            weights = load_weights(best)
            self.model.load_state_dict(weights.state)
        self._record(evaluate(self.model, list(self.run.test_urls()), "final"))

    def _record(self, metrics: Metrics) -> None:
        if self.tracker is not None:
            self.tracker.evaluation(self.state.step, self.state.epoch, metrics)


class _Clock:
    """Times the steps between two logged ones: samples a second and the share of waiting for the loader."""

    def __init__(self, loader: TrainLoader) -> None:
        self._sizes = loader.batch_size
        self.waited = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._began, self._samples, self.waited = time.perf_counter(), 0, 0.0

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on something else."""
        self._began += seconds

    def batch(self, media_type: str, waited: float) -> None:
        """Count a batch and the time it was waited for."""
        self._samples += self._sizes[media_type]
        self.waited += waited

    def figures(self) -> dict[str, float]:
        """The interval's figures; samples are those of all ranks."""
        seconds = max(1e-9, time.perf_counter() - self._began)
        return {"samples_per_second": round(self._samples / seconds, 2), "data_wait": round(self.waited / seconds, 4)}


def _timed(batches: Iterator[Batch], clock: _Clock) -> Iterator[Batch]:
    """The batches, the waiting for each noted."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        clock.batch(batch.media_type, time.perf_counter() - began)
        yield batch


def model_inputs(batch: Batch) -> tuple[torch.Tensor, ...]:
    """What the model's training forward takes after the frames: captions, or questions and their answers."""
    if batch.answers is None:
        return batch.input_ids, batch.attention_mask, batch.idx
    answers = batch.answers
    own = (answers.input_ids, answers.attention_mask, answers.weights, answers.per_question)
    return batch.input_ids, batch.attention_mask, *own


def deciding_score(metrics: Metrics, split: str) -> tuple[str, float]:
    """Name and value of what chooses the best checkpoint: `overall` of answers, `r_mean` of retrieval, re-ranked."""
    row = next(metrics[name] for name in (split, f"{split}/", f"{split}_emb/") if name in metrics)
    measure = "overall" if "overall" in row else "r_mean"
    return measure, row[measure]


def _temperature(model: Model) -> float | None:
    """The contrast's temperature, where the model has one and it is whole on this rank."""
    if isinstance(model, SingularityQA) or model.temp.numel() != 1:
        return None
    return model.temp.item()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
