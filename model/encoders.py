"""The parts that all Singularity models share: encoders of clips and of texts, and their fusion."""

from __future__ import annotations

import torch
from torch import nn

import model.patch_filters
import model.towers  # noqa: F401  # they register their encoders
from model.config import ENSEMBLES, ModelConfig
from model.freezing import Freezable
from model.fusion import CrossAttentionKeys
from model.history import History
from model.temporal import TemporalEncoder, embeddings_for_frames
from model.text import build_text
from model.vision import build_vision
from runtime.errors import UserError


class Encoders(Freezable):
    """Encodes clips (B, T, 3, H, W) and texts (B, Lt), and fuses the two."""

    history = History()  # of the weights

    def __init__(self, config: ModelConfig, pad_id: int = 0) -> None:
        """Random initial weights. Raises ValueError when sizes in `config` do not fit together."""
        super().__init__()
        if config.num_frames < 1:
            raise UserError(f"num_frames is {config.num_frames}: must be at least 1")
        self.config = config
        self.pad_id = pad_id
        width = config.vision_encoder.width
        self.vision_encoder = build_vision(config)
        self.text_encoder = build_text(config, pad_id)
        self.temporal_embeddings = nn.Parameter(torch.zeros(1, config.num_frames, 1, width))
        self.temporal_vision_encoder = TemporalEncoder(config) if config.temporal_vision_encoder.enable else None
        self.mean = tuple(map(float, self.vision_encoder.mean))
        self.std = tuple(map(float, self.vision_encoder.std))

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Keep only the layers' inputs for the backward pass, which computes the rest again: a third more time."""
        self.vision_encoder.set_gradient_checkpointing(enable)
        self.text_encoder.recompute = enable
        if self.temporal_vision_encoder is not None:
            self.temporal_vision_encoder.recompute = enable

    def encode_frames(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each frame by itself, without the temporal modules (for late fusion).

        frames (B, T, 3, H, W) to tokens (B, T, L, D) and pooled vectors (B, T, D).
        """
        batch, num_frames = frames.shape[:2]
        images = frames.flatten(0, 1).to(self.temporal_embeddings.dtype)
        tokens, pooled = self.vision_encoder(images)
        return tokens.unflatten(0, (batch, num_frames)), pooled.unflatten(0, (batch, num_frames))

    def encode_visual(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """frames (B, T, 3, H, W) to tokens (B, T·L, D), frame after frame, and pooled vectors (B, T, D)."""
        tokens, pooled = self.encode_frames(frames)
        if self.config.add_temporal_embed:
            tokens = tokens + embeddings_for_frames(self.temporal_embeddings, tokens.shape[1])
        if self.temporal_vision_encoder is not None and tokens.shape[1] > 1:
            tokens = self.temporal_vision_encoder(tokens)
            if self.config.temporal_vision_encoder.update_pooler_embed:
                pooled = tokens[:, :, 0]
        return tokens.flatten(1, 2), pooled

    def clip_tokens(
        self, frames: torch.Tensor, ensemble: str = "concat", skip_temporal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips (B, T, 3, H, W) to tokens (B, F, S, D) to score texts with, and pooled vectors (B, T, D).

        concat: F = 1, all frames fused early; mean, max, lse: F = T, each frame by itself. Raises as `check_ensemble`.
        """
        self.check_ensemble(ensemble, skip_temporal)
        if ensemble != "concat":
            return self.encode_frames(frames)
        tokens, pooled = self.encode_visual(frames)
        return tokens[:, None], pooled

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text-only layers: ids and mask (B, Lt) to states (B, Lt, D) and pooled vectors (B, D)."""
        states = self.text_encoder(input_ids, attention_mask)
        return states, self.pool_text(states, attention_mask)

    def pool_text(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (B, D) of texts from states (B, Lt, D) of `encode_text` and mask (B, Lt)."""
        if self.config.text_encoder.pooling == "first":
            return states[:, 0]
        weights = attention_mask.to(states.dtype)[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)  # an empty text may have no token

    def visual_keys(self, visual_tokens: torch.Tensor) -> CrossAttentionKeys:
        """Keys and values of the fusion layers for visuals (N, S, D); compute them once for all texts of a visual."""
        return tuple(layer.project(visual_tokens) for layer in self.text_encoder.fusion_layers)

    def check_ensemble(self, ensemble: str, skip_temporal: bool = False) -> None:
        """Raise UserError for an unknown ensemble, and without `skip_temporal` for a late one that would leave out this
        model's temporal modules."""
        if ensemble not in ENSEMBLES:
            raise UserError(f"eval_frame_ensemble is {ensemble!r}: must be one of {', '.join(ENSEMBLES)}")
        temporal = self.temporal_vision_encoder is not None or self.config.add_temporal_embed
        if ensemble != "concat" and temporal and not skip_temporal:
            raise UserError(
                f"eval_frame_ensemble={ensemble} scores each frame by itself and would leave out this model's temporal "
                "modules: use eval_frame_ensemble=concat, or ensemble_skips_temporal=true to repeat what the official "
                "code does"
            )
