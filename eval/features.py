"""Encodes a test set's visuals and texts, each on one rank, and matches pairs of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.cache import Block, CachedBlocks, entry_name, model_digest, read_entry, write_entry
from eval.config import EvalConfig
from loaders.evaluation import VisualSet
from model.encoders import Encoders
from model.scoring import match_pairs
from model.singularity import Singularity
from preprocessing.normalization import normalize
from preprocessing.text import Tokenizer
from runtime.activity import progress
from runtime.collectives import broadcast, gather_objects, gather_rows
from runtime.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

TEXT_BATCH = 256


@dataclass(frozen=True)
class VisualFeatures:
    """This rank's visuals, block by block, and the embeddings of all.

    embeddings (N, E) float32 of all ranks' visuals, mean of the frames' unit vectors, zero where a visual is missing;
    present (N,) bool.
    """

    blocks: Sequence[Block] | CachedBlocks
    embeddings: torch.Tensor
    present: np.ndarray


@dataclass(frozen=True)
class TextFeatures:
    """All M texts, cut to the longest: attended (M, Lt, D), mask (M, Lt), embeddings (M, E) float32.

    attended: hidden states of the text layers of the cross-encoder, before any visual.
    """

    attended: torch.Tensor
    mask: torch.Tensor
    embeddings: torch.Tensor


@contextmanager
def evaluating(model: Encoders, config: EvalConfig) -> Iterator[None]:
    """Put the model into evaluation mode without gradients; afterwards it is as before.

    Raises ValueError for an ensemble that does not fit the model.
    """
    model.check_ensemble(config.eval_frame_ensemble, config.ensemble_skips_temporal)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def pixel_batches(
    model: Encoders,
    dataset: VisualSet,
    config: EvalConfig,
    num_frames: int,
    ranks: Ranks,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised frames (B, T, 3, H, W) on the model's device, and indices (B,), of this rank's visuals."""
    device = next(model.parameters()).device
    batch_size = getattr(config.batch_size_test, dataset.media_type)
    total = -(-dataset.num_visuals // ranks.world_size)
    hidden = None if ranks.is_first else True  # None: shown on a terminal only
    with tqdm(total=total, desc=f"encoding {dataset.name}", leave=False, disable=hidden) as bar:
        progress(f"visual 0 of {total} encoded")
        for batch in dataset.batches(num_frames, batch_size, ranks.rank, ranks.world_size, device):
            yield normalize(batch.frames.to(device, non_blocking=True), model.mean, model.std), batch.indices
            bar.update(len(batch.indices))
            progress(f"visual {bar.n} of {total} encoded")


def missing_visuals(dataset: VisualSet, present: np.ndarray, ranks: Ranks) -> dict[int, str]:
    """Number and reason of all ranks' visuals that are not in `present` (N,) bool, on all ranks."""
    reasons: dict[int, str] = {}
    for part in gather_objects(dict(dataset.missing), ranks.world_size):
        reasons |= part
    return {int(i): reasons.get(int(i), "not delivered by the loader") for i in np.flatnonzero(~present)}


def encode_blocks(
    model: Encoders, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], config: EvalConfig
) -> Iterator[Block]:
    """Encode normalised frames (B, T, 3, H, W) on the model's device, with their indices (B,), batch by batch."""
    for frames, indices in batches:
        tokens, pooled = model.clip_tokens(frames, config.eval_frame_ensemble, config.ensemble_skips_temporal)
        embeddings = model.project_visual(pooled).float().mean(1) if isinstance(model, Singularity) else None
        yield Block(indices.cpu().numpy(), tokens, embeddings)


def visual_blocks(
    model: Encoders,
    dataset: VisualSet,
    config: EvalConfig,
    num_frames: int,
    ranks: Ranks,
) -> Iterable[Block]:
    """This rank's visuals, encoded: block by block on demand, or on disk where there is a `feature_cache`."""
    fresh = encode_blocks(model, pixel_batches(model, dataset, config, num_frames, ranks), config)
    if config.feature_cache is None:
        return fresh
    loader, mode = dataset.config, config.eval_frame_ensemble
    name = entry_name(
        model=broadcast(model_digest(model) if ranks.is_first else None, ranks.world_size),
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
    found = read_entry(folder, dataset.num_visuals, batch_size, ranks)
    if found is not None:
        log.info("Read the encoded visuals of %s from %s", dataset.name, folder)
        return found
    return write_entry(folder, fresh, dataset.num_visuals, batch_size, ranks)


def collect_visuals(
    model: Singularity, blocks: Iterable[Block], num_visuals: int, config: EvalConfig, ranks: Ranks = ALONE
) -> VisualFeatures:
    """Keep this rank's visuals on the device, in host memory or on disk; gather all embeddings."""
    device = model.temp.device
    if not isinstance(blocks, CachedBlocks):
        blocks = [replace(b, tokens=b.tokens.cpu() if config.eval_offload else b.tokens) for b in blocks]
    own_indices = [torch.from_numpy(block.indices) for block in blocks]
    own_embeddings = [block.embeddings.to(device) for block in blocks if block.embeddings is not None]
    width = model.config.embed_dim
    own = torch.cat([*own_indices, torch.empty(0, dtype=torch.int64)]).to(device)
    rows = torch.cat([*own_embeddings, torch.empty(0, width, device=device)])
    indices = gather_rows(own, ranks.world_size)
    embeddings = torch.zeros(num_visuals, width, device=device)
    embeddings[indices] = gather_rows(rows, ranks.world_size)
    present = np.zeros(num_visuals, dtype=bool)
    present[indices.cpu().numpy()] = True
    return VisualFeatures(blocks, embeddings, present)


def encode_texts(
    model: Singularity, input_ids: torch.Tensor, attention_mask: torch.Tensor, ranks: Ranks = ALONE
) -> TextFeatures:
    """Encode texts (M, Lt), each on one rank; the result is gathered on all."""
    device = model.temp.device
    lengths = attention_mask.sum(1)
    longest = max(1, int(lengths.max())) if len(lengths) else 1
    ids, mask = input_ids[:, :longest].to(device), attention_mask[:, :longest].to(device)
    first, last = (len(ids) * number // ranks.world_size for number in (ranks.rank, ranks.rank + 1))
    attended, embeddings = [], []
    for start in range(first, max(last, first + 1), TEXT_BATCH):
        progress(f"encoding texts, {start - first} of {last - first} done")
        rows = slice(start, min(start + TEXT_BATCH, last)) if last > first else slice(0, 1)
        states, pooled = model.encode_text(ids[rows], mask[rows])
        own = slice(0, last - first)  # a rank without texts encodes one only to know the shapes
        attended.append(model.text_encoder.attend_texts(states, mask[rows])[own])
        embeddings.append(model.project_text(pooled).float()[own])
    states, pooled = (gather_rows(torch.cat(part), ranks.world_size) for part in (attended, embeddings))
    return TextFeatures(states, mask, pooled)


def encode_test_set(
    model: Singularity,
    dataset: VisualSet,
    tokenizer: Tokenizer,
    texts: list[str],
    config: EvalConfig,
    num_frames: int,
    ranks: Ranks,
) -> tuple[VisualFeatures, TextFeatures]:
    """The features of a test set's visuals and of `texts`."""
    blocks = visual_blocks(model, dataset, config, num_frames, ranks)
    visuals = collect_visuals(model, blocks, dataset.num_visuals, config, ranks)
    length = int(getattr(dataset.config.max_txt_l, dataset.media_type))
    written = dataset.as_written(texts, tokenizer.clean)
    return visuals, encode_texts(model, *tokenizer.encode(written, length), ranks)


def match_marked(
    model: Singularity,
    visuals: VisualFeatures,
    texts: TextFeatures,
    pairs: np.ndarray,
    config: EvalConfig,
    outside: float,
    ranks: Ranks = ALONE,
    log_odds: bool = False,
) -> np.ndarray:
    """Match logits (N, M) float32 of the pairs marked in `pairs` (N, M) bool, `outside` elsewhere; on all ranks.

    log_odds: of a match, instead of its logit. Marked pairs of a visual that could not be read hold `outside` too.
    """
    bar = tqdm(visuals.blocks, desc="matching", leave=False, disable=None if ranks.is_first else True)
    blocks = ((block.indices, block.tokens) for block in bar)
    own = match_pairs(
        model, blocks, texts.attended, texts.mask, pairs, config.eval_frame_ensemble, config.pair_batch_size, log_odds
    )
    visual, text, logit = (gather_rows(torch.from_numpy(part), ranks.world_size).numpy() for part in own)
    scores = np.full(pairs.shape, outside, dtype=np.float32)
    scores[visual, text] = logit
    return scores
