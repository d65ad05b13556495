"""Encodes a test set's visuals and texts, each once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from eval.config import EvalConfig
from eval.gather import gather_objects, gather_rows
from loaders.batch import normalize
from loaders.config import LoaderConfig
from model.encoders import Encoders
from model.singularity import Singularity

TEXT_BATCH = 256


class VisualBatch(Protocol):
    """B decoded visuals: frames (B, T, H, W, 3) uint8 and indices (B,) int64."""

    @property
    def frames(self) -> torch.Tensor:
        """(B, T, H, W, 3) uint8."""
        ...

    @property
    def indices(self) -> torch.Tensor:
        """(B,) int64."""
        ...


class VisualData(Protocol):
    """What encoding needs of a test set; those of `loaders.evaluation` are such."""

    name: str
    media_type: str
    num_visuals: int
    missing: dict[int, str]
    config: LoaderConfig

    @property
    def sources(self) -> list[str]:
        """The visuals' names."""
        ...

    def batches(self, num_frames: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[VisualBatch]:
        """Each visual that can be decoded once over all ranks."""
        ...


class TextEncoding(Protocol):
    """The tokenizer's part: texts to ids and mask, each (M, max_length) int64."""

    def encode(self, texts: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of the texts."""
        ...


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


def check_ensemble(model: Encoders, config: EvalConfig) -> None:
    """Raises ValueError where late fusion would pass by the model's temporal modules and nobody asked for that."""
    temporal = model.temporal_vision_encoder is not None or model.config.add_temporal_embed
    if config.eval_frame_ensemble != "concat" and temporal and not config.ensemble_skips_temporal:
        raise ValueError(
            f"eval_frame_ensemble={config.eval_frame_ensemble} scores each frame by itself and would leave out this "
            "model's temporal modules: use eval_frame_ensemble=concat, or ensemble_skips_temporal=true to repeat what "
            "the official code does"
        )


def pixel_batches(
    model: Encoders,
    dataset: VisualData,
    config: EvalConfig,
    num_frames: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised frames (B, T, 3, H, W) on `device`, and indices (B,), of this rank's visuals."""
    batch_size = getattr(config.batch_size_test, dataset.media_type)
    total = -(-dataset.num_visuals // world_size)
    with tqdm(total=total, desc=f"encoding {dataset.name}", leave=False, disable=None if rank == 0 else True) as bar:
        for batch in dataset.batches(num_frames, batch_size, rank=rank, world_size=world_size):
            yield normalize(batch.frames.to(device, non_blocking=True), model.mean, model.std), batch.indices
            bar.update(len(batch.indices))


def missing_visuals(dataset: VisualData, present: np.ndarray, world_size: int) -> dict[int, str]:
    """Number and reason of all ranks' visuals that are not in `present` (N,) bool, on all ranks."""
    reasons: dict[int, str] = {}
    for part in gather_objects(dict(dataset.missing), world_size):
        reasons |= part
    return {int(i): reasons.get(int(i), "not delivered by the loader") for i in np.flatnonzero(~present)}


def encode_tokens(model: Encoders, frames: torch.Tensor, config: EvalConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (B, T, 3, H, W) to tokens (B, F, S, D), as `VisualFeatures` has them, and pooled vectors (B, T, D)."""
    if config.eval_frame_ensemble != "concat":
        return model.encode_frames(frames)
    tokens, pooled = model.encode_visual(frames)
    return tokens[:, None], pooled


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
        tokens, pooled = encode_tokens(model, frames, config)
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
