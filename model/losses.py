"""The objectives and their random draws, as functions of similarities and logits; nothing here waits for the device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

IGNORED = -100


def same_visual(idx: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Identities (B,) and those of N others, by default the same, to (B, N) bool: whether two pairs show one visual."""
    return idx[:, None] == (idx if others is None else others)[None, :]


def contrastive_targets(idx: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """As `same_visual`, (B, N) float32: each row's mass is shared equally by the pairs with its identity."""
    same = same_visual(idx, others).float()
    return same / same.sum(1, keepdim=True)


def contrastive_loss(to_text: torch.Tensor, to_visual: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of the two directions' cross entropies; similarities (B, N) over temperature of visuals to N texts, and of
    texts to N visuals."""
    return (
        -((functional.log_softmax(to_text, dim=1) + functional.log_softmax(to_visual, dim=1)) * targets).sum(1).mean()
        / 2
    )


def negative_weights(similarity: torch.Tensor, same: torch.Tensor, hard: bool) -> torch.Tensor:
    """Weights (B, N) by which a row draws its negative: softmax of the similarity, or 1 if not `hard`; 0 where same.

    A row whose hard weights are all 0 although it has candidates draws uniformly from them.
    """
    uniform = (~same).float()
    if not hard:
        return uniform
    weights = functional.softmax(similarity.float() + 1e-4, dim=1).masked_fill(same, 0)
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, uniform)


def draw(weights: torch.Tensor) -> torch.Tensor:
    """One index for each row of (B, N) weights, with probability proportional to them: (B,) int64.

    An exponential race instead of torch.multinomial, which waits for the device to check its input.
    """
    race = torch.empty_like(weights).exponential_()
    return (weights / race.clamp_min(torch.finfo(weights.dtype).tiny)).argmax(1)


def matching_loss(logits: torch.Tensor, has_negative: torch.Tensor) -> torch.Tensor:
    """Cross entropy over two-way logits (3B, 2): B true pairs, then two negatives a pair.

    has_negative (B,) bool: rows without any candidate are left out of the mean.
    """
    batch = has_negative.shape[0]
    labels = torch.zeros(3 * batch, dtype=torch.long, device=logits.device)
    labels[:batch] = 1
    counted = torch.cat([torch.ones_like(has_negative), has_negative, has_negative]).float()
    each = functional.cross_entropy(logits.float(), labels, reduction="none")
    return (each * counted).sum() / counted.sum()


def mask_words(
    input_ids: torch.Tensor, probability: float, vocab_size: int, mask_id: int, kept_ids: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked ids and labels, both (B, Lt): labels are -100 where a word was not chosen.

    Of the chosen words 80 % become [MASK], 10 % a random word, 10 % stay; `kept_ids` ([PAD], [CLS]) are never chosen.
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


def most_labels(count: int, probability: float) -> int:
    """How many of `count` words are chosen at most: six standard deviations above the mean, so practically always."""
    return min(count, math.ceil(count * probability + 6 * math.sqrt(count * probability * (1 - probability))))


def chosen_positions(labels: torch.Tensor, limit: int) -> torch.Tensor:
    """Places (limit,) in the flattened labels (B, Lt) where words are to be predicted, then others to fill up.

    The size is known beforehand, so that no one waits for the device to count them.
    """
    return (labels.flatten() == IGNORED).byte().argsort(stable=True)[:limit]


def word_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy (float32) of logits (..., V) over labels (...) that are not -100; 0 when all are."""
    total = functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp_min(1)
