"""The input of a training step: tensors of one media type, and their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loaders.config import LoaderConfig
from loaders.samples import DecodedSamples, SampleSpec
from preprocessing.text import Tokenizer, clean_text


@dataclass(frozen=True)
class Answers:
    """The A distinct answers of a batch's B questions, one after another (for the answer decoder).

    input_ids and attention_mask (A, La) int64; weights (A,) float32; per_question (B,) int64, sums to A.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    weights: torch.Tensor
    per_question: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: B pairs, all images or all videos, T frames each.

    frames (B, T, H, W, 3) uint8; input_ids and attention_mask (B, Lt) int64;
    idx (B,) int64: equal numbers mean the same visual; keys: corpus and sample key of each pair.
    """

    media_type: str
    epoch: int
    step: int  # in the epoch
    frames: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    idx: torch.Tensor
    keys: tuple[str, ...]
    answers: Answers | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; the host does not wait for the copies."""
        tensors: dict[str, Any] = {
            name: _copied(getattr(self, name), torch.device(device))
            for name in ("frames", "input_ids", "attention_mask", "idx")
        }
        answers = self.answers
        if answers is not None:
            answers = Answers(*(_copied(value, torch.device(device)) for value in vars(answers).values()))
        return replace(self, **tensors, answers=answers)


def collate(
    samples: DecodedSamples, tokenizer: Tokenizer | None, config: LoaderConfig, media_type: str, epoch: int, step: int
) -> Batch:
    """The last stage: a step's samples as one batch, with their tokens; without a tokenizer texts are (B, 0)."""
    asks = config.epoch_unit == "questions"
    answers = None
    input_ids = attention_mask = torch.zeros(len(samples.specs), 0, dtype=torch.int64)
    if tokenizer is not None:
        length = config.max_q_len if asks else getattr(config.max_txt_l, media_type)
        input_ids, attention_mask = tokenizer.encode([clean_text(spec.text) for spec in samples.specs], length)
        if asks:
            answers = _answers(samples.specs, tokenizer, getattr(config.max_a_len, media_type))
    return Batch(
        media_type=media_type,
        epoch=epoch,
        step=step,
        frames=samples.frames,
        input_ids=input_ids,
        attention_mask=attention_mask,
        idx=torch.tensor([spec.visual for spec in samples.specs]),
        keys=tuple(spec.name for spec in samples.specs),
        answers=answers,
    )


def _answers(specs: Sequence[SampleSpec], tokenizer: Tokenizer, length: int) -> Answers:
    texts = [f"{answer} [SEP]" for spec in specs for answer, _ in spec.answers]
    input_ids, attention_mask = tokenizer.encode(texts, length)
    weights = torch.tensor([weight for spec in specs for _, weight in spec.answers])
    return Answers(input_ids, attention_mask, weights, torch.tensor([len(spec.answers) for spec in specs]))


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`. To a GPU it goes from pinned memory: CUDA may wait for the stream before it reads other."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
