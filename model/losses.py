"""The objectives VTC, VTM and MLM and their random choices, as pure functions without a device synchronisation."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

IGNORED = -100


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
