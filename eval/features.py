"""Encodes a test set's visuals and texts, each once over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from eval.cache import Block, CachedBlocks, entry_name, model_digest, read_entry, write_entry
from eval.config import EvalConfig
from loaders.batch import normalize
from loaders.config import LoaderConfig
from model.encoders import Encoders
from model.singularity import Singularity
from runtime.activity import progress
from runtime.collectives import gather_objects, gather_rows, share

log = logging.getLogger(__name__)

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

    @property
    def digest(self) -> str:
        """A name for the visuals' contents."""
        ...

    def batches(
        self,
        num_frames: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> Iterator[VisualBatch]:
        """Each visual that can be decoded once over all ranks."""
        ...


class TextEncoding(Protocol):
    """The tokenizer's part: texts to ids and mask, each (M, max_length) int64."""

    def encode(self, texts: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of the texts."""
        ...


class Blocks(Protocol):
    """Encoded visuals that can be gone through as often as one likes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Block]: ...


@dataclass(frozen=True)
class VisualFeatures:
    """This rank's visuals, block by block, and the embeddings of all.

    embeddings (N, E) float32 of all ranks' visuals, mean of the frames' unit vectors, zero where a visual is missing;
    present (N,) bool.
    """

    blocks: Blocks
    embeddings: torch.Tensor
    present: np.ndarray


@dataclass(frozen=True)
class TextFeatures:
    """All M texts, cut to the longest: attended (M, Lt, D), mask (M, Lt), embeddings (M, E) float32.

    attended: what matching does with a text before it sees a visual.
    """

    attended: torch.Tensor
    mask: torch.Tensor
    embeddings: torch.Tensor


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
        progress(f"visual 0 of {total} encoded")
        for batch in dataset.batches(num_frames, batch_size, rank=rank, world_size=world_size, device=device):
            yield normalize(batch.frames.to(device, non_blocking=True), model.mean, model.std), batch.indices
            bar.update(len(batch.indices))
            progress(f"visual {bar.n} of {total} encoded")


def missing_visuals(dataset: VisualData, present: np.ndarray, world_size: int) -> dict[int, str]:
    """Number and reason of all ranks' visuals that are not in `present` (N,) bool, on all ranks."""
    reasons: dict[int, str] = {}
    for part in gather_objects(dict(dataset.missing), world_size):
        reasons |= part
    return {int(i): reasons.get(int(i), "not delivered by the loader") for i in np.flatnonzero(~present)}


def encode_blocks(
    model: Encoders, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], config: EvalConfig
) -> Iterator[Block]:
    """Encode normalised frames (B, T, 3, H, W) on the model's device, with their indices (B,), batch by batch."""
    for frames, indices in batches:
        tokens, pooled = model.encode_clips(frames, config.eval_frame_ensemble, config.ensemble_skips_temporal)
        embeddings = model.project_visual(pooled).float().mean(1) if isinstance(model, Singularity) else None
        yield Block(indices.cpu().numpy(), tokens, embeddings)


def visual_blocks(
    model: Encoders,
    dataset: VisualData,
    config: EvalConfig,
    num_frames: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
) -> Iterable[Block]:
    """This rank's visuals, encoded: one by one as they are asked for, or on disk where there is a `feature_cache`."""
    fresh = encode_blocks(model, pixel_batches(model, dataset, config, num_frames, rank, world_size, device), config)
    if config.feature_cache is None:
        return fresh
    loader, mode = dataset.config, config.eval_frame_ensemble
    name = entry_name(
        model=share(model_digest(model) if rank == 0 else None, world_size),
        corpus=dataset.digest,
        num_frames=1 if dataset.media_type == "image" else num_frames,
        frames="concat" if mode == "concat" else "each",
        image_res=loader.image_res,
        antialias=loader.antialias,
        decode=loader.decode,
        sample_type=loader.video_input.sample_type_test,
    )
    folder = Path(config.feature_cache) / name
    batch_size = getattr(config.batch_size_test, dataset.media_type)
    found = read_entry(folder, batch_size, rank, world_size)
    if found is not None:
        log.info("Visuals of %s come from %s", dataset.name, folder)
        return found
    return write_entry(folder, fresh, dataset.num_visuals, batch_size, rank, world_size)


def collect_visuals(
    model: Singularity, blocks: Iterable[Block], num_visuals: int, config: EvalConfig, world_size: int = 1
) -> VisualFeatures:
    """Keep this rank's visuals, on the device or in host memory unless they lie on disk; gather all embeddings."""
    device = model.temp.device
    if not isinstance(blocks, CachedBlocks):
        blocks = [replace(b, tokens=b.tokens.cpu() if config.eval_offload else b.tokens) for b in blocks]
    own_indices = [torch.from_numpy(block.indices) for block in blocks]
    own_embeddings = [block.embeddings.to(device) for block in blocks if block.embeddings is not None]
    width = model.config.embed_dim
    own = torch.cat([*own_indices, torch.empty(0, dtype=torch.int64)]).to(device)
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
    attended, embeddings = [], []
    for rows in _slices(first, last, TEXT_BATCH) if last > first else [slice(0, 1)]:
        progress(f"encoding texts, {rows.start - first} of {last - first} done")
        states, pooled = model.encode_text(ids[rows], mask[rows])
        own = slice(0, last - first)  # nothing of what a rank without texts encodes, to learn the shapes
        attended.append(model.text_encoder.attend_texts(states, mask[rows])[own])
        embeddings.append(model.project_text(pooled).float()[own])
    return TextFeatures(
        gather_rows(torch.cat(attended), world_size),
        mask,
        gather_rows(torch.cat(embeddings), world_size),
    )


def _slices(first: int, last: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, last)) for start in range(first, last, step))
