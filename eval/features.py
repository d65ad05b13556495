"""Encodes a test set's visuals and texts, each once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from eval.config import EvalConfig
from eval.gather import gather_rows
from model.singularity import Singularity

TEXT_BATCH = 256


@dataclass(frozen=True)
class VisualFeatures:
    """This rank's visuals, and the embeddings of all.

    blocks: for each batch of B visuals their indices (B,) and tokens (B, F, S, D): F is 1 with all frames' tokens in
    one sequence (concat), or the number of frames, each by itself. embeddings (N, E) float32 of all ranks' visuals,
    mean of the frames' unit vectors, zero where a visual is missing; present (N,) bool.
    """

    blocks: list[tuple[np.ndarray, torch.Tensor]]
    embeddings: torch.Tensor
    present: np.ndarray


@dataclass(frozen=True)
class TextFeatures:
    """All M texts, cut to the longest: states (M, Lt, D), mask (M, Lt), lengths (M,), embeddings (M, E) float32."""

    states: torch.Tensor
    mask: torch.Tensor
    lengths: np.ndarray
    embeddings: torch.Tensor


def check_ensemble(model: Singularity, config: EvalConfig) -> None:
    """Raises ValueError where late fusion would pass by the model's temporal modules and nobody asked for that."""
    temporal = model.temporal_vision_encoder is not None or model.config.add_temporal_embed
    if config.eval_frame_ensemble != "concat" and temporal and not config.ensemble_skips_temporal:
        raise ValueError(
            f"eval_frame_ensemble={config.eval_frame_ensemble} scores each frame by itself and would leave out this "
            "model's temporal modules: use eval_frame_ensemble=concat, or ensemble_skips_temporal=true to repeat what "
            "the official code does"
        )


def encode_visuals(
    model: Singularity,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_visuals: int,
    config: EvalConfig,
    world_size: int = 1,
) -> VisualFeatures:
    """Encode this rank's visuals and gather the embeddings of all ranks'.

    batches: normalised frames (B, T, 3, H, W) on the model's device, and indices (B,).
    """
    blocks, own_indices, own_embeddings = [], [], []
    device = model.temp.device
    for frames, indices in batches:
        if config.eval_frame_ensemble == "concat":
            tokens, pooled = model.encode_visual(frames)
            tokens = tokens[:, None]
        else:
            tokens, pooled = model.encode_frames(frames)
        blocks.append((indices.cpu().numpy(), tokens.cpu() if config.eval_offload else tokens))
        own_indices.append(indices.to(device))
        own_embeddings.append(model.project_visual(pooled).float().mean(1))
    width = model.config.embed_dim
    own = torch.cat([*own_indices, torch.empty(0, dtype=torch.int64, device=device)])
    rows = torch.cat([*own_embeddings, torch.empty(0, width, device=device)])
    indices = gather_rows(own, world_size)
    embeddings = torch.zeros(num_visuals, width, device=device)
    embeddings[indices] = gather_rows(rows, world_size)
    present = np.zeros(num_visuals, dtype=bool)
    present[indices.cpu().numpy()] = True
    return VisualFeatures(blocks, embeddings, present)


def encode_texts(
    model: Singularity, input_ids: torch.Tensor, attention_mask: torch.Tensor, rank: int = 0, world_size: int = 1
) -> TextFeatures:
    """Encode texts (M, Lt), each on one rank, and gather them on all."""
    device = model.temp.device
    lengths = attention_mask.sum(1)
    longest = max(1, int(lengths.max())) if len(lengths) else 1
    ids, mask = input_ids[:, :longest].to(device), attention_mask[:, :longest].to(device)
    first, last = (len(ids) * part // world_size for part in (rank, rank + 1))
    states, embeddings = [], []
    for rows in _slices(first, last, TEXT_BATCH):
        each, pooled = model.encode_text(ids[rows], mask[rows])
        states.append(each)
        embeddings.append(model.project_text(pooled).float())
    if not states:
        each, pooled = model.encode_text(ids[:1], mask[:1])
        states, embeddings = [each[:0]], [model.project_text(pooled).float()[:0]]
    return TextFeatures(
        gather_rows(torch.cat(states), world_size),
        mask,
        lengths.cpu().numpy(),
        gather_rows(torch.cat(embeddings), world_size),
    )


def _slices(first: int, last: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, last)) for start in range(first, last, step))
