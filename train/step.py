"""One optimiser step: forward and backward over micro-batches, and AdamW at the schedule's learning rate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from eval.report.losses import MEDIA
from loaders.batch import Batch
from model.building import Model
from model.singularity import TEMPERATURE_RANGE
from preprocessing.normalization import normalize
from runtime.errors import UserError
from train.config.settings import RunConfig
from train.deepspeed.compat import finish_step
from train.deepspeed.engine import DTYPES
from train.deepspeed.state import WEIGHT, fragments
from train.guard import StepGuard
from train.optimizer import ParameterGroup, Schedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Losses = dict[str, torch.Tensor]

TEXT_LENGTHS = 8  # texts are padded to multiples of it


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch's generators from (seed, step, rank), so that a step does not depend on those before it."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))


def model_inputs(batch: Batch) -> tuple[torch.Tensor, ...]:
    """The arguments of the model's training forward after the frames: captions, or questions and answers."""
    if batch.answers is None:
        return batch.input_ids, batch.attention_mask, batch.idx
    answers = batch.answers
    own = (answers.input_ids, answers.attention_mask, answers.weights, answers.per_question)
    return batch.input_ids, batch.attention_mask, *own


def without_padding(batch: Batch) -> Batch:
    """The batch with its texts (B, Lt) cut to the longest, rounded up: this removes padding only, no loss changes."""
    longest = int(batch.attention_mask.sum(1).max())
    length = min(batch.input_ids.shape[1], -(-longest // TEXT_LENGTHS) * TEXT_LENGTHS)
    ids, mask = (tensor[:, :length].contiguous() for tensor in (batch.input_ids, batch.attention_mask))
    return replace(batch, input_ids=ids, attention_mask=mask)  # torch.compile compiles each layout


def split(batch: Batch, micro_batches: int) -> list[Batch]:
    """A batch of B pairs as micro-batches of B / micro_batches each, in order."""
    if micro_batches == 1:
        return [batch]
    size = len(batch.keys) // micro_batches
    return [batch.rows(slice(first, first + size)) for first in range(0, size * micro_batches, size)]


class Stepper:
    """Takes the optimiser steps of a run, without waiting for the device."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        groups: list[ParameterGroup],
        model: Model,
        schedule: Schedule,
        guard: StepGuard,
        device: torch.device,
        run: RunConfig,
        rank: int,
    ) -> None:
        """groups: of the optimiser, with their base learning rates."""
        self.engine, self.groups, self.model, self.schedule, self.guard = engine, groups, model, schedule, guard
        self._device, self._dtype = device, DTYPES[run.precision]
        self._seed, self._rank, self._accumulate = run.seed, rank, run.accumulate
        # The model's forward clamps what it computes with; this is the copy that AdamW changes.
        self._temperatures = [part for part in fragments(engine) if part.name == "temp" and part.trained]

    def __call__(self, batch: Batch, step: int) -> Losses:
        """Step number `step` on this rank's part of a global batch; returns its losses (), still on the device."""
        seed_step(self._seed, step, self._rank)
        multiplier = self.schedule.multiplier(step)
        for group, settings in zip(self.engine.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = settings.lr * multiplier
        each = [self._backward(part.to(self._device)) for part in split(batch, self._accumulate)]
        losses = {name: torch.stack([part[name] for part in each]).mean() for name in each[0]}
        self.guard.record(step + 1, batch.keys, losses)
        finish_step(self.engine)
        return losses

    def _backward(self, batch: Batch) -> Losses:
        """Forward and backward of a micro-batch; AdamW acts after the last one, on the mean of the gradients."""
        frames = normalize(batch.frames, self.model.mean, self.model.std, self._dtype)
        columns = {"columns": batch.columns} if batch.columns else {}
        losses = self.engine(frames, *model_inputs(batch), **columns)
        total = torch.stack(list(losses.values())).sum()
        if not total.requires_grad:
            raise UserError(
                f"all parameters that a batch of {MEDIA[batch.media_type]} uses are frozen: leave some of them "
                "out of freeze, or leave that medium out of train_corpus"
            )
        self.engine.backward(self.guard.loss_scale.apply(total))
        self.guard.step()
        for temperature in self._temperatures:
            temperature.write(WEIGHT, temperature.read(WEIGHT).clamp(*TEMPERATURE_RANGE))
        return {name: loss.detach() for name, loss in losses.items()}
