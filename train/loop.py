"""The training loop: load, step, log, save; from the newest checkpoint on."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from eval.metrics import reranking_helps
from eval.run import FINAL, Metrics
from loaders.batch import Batch
from model.building import Model
from model.checkpoints.loading import load_weights
from model.vqa import SingularityQA
from runtime.collectives import broadcast
from runtime.errors import UserError
from train.checkpoints.best import best_version, restore_best
from train.checkpoints.shards import set_weights
from train.checkpoints.writing import (
    CheckpointWriter,
    TrainingState,
    checkpoint_step,
    complete_checkpoints,
    load_checkpoint,
    named_best_steps,
    read_state,
    set_buffers,
)
from train.config.settings import RunConfig
from train.deepspeed.compat import gathered_weights
from train.deepspeed.engine import start_engine
from train.deepspeed.state import whole_shape
from train.guard import StepGuard
from train.job.devices import slow_precision
from train.job.hang import END, EVALUATE, LOADER, SAVE, START, STEP
from train.job.interrupted import TrainingInterrupted
from train.job.stopping import StopRequest, StopVote
from train.job.watchdog import Watchdog
from train.optimizer import Schedule
from train.prepare import Prepared
from train.resolution import image_res_at, model_of_size
from train.step import Losses, Stepper, without_padding
from train.tracking.metrics import Clock
from train.tracking.profiling import StepProfiler
from train.tracking.trackers import Tracker

log = logging.getLogger(__name__)

Evaluate = Callable[[Model, list[str], str], Metrics]  # model, splits, label


class Trainer:
    """A run: its engine, its position, and what it writes."""

    def __init__(self, prepared: Prepared, device: torch.device, request: StopRequest, watchdog: Watchdog) -> None:
        """Start the engine and load the newest checkpoint, if any; all ranks call."""
        self.run, self.ranks, self.folder = prepared.run, prepared.ranks, prepared.folder
        self.watchdog = watchdog
        self.loader, self.device = prepared.loader, device
        self._prepared, self._remote = prepared, prepared.remote
        self.total_steps = total_steps(self.run, self.loader.steps_per_epoch)
        self._start(self._saved_image_res() or prepared.model.config.image_res)
        self.vote = StopVote(request, self.ranks.world_size)
        self.profiler = StepProfiler(self.run.profile_steps, self.folder.path / "profile", self.ranks.rank, device)
        self.tracker: Tracker | None = None
        if self.ranks.is_first:
            epochs = self.state.evaluated_epochs
            self.tracker = Tracker(self.folder, self.run, self.total_steps, self.state.step, epochs)
        self._saved_step, self._saved_at = self.state.step, time.monotonic()

    def _start(self, image_res: int) -> None:
        """Start the engine of a model for frames of this size, and load the newest checkpoint, if any."""
        prepared, run = self._prepared, self.run
        if prepared.model.config.image_res != image_res:
            prepared.model = model_of_size(prepared.model, image_res, prepared.tokenizer)
            prepared.model.freeze(run.freeze)
            gc.collect()  # the engine before, which refers to itself
        if self.loader.config.image_res != image_res:
            self.loader.set_image_res(image_res)
        self.model: Model = prepared.model
        self.model_config = self.model.config
        self.model.set_gradient_checkpointing(run.gradient_checkpointing)
        self.engine, groups = start_engine(self.model, run, prepared.deepspeed, self.device)
        self.writer = CheckpointWriter(
            self.folder.checkpoints,
            self.engine,
            self.model_config,
            prepared.tokenizer,
            self.ranks,
            prepared.preprocessing,
            self.model.history,
        )
        self.state = replace(self._resume(), image_res=image_res)
        self.guard = StepGuard(self.engine, self.ranks, run.max_bad_steps, run.optimizer.max_grad_norm)
        schedule = Schedule(
            run.scheduler.warmup_epochs * self.loader.steps_per_epoch,
            self.loader.steps_per_epoch * run.scheduler.epochs,
            run.scheduler.min_lr_multi,
        )
        self.step = Stepper(
            self.engine, groups, self.model, schedule, self.guard, self.device, run, self.ranks.rank
        )  # fmt: skip
        self._clock = Clock(self.model, self.loader.batch_size, run.video_input.num_frames)

    def _saved_image_res(self) -> int:
        """The image size of the newest checkpoint, whose epoch may still have to be evaluated; 0 without one."""
        found = complete_checkpoints(self.folder.checkpoints) if self.ranks.is_first else []
        return broadcast(read_state(found[-1]).image_res if found else 0, self.ranks.world_size)

    def _change_image_res(self) -> None:
        """Go on at the image size of the present epoch, as a run that is resumed from a checkpoint at this moment."""
        image_res, before = image_res_at(self.run, self.state.epoch), self.state.image_res
        if image_res == before:
            return
        self.save()
        if self.ranks.is_first:
            log.info("Epoch %d: image_res changes from %d to %d", self.state.epoch, before, image_res)
        self.watchdog.enter(START, self.state.step)
        self.engine.destroy()
        del self.engine, self.model, self.writer, self.guard, self.step, self._clock
        gc.unfreeze()
        if self.run.compile:
            torch.compiler.reset()
        self._start(image_res)
        self._begin()

    def _begin(self) -> None:
        """Make the engine and the garbage collector ready for steps."""
        self.engine.train()
        gc.collect()
        gc.freeze()  # full collections skip what exists now: they would take 184 ms, for which all ranks wait

    def train(self, evaluate: Evaluate | None = None) -> None:
        """Train to the end. With `evaluate`: `stop_key` is evaluated after each epoch, all splits at the end.

        Raises TrainingInterrupted, after a checkpoint, when a signal asked to stop.
        """
        if self.ranks.is_first:
            if slow := slow_precision(self.run.precision, self.device):
                log.warning("%s", slow)
            log.info(
                "Training: %d epochs of %d steps (%s), %d %s, %s",
                self.run.scheduler.epochs,
                self.loader.steps_per_epoch,
                ", ".join(f"{steps} {kind}" for kind, steps in self.loader.media_steps.items()),
                self.ranks.world_size,
                "process" if self.ranks.world_size == 1 else "processes",
                _sizes(self.model),
            )
        self._begin()
        self._after_epoch(evaluate)
        while not self._is_over():
            self._change_image_res()
            self._epoch()
            self._after_epoch(evaluate)
        self.vote.close()
        self.save()
        if evaluate is not None:
            self._evaluate_all(evaluate)
        if self.ranks.is_first:
            if self._remote is not None:
                self._remote.retry()
            self.folder.finish({"step": self.state.step, "best": self.state.best})

    def close(self) -> None:
        """Stop the threads and close the trackers; not after a failure, when other ranks may be gone."""
        self.watchdog.enter(END, self.state.step)
        self.profiler.close()
        self.loader.close()
        gc.unfreeze()
        if self.tracker is not None:
            self.tracker.close()

    def save(self) -> None:
        """Write a checkpoint of the present step, unless it exists."""
        if self.state.step == self._saved_step and self.state.step > 0:
            return
        self.guard.inspect()
        self.watchdog.enter(SAVE, self.state.step)
        started = time.perf_counter()
        path = self.writer.save(self.state, self.run.keep_checkpoints)
        self._saved_step, self._saved_at = self.state.step, time.monotonic()
        self._clock.pause(time.perf_counter() - started)
        self._copy(path)
        if self.ranks.is_first:
            log.info("Saved %s in %.1f s", path, time.perf_counter() - started)

    def _copy(self, path: Path) -> None:
        """Copy a checkpoint to `checkpoint_url`, where one is set."""
        if self.ranks.is_first and self._remote is not None:
            self._remote.upload(path, self.folder.settings, self.run.keep_checkpoints)

    def _resume(self) -> TrainingState:
        found = complete_checkpoints(self.folder.checkpoints) if self.ranks.is_first else []
        name = broadcast(found[-1].name if found else "", self.ranks.world_size)
        import deepspeed
        import timm
        import transformers

        # Of the modules themselves: a package that was copied without its metadata has no other version.
        packages = {each.__name__: str(each.__version__) for each in (torch, deepspeed, timm, transformers)}
        state = TrainingState(world_size=self.ranks.world_size)
        if name:
            path = self.folder.checkpoints / name
            state = load_checkpoint(path, self.engine)
            assert state.step == checkpoint_step(path)
        best = None
        if self.ranks.is_first:
            folder = self.folder.checkpoints
            best = restore_best(folder, state.best, state.best_step, named_best_steps(folder))
        best = broadcast(best, self.ranks.world_size)
        if name:
            self._copy(path)  # which a killed process may not have done
        score = None if best is None else state.best
        return replace(state, versions=packages, best=score, best_step=best)

    def _epoch(self) -> None:
        """The rest of the present epoch."""
        epoch = self.state.epoch
        batches = self.loader.epoch(epoch, self.state.epoch_step)
        self.watchdog.enter(LOADER, self.state.step)
        one_length = self.model_config.gather_negatives  # the texts of all ranks are gathered
        with closing(batches):  # type: ignore[type-var]
            for batch in self._clock.timed(batches if one_length else map(without_padding, batches)):
                self.watchdog.enter(STEP, self.state.step)
                self.profiler.before(self.state.step + 1)
                losses = self.step(batch, self.state.step)
                self.state.step += 1
                self.state.epoch_step += 1
                if self.state.epoch_step == self.loader.steps_per_epoch:
                    self.state.epoch, self.state.epoch_step = epoch + 1, 0
                self.profiler.after(self.state.step)
                if self.state.step % self.run.log_every == 0 or self._is_over():
                    self._log(batch, losses)
                self._maybe_save_and_stop()
                if self._is_over():
                    break
                self.watchdog.enter(LOADER, self.state.step)
            self.watchdog.enter(END, self.state.step)

    def _is_over(self) -> bool:
        return self.state.step >= self.total_steps

    def _log(self, batch: Batch, losses: Losses) -> None:
        """Log the current step with losses averaged over ranks. Nothing else waits for the device."""
        self.guard.inspect()
        values = torch.stack([loss.float() for loss in losses.values()])
        if self.ranks.world_size > 1:
            distributed.all_reduce(values)
        if self.tracker is None:
            self._clock.restart()
            return
        means = (values / self.ranks.world_size).tolist()
        metrics: dict[str, Any] = {
            "step": self.state.step,
            "epoch": batch.epoch,
            "media_type": batch.media_type,
            **({"image_res": self.state.image_res} if self.run.scheduler.image_res else {}),
            "loss": sum(means),
            **dict(zip(losses, means)),
            "lr": self.run.optimizer.lr * self.step.schedule.multiplier(self.state.step - 1),
            "temperature": _temperature(self.model),
            "grad_norm": None if self.guard.norm is None else float(self.guard.norm),
            **({"grad_scale": self.guard.loss_scale.value} if self.run.precision == "fp16" else {}),
            **self._clock.metrics(self.device, self.ranks.world_size),
            **{f"loader/{name}": round(value, 4) for name, value in sorted(self.loader.counters().items())},
            **({"skipped": self.guard.skipped} if self.guard.skipped else {}),
        }
        self._clock.restart()
        self.tracker.step(metrics)

    def _maybe_save_and_stop(self) -> None:
        minutes = (time.monotonic() - self._saved_at) / 60
        decision = self.vote.decided(save=0 < self.run.save_minutes <= minutes)
        if self.state.step % self.run.save_every == 0 or decision.save:
            self.save()
        if decision.signal:
            self.save()
            raise TrainingInterrupted(decision.signal, self.state.step)

    def _after_epoch(self, evaluate: Evaluate | None) -> None:
        """Evaluate `stop_key`, and keep the weights if they are the best."""
        key, epoch = self.run.stop_key, self.state.epoch
        if evaluate is None or key is None:
            return
        if self.state.epoch_step and self._is_over():  # an epoch that max_steps cut short counts
            epoch += 1
        elif self.state.epoch_step:
            return
        if self.state.evaluated_epochs >= epoch:
            return
        metrics = self._evaluate(evaluate, [key], f"epoch_{epoch:02}")
        measure, score = deciding_score(metrics, key)
        if self.state.best is None or score > self.state.best:
            self.state.best, self.state.best_step = score, self.state.step
            self.watchdog.enter(SAVE, self.state.step)
            self.writer.save_best(self.state, key, reranking_helps(metrics, key))
            if self.ranks.is_first:
                log.info("Best so far: %s %s %.2f after epoch %d", key, measure, score, epoch)
        self.state.evaluated_epochs = epoch
        if self.state.step == self._saved_step:
            self._copy(self.writer.update(self.state))
        self._clock.restart()

    def _evaluate_all(self, evaluate: Evaluate) -> None:
        """Evaluate all splits with the best weights, or the last ones without `stop_key`."""
        if self.state.best_step is not None:
            best = load_weights(best_version(self.folder.checkpoints, self.state.best_step))
            if best.config.image_res != self.state.image_res and self.ranks.is_first:
                sizes = best.config.image_res, self.state.image_res
                log.info("The best weights are of image_res=%d and evaluated at %d", *sizes)
            set_weights(self.engine, best.state)
            set_buffers(self.engine, best.state)
            self.model.history = replace(self.model.history, reranks=best.history.reranks)
        elif self.run.stop_key is not None and self.ranks.is_first:
            log.warning("No best checkpoint exists: the last weights are evaluated")
        self._evaluate(evaluate, list(self.run.test_urls()), FINAL)

    def _evaluate(self, evaluate: Evaluate, splits: list[str], label: str) -> Metrics:
        self.watchdog.enter(EVALUATE, self.state.step)
        with gathered_weights(self.engine):
            metrics = evaluate(self.model, splits, label)
        if self.tracker is not None:
            folder = self.folder.path / "evaluation" / label
            self.tracker.evaluation(self.state.step, self.state.epoch, metrics, folder)
        return metrics


def total_steps(run: RunConfig, per_epoch: int) -> int:
    """Optimiser steps of a run."""
    steps = per_epoch * run.scheduler.epochs
    return min(steps, run.max_steps) if run.max_steps else steps


def deciding_score(metrics: Metrics, split: str) -> tuple[str, float]:
    """The metric that chooses the best checkpoint, and its value.

    `overall` of QA; `r_mean` of retrieval, of the better of its two rankings; of a task of one's own that has neither
    the first one.
    """
    names = [f"{split}_emb/"] if reranking_helps(metrics, split) is False else [split, f"{split}/", f"{split}_emb/"]
    row = next((metrics[name] for name in names if metrics.get(name)), None)
    if row is None:
        raise UserError(f"stop_key={split} has no metrics: name a split that has some, or stop_key=null")
    measure = next((name for name in ("overall", "r_mean") if name in row), next(iter(row)))
    return measure, row[measure]


def _sizes(model: Model) -> str:
    """How many parameters the model has, and how many of them are trained where some are frozen."""
    sizes = [(whole_shape(parameter).numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
    frozen = "" if trained == total else f", {trained / 1e6:.1f} M of them trained"
    return f"{total / 1e6:.1f} M parameters{frozen}"


def _temperature(model: Model) -> float | None:
    """The temperature of VTC, where the model has one and this rank holds it whole."""
    if isinstance(model, SingularityQA) or model.temp.numel() != 1:
        return None
    return model.temp.item()
