"""The input of a training step: tensors of one media type, and their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch

from loaders.columns import Column, collated
from loaders.config import LoaderConfig
from loaders.order.choices import without_words
from loaders.samples import DecodedSamples, SampleSpec
from preprocessing.text import Tokenizer


@dataclass(frozen=True)
class Answers:
    """The A distinct answers of a batch's B questions, one after another (for the answer decoder).

    input_ids and attention_mask (A, La) int64; weights (A,) float32; per_question (B,) int64, sums to A.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    weights: torch.Tensor
    per_question: torch.Tensor

    def rows(self, rows: slice) -> Answers:
        """The answers of consecutive questions."""
        counts = self.per_question
        first, end, _ = rows.indices(len(counts))
        own = slice(int(counts[:first].sum()), int(counts[:end].sum()))
        return Answers(self.input_ids[own], self.attention_mask[own], self.weights[own], counts[rows])


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: B pairs, all images or all videos, T frames each.

    frames (B, T, H, W, 3) uint8; input_ids and attention_mask (B, Lt) int64;
    idx (B,) int64: equal numbers mean the same visual; keys: corpus and sample key of each pair; columns: values of
    each extra column of the index, a tensor (B,) or B texts.
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

    columns: Mapping[str, Column] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; the host does not wait for the copies."""
        return _mapped(self, partial(copied, device=torch.device(device)))

    def rows(self, rows: slice) -> Batch:
        """The batch of some of the pairs."""
        return replace(self, **{item.name: _rows_of(getattr(self, item.name), rows) for item in fields(self)})


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A batch, or a field of it, with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(each, change) for name, each in value.items()}
    if isinstance(value, Batch | Answers):
        return replace(value, **{item.name: _mapped(getattr(value, item.name), change) for item in fields(value)})
    return value


def _rows_of(value: Any, rows: slice) -> Any:
    """Some rows of a field of a batch; fields that are not by row stay."""
    if isinstance(value, Mapping):
        return {name: each[rows] for name, each in value.items()}
    if isinstance(value, Answers):
        return value.rows(rows)
    return value[rows] if isinstance(value, torch.Tensor | tuple) else value


def collate(
    samples: DecodedSamples, tokenizer: Tokenizer | None, config: LoaderConfig, media_type: str, epoch: int, step: int
) -> Batch:
    """The last stage: a step's samples as one batch, with their tokens; without a tokenizer texts are (B, 0)."""
    asks = config.epoch_unit == "questions"
    answers = None
    input_ids = attention_mask = torch.zeros(len(samples.specs), 0, dtype=torch.int64)
    if tokenizer is not None:
        length = config.max_q_len if asks else getattr(config.max_txt_l, media_type)
        texts = [tokenizer.clean(spec.text) for spec in samples.specs]
        if config.word_dropout:
            keys = [spec.key for spec in samples.specs]
            texts = [without_words(text, key, config.word_dropout) for text, key in zip(texts, keys, strict=True)]
        input_ids, attention_mask = tokenizer.encode(texts, length)
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
        columns={name: collated([spec.extra[name] for spec in samples.specs]) for name in config.extra_columns},
    )


def _answers(specs: Sequence[SampleSpec], tokenizer: Tokenizer, length: int) -> Answers:
    texts = [tokenizer.answer(answer) for spec in specs for answer, _ in spec.answers]
    input_ids, attention_mask = tokenizer.encode(texts, length)
    weights = torch.tensor([weight for spec in specs for _, weight in spec.answers])
    return Answers(input_ids, attention_mask, weights, torch.tensor([len(spec.answers) for spec in specs]))


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`. To a GPU it goes from pinned memory: CUDA may wait for the stream before it reads other."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
