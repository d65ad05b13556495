"""Scores many pairs of a text and a visual by the fusion layers, in large batches across queries.

Pairs are grouped by visual: a visual's keys and values are computed once for all its texts and never copied for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from model.singularity import Singularity
from runtime.activity import progress

GROUP = 8  # texts of one visual in a group; the last group of a visual is padded


def combine(scores: torch.Tensor, ensemble: str) -> torch.Tensor:
    """Scores (F, ...) of F frames to (...): their mean, maximum or log-sum-exp; of `concat` F is 1."""
    if ensemble == "concat":
        (whole,) = scores
        return whole
    if ensemble == "mean":
        return scores.mean(0)
    if ensemble == "max":
        return scores.amax(0)
    assert ensemble == "lse", ensemble
    return scores.logsumexp(0)


@dataclass(frozen=True)
class Groups:
    """The pairs of a block of visuals as C groups of up to GROUP texts that share a visual.

    visuals (C,): number of the visual in its block; texts (C, GROUP); real (C, GROUP) bool: no padding;
    longest (C,): tokens of the longest text.
    """

    visuals: np.ndarray
    texts: np.ndarray
    real: np.ndarray
    longest: np.ndarray


def group_pairs(pairs: np.ndarray, lengths: np.ndarray) -> Groups:
    """Groups of the pairs marked in (B, M) bool, texts of similar length together, in order of length."""
    order = np.argsort(lengths, kind="stable")
    visuals, texts, real = [], [], []
    for visual, row in enumerate(pairs):
        chosen = order[row[order]]
        if not len(chosen):
            continue
        filled = np.resize(chosen[-1:], -len(chosen) % GROUP)
        groups = np.concatenate([chosen, filled]).reshape(-1, GROUP)
        visuals.append(np.full(len(groups), visual))
        texts.append(groups)
        real.append((np.arange(groups.size) < len(chosen)).reshape(groups.shape))
    if not visuals:
        empty = np.empty((0, GROUP), dtype=np.int64)
        return Groups(empty[:, 0], empty, empty.astype(bool), empty[:, 0])
    result_texts = np.concatenate(texts)
    longest = lengths[result_texts].max(1)
    by_length = np.argsort(longest, kind="stable")
    return Groups(
        np.concatenate(visuals)[by_length], result_texts[by_length], np.concatenate(real)[by_length], longest[by_length]
    )


@torch.no_grad()
def match_pairs(
    model: Singularity,
    blocks: Iterable[tuple[np.ndarray, torch.Tensor]],
    attended: torch.Tensor,
    mask: torch.Tensor,
    pairs: np.ndarray,
    ensemble: str = "concat",
    pairs_at_once: int = 256,
    log_odds: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match logits of the pairs that are marked in `pairs` (N, M) bool and whose visual is in `blocks`.

    blocks: visual indices (B,) and tokens (B, F, S, D) of `clip_tokens`, on any device. attended (M, Lt, D) of
    `attend_texts` and mask (M, Lt) on the model's. log_odds: of a match, instead of its logit. Returns visual and text
    of each of P pairs, and its score: (P,) int64, (P,) int64, (P,) float32; the scores of several frames (F > 1)
    combined by `ensemble`.
    """
    lengths = mask.sum(1).cpu().numpy()
    empty = np.empty(0, dtype=np.int64)
    parts = [(empty, empty, empty.astype(np.float32))]
    for indices, tokens in blocks:
        groups = group_pairs(pairs[indices], lengths)
        if len(groups.visuals):
            each = _match_block(model, tokens.to(attended.device), attended, mask, groups, pairs_at_once)
            scores = combine(each[..., 1] - each[..., 0] if log_odds else each[..., 1], ensemble).cpu().numpy()
            visuals = np.broadcast_to(indices[groups.visuals][:, None], groups.texts.shape)
            parts.append((visuals[groups.real], groups.texts[groups.real], scores[groups.real]))
    visual, text, score = (np.concatenate(column) for column in zip(*parts))
    return visual, text, score


def joint_scores(model: Singularity, similarity: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Dual encoder and VTM in one score: similarity plus temperature times the log-odds of a match; any shape, float32.

    Hard negatives are sampled in proportion to exp(similarity / temperature), so VTM learns by what factor a pair is
    likelier than the dual encoder finds it (noise-contrastive estimation: Gutmann & Hyvärinen, 2010); the product of
    both is what ranks. A head that has learned nothing leaves the dual encoder's order. BLIP (Li et al., 2022) adds
    the two scores as well.
    """
    return similarity + np.float32(model.temp.item()) * log_odds


def _match_block(
    model: Singularity,
    tokens: torch.Tensor,
    attended: torch.Tensor,
    mask: torch.Tensor,
    groups: Groups,
    pairs_at_once: int,
) -> torch.Tensor:
    """Two-way logits (F, C, GROUP, 2) of groups of texts for the visuals with tokens (B, F, S, D)."""
    frames, device = tokens.shape[1], tokens.device
    keys = model.visual_keys(tokens.flatten(0, 1))  # of B·F sources
    step = max(1, pairs_at_once // (GROUP * frames))
    # Copied once: each copy synchronises with the device.
    all_visuals, all_texts = (torch.from_numpy(part).to(device) for part in (groups.visuals, groups.texts))
    scores = []
    for start in range(0, len(groups.visuals), step):
        progress(f"matching {len(tokens)} visuals, group of texts {start} of {len(groups.visuals)}")
        batch = slice(start, start + step)
        length = max(1, int(groups.longest[batch].max()))
        visuals = all_visuals[batch]
        sources = (visuals[:, None] * frames + torch.arange(frames, device=device)).flatten()  # (n·F,)
        chosen = all_texts[batch].T  # (GROUP, n)
        rows = chosen[:, :, None].expand(-1, -1, frames).flatten()  # pair g·(n·F) + source
        logits = model.match_attended(
            attended[rows, :length], mask[rows, :length], tuple((k[sources], v[sources]) for k, v in keys)
        )
        scores.append(logits.float().view(GROUP, -1, frames, 2).permute(2, 1, 0, 3))  # (F, n, GROUP, 2)
    return torch.cat(scores, 1)
