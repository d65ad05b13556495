"""Scores of many pairs of a text and a visual with the fusion layers, for re-ranking and multiple choice."""

from __future__ import annotations

import torch

from model.singularity import Singularity

ENSEMBLES = ("concat", "mean", "max", "lse")


def combine(scores: torch.Tensor, ensemble: str) -> torch.Tensor:
    """Scores (F, ...) of F frames to (...): their mean, maximum or log-sum-exp; `concat` has one and takes it."""
    if ensemble == "mean":
        return scores.mean(0)
    if ensemble == "max":
        return scores.amax(0)
    if ensemble == "lse":
        return scores.logsumexp(0)
    if ensemble == "concat" and scores.shape[0] == 1:
        return scores[0]
    raise ValueError(
        f"eval_frame_ensemble is {ensemble!r} for {scores.shape[0]} sets of scores: must be one of "
        f"{', '.join(ENSEMBLES)}, where concat means one set"
    )


def visual_features(
    model: Singularity, frames: torch.Tensor, ensemble: str = "concat"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (B, T, 3, H, W) to tokens (B, F, S, D) for `pair_scores` and pooled vectors (B, T, D).

    concat: F = 1, all frames fused early. mean, max, lse: F = T, each frame by itself; raises ValueError for a model
    with temporal modules, which these would skip.
    """
    if ensemble == "concat":
        tokens, pooled = model.encode_visual(frames)
        return tokens[:, None], pooled
    if ensemble not in ENSEMBLES:
        raise ValueError(f"eval_frame_ensemble is {ensemble!r}: must be one of {', '.join(ENSEMBLES)}")
    model.check_late_fusion(ensemble)
    return model.encode_frames(frames)


@torch.no_grad()
def pair_scores(
    model: Singularity,
    text_states: torch.Tensor,
    text_mask: torch.Tensor,
    visual_tokens: torch.Tensor,
    text_index: torch.Tensor,
    visual_index: torch.Tensor,
    ensemble: str = "concat",
    pairs_per_call: int = 512,
) -> torch.Tensor:
    """Match logits (P,) float32 of the pairs text_index[p], visual_index[p].

    text_states (M, Lt, D) and text_mask (M, Lt) of `encode_text`; visual_tokens (N, F, S, D) of `visual_features`, on
    any device. Every visual's keys and values are projected once, and never copied for its texts: the pairs are
    grouped by visual, visuals with about as many texts together, and short groups are padded.
    """
    device = text_states.device
    visuals, order, counts = _grouped(visual_index.cpu())
    scores = torch.empty(len(text_index), dtype=torch.float32, device=device)
    first = 0
    while first < len(visuals):
        group = int(counts[first])  # the largest of what is left
        last = min(len(visuals), first + max(1, pairs_per_call // group))
        pairs, real = _padded_pairs(order, counts, first, last, group)
        texts = text_index.to(device)[pairs.flatten().to(device)]
        tokens = visual_tokens[visuals[first:last].to(visual_tokens.device)].to(device)
        by_frame = [
            model.match_logits(text_states[texts], text_mask[texts], tokens[:, frame])[:, 1]
            for frame in range(tokens.shape[1])
        ]
        result = combine(torch.stack(by_frame), ensemble)
        scores[pairs[real].to(device)] = result[real.flatten().to(device)]
        first = last
    return scores


def _grouped(visual_index: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Distinct visuals, most pairs first; the pairs of each; and how many they are."""
    visuals, inverse, counts = visual_index.unique(return_inverse=True, return_counts=True)
    by_visual = list(inverse.argsort(stable=True).split(counts.tolist()))
    ranked = counts.argsort(descending=True, stable=True)
    return visuals[ranked], [by_visual[i] for i in ranked.tolist()], counts[ranked]


def _padded_pairs(
    order: list[torch.Tensor], counts: torch.Tensor, first: int, last: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair numbers (group, last - first), column n those of visual first + n, and which of them are no padding."""
    pairs = torch.stack([torch.cat([own, own[:1].expand(group - len(own))]) for own in order[first:last]], dim=1)
    return pairs, torch.arange(group)[:, None] < counts[None, first:last]
