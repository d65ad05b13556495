"""Computes match logits over all ranks: each rank scores its own visuals, whose tokens are never sent."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from eval.config import EvalConfig
from eval.features import TextFeatures, VisualFeatures
from model.scoring import match_pairs
from model.singularity import Singularity
from runtime.collectives import gather_rows
from runtime.ranks import ALONE, Ranks


def match_marked(
    model: Singularity,
    visuals: VisualFeatures,
    texts: TextFeatures,
    pairs: np.ndarray,
    config: EvalConfig,
    outside: float,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """Match logits (N, M) float32 of the pairs marked in `pairs` (N, M) bool, `outside` elsewhere; on all ranks.

    Marked pairs of a visual that could not be read hold `outside` too.
    """
    bar = tqdm(visuals.blocks, desc="matching", leave=False, disable=None if ranks.is_first else True)
    blocks = ((block.indices, block.tokens) for block in bar)
    own = match_pairs(
        model, blocks, texts.attended, texts.mask, pairs, config.eval_frame_ensemble, config.pair_batch_size
    )
    visual, text, logit = (gather_rows(torch.from_numpy(part), ranks.world_size).numpy() for part in own)
    scores = np.full(pairs.shape, outside, dtype=np.float32)
    scores[visual, text] = logit
    return scores
