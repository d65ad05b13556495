"""The losses: a registry, what a loss receives, and VTC, VTM and MLM with their random choices.

All are pure functions without a device synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from model.config import ModelConfig
from runtime.errors import UserError
from runtime.plugins import Registry

IGNORED = -100

# A function of the loss inputs to a scalar (), or an nn.Module class made with the ModelConfig whose forward is one.
LOSSES: Registry[Callable[..., Any]] = Registry("losses")


class LossInputs(NamedTuple):
    """What a training forward of pre-training or retrieval gives to each loss: B pairs of a visual and a text.

    N rows stand for those of all ranks with `gather_negatives`, otherwise for the B of this rank.

    - tokens (B, T·L, D): visual tokens, frame after frame, as cross-attention reads them
    - pooled (B, T, D): a vector for each frame
    - input_ids (B, Lt)
    - attention_mask (B, Lt): 0 where padded
    - text_states (B, Lt, D): states of the text-only layers
    - idx (B,): identities of the visuals
    - visual (B, E): float32, mean of the unit vectors of the frames
    - text (B, E): unit vectors, float32
    - all_idx (N,), all_visual (N, E), all_text (N, E): the same of N pairs
    - same (B, N) bool: whether two pairs have the same visual
    - temperature (1, 1): of the contrastive loss
    - to_text (B, N): similarities of visuals to texts, over the temperature
    - to_visual (B, N): similarities of texts to visuals, over the temperature
    - match_states (3B, D): fused first tokens of the pairs, visuals + negative texts, texts + negative visuals
    - match_logits (3B, 2): logits of these, column 1 for a match
    - mlm_logits (M, V): logits at masked tokens; None where loss_weight.mlm is 0
    - mlm_labels (M,): the tokens' ids, -100 where there is nothing to predict
    - columns: values of the index's extra columns by name, as in the batch
    """

    tokens: torch.Tensor
    pooled: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    text_states: torch.Tensor
    idx: torch.Tensor
    visual: torch.Tensor
    text: torch.Tensor
    all_idx: torch.Tensor
    all_visual: torch.Tensor
    all_text: torch.Tensor
    same: torch.Tensor
    temperature: torch.Tensor
    to_text: torch.Tensor
    to_visual: torch.Tensor
    match_states: torch.Tensor
    match_logits: torch.Tensor
    mlm_logits: torch.Tensor | None = None
    mlm_labels: torch.Tensor | None = None
    columns: Mapping[str, Any] = MappingProxyType({})


class AnswerLossInputs(NamedTuple):
    """What a training forward of question answering gives to each loss: B questions with A answers in all.

    - tokens (B, T·L, D): visual tokens, frame after frame
    - pooled (B, T, D): a vector for each frame
    - question_states (B, Lq, D): states of the questions, fused with their visuals
    - question_mask (B, Lq): 0 where padded
    - answer_ids (A, La)
    - answer_mask (A, La): 0 where padded
    - answer_weights (A,): shares of the question's answers
    - owner (A,): the question of each answer
    - logits (A, La, V): logits of the next token at each position
    - answer_losses (A,): negative log-likelihood of each answer
    - columns: values of the index's extra columns by name, as in the batch
    """

    tokens: torch.Tensor
    pooled: torch.Tensor
    question_states: torch.Tensor
    question_mask: torch.Tensor
    answer_ids: torch.Tensor
    answer_mask: torch.Tensor
    answer_weights: torch.Tensor
    owner: torch.Tensor
    logits: torch.Tensor
    answer_losses: torch.Tensor
    columns: Mapping[str, Any] = MappingProxyType({})


class Losses(nn.Module):
    """The losses of a model: the built-in ones, then those that `config.losses` names, each times its weight."""

    def __init__(self, config: ModelConfig, builtin: Mapping[str, float]) -> None:
        """builtin: names and weights of the model's built-in losses. Raises UserError for an unknown own loss."""
        super().__init__()
        if names := [name for name in config.losses if name in BUILT_IN]:
            raise UserError(f"losses names {names[0]}, which is built in: loss_weight holds the weights of such losses")
        self._weights = {**builtin, **config.own_losses}
        self._losses: dict[str, Callable[[Any], torch.Tensor]] = {}
        for name in self._weights:
            loss = LOSSES[name]
            if isinstance(loss, type):
                loss = loss(config)
                self.add_module(name, loss)
            self._losses[name] = loss

    def compute(self, inputs: LossInputs | AnswerLossInputs) -> dict[str, torch.Tensor]:
        """Every loss () times its weight, as `loss_NAME`. Raises UserError if one is no scalar."""
        result = {}
        for name, loss in self._losses.items():
            value = loss(inputs)
            if value.ndim:
                raise UserError(f"the loss {name} returns a tensor of shape {tuple(value.shape)}: return a scalar")
            weight = self._weights[name]
            result[f"loss_{name}"] = value if weight == 1 else value * weight
        return result


def same_visual(idx: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Whether pairs have the same visual: (B, N) bool of identities (B,) and N `others`, by default the same."""
    return idx[:, None] == (idx if others is None else others)[None, :]


def contrastive_targets(idx: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """`same_visual` as (B, N) float32 whose rows sum to 1: all pairs with a row's identity have equal shares."""
    same = same_visual(idx, others).float()
    return same / same.sum(1, keepdim=True)


def contrastive_loss(to_text: torch.Tensor, to_visual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """VTC: mean cross entropy of both directions.

    to_text, to_visual (B, N): similarities of visuals to N texts and of texts to N visuals, over the temperature.
    """
    both = functional.log_softmax(to_text, dim=1) + functional.log_softmax(to_visual, dim=1)
    return -(both * targets).sum(1).mean() / 2


def negative_weights(similarity: torch.Tensor, same: torch.Tensor, hard: bool) -> torch.Tensor:
    """Sampling weights (B, N) of each row's negative: softmax of the similarity, or 1 if not `hard`; 0 where `same`.

    Where all hard weights of a row underflow to 0, its candidates get uniform weights.
    """
    uniform = (~same).float()
    if not hard:
        return uniform
    weights = functional.softmax(similarity.float() + 1e-4, dim=1).masked_fill(same, 0)
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, uniform)


def sample_negatives(weights: torch.Tensor) -> torch.Tensor:
    """Sample one index for each row of (B, N) weights, with probability proportional to them: (B,) int64.

    The minimum of exponential variables, since torch.multinomial synchronises with the device to check its input.
    """
    race = torch.empty_like(weights).exponential_()
    return (weights / race.clamp_min(torch.finfo(weights.dtype).tiny)).argmax(1)


def matching_loss(logits: torch.Tensor, has_negative: torch.Tensor) -> torch.Tensor:
    """VTM: cross entropy over two-way logits (3B, 2) of B true pairs, then two negatives for each pair.

    has_negative (B,) bool: rows without a candidate are left out of the mean.
    """
    batch = has_negative.shape[0]
    labels = torch.zeros(3 * batch, dtype=torch.long, device=logits.device)
    labels[:batch] = 1
    counted = torch.cat([torch.ones_like(has_negative), has_negative, has_negative]).float()
    each = functional.cross_entropy(logits.float(), labels, reduction="none")
    return (each * counted).sum() / counted.sum()


def mask_tokens(
    input_ids: torch.Tensor, probability: float, vocab_size: int, mask_id: int, kept_ids: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked ids and labels for MLM, both (B, Lt); labels are -100 where a token is not to be predicted.

    Of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay; `kept_ids` ([PAD], [CLS]) are never chosen.
    """
    chance = torch.rand((3, *input_ids.shape), device=input_ids.device)
    chosen = chance[0] < probability
    for kept in kept_ids:
        chosen = chosen & (input_ids != kept)
    masked = chosen & (chance[1] < 0.8)
    replaced = chosen & ~masked & (chance[2] < 0.5)
    random_ids = torch.randint(vocab_size, input_ids.shape, device=input_ids.device)
    ids = torch.where(masked, mask_id, torch.where(replaced, random_ids, input_ids))
    return ids, input_ids.masked_fill(~chosen, IGNORED)


def max_masked(count: int, probability: float) -> int:
    """Upper bound of how many of `count` tokens are masked: six standard deviations above the mean."""
    return min(count, math.ceil(count * probability + 6 * math.sqrt(count * probability * (1 - probability))))


def masked_positions(labels: torch.Tensor, limit: int) -> torch.Tensor:
    """Positions (limit,) in the flattened labels (B, Lt) of the tokens to predict, then others as padding.

    The size is known beforehand: counting them would synchronise with the device.
    """
    return (labels.flatten() == IGNORED).byte().argsort(stable=True)[:limit]


def mlm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """MLM: mean cross entropy (float32) of logits (..., V) over labels (...) that are not -100; 0 when all are."""
    total = functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp_min(1)


@LOSSES("itc")
def _itc(inputs: LossInputs) -> torch.Tensor:
    return contrastive_loss(inputs.to_text, inputs.to_visual, contrastive_targets(inputs.idx, inputs.all_idx))


@LOSSES("itm")
def _itm(inputs: LossInputs) -> torch.Tensor:
    return matching_loss(inputs.match_logits, (~inputs.same).any(1))


@LOSSES("mlm")
def _mlm(inputs: LossInputs) -> torch.Tensor:
    assert inputs.mlm_logits is not None
    assert inputs.mlm_labels is not None
    return mlm_loss(inputs.mlm_logits, inputs.mlm_labels)


@LOSSES("qa")
def _qa(inputs: AnswerLossInputs) -> torch.Tensor:
    return (inputs.answer_weights * inputs.answer_losses).sum() / len(inputs.tokens)


BUILT_IN = frozenset(LOSSES)
