"""Temporal embeddings of the frames of a clip, and the encoder over the frames at each spatial position."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from model.bert import bert_config, initialize_bert, run_layer
from model.config import ModelConfig
from model.torchvision_cpu import BertLayer
from runtime.errors import UserError

MAX_SEQUENCES = 65_535  # of one call of a GPU's attention kernels: the limit of a grid's second dimension


def embeddings_for_frames(embeddings: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Learned (1, T, 1, D) to (1, num_frames, 1, D): the first ones, or interpolated linearly when there are fewer."""
    if num_frames <= embeddings.shape[1]:
        return embeddings[:, :num_frames]
    channels = embeddings.squeeze(2).transpose(1, 2)  # (1, D, T)
    return functional.interpolate(channels, num_frames, mode="linear").transpose(1, 2).unsqueeze(2)


def resize_embeddings(embeddings: torch.Tensor, num_frames: int) -> torch.Tensor:
    """(1, T, 1, D) of a checkpoint to (1, num_frames, 1, D) of a new model: truncated, or extended with zeros."""
    missing = num_frames - embeddings.shape[1]
    if missing <= 0:
        return embeddings[:, :num_frames]
    return torch.cat([embeddings, embeddings.new_zeros(1, missing, 1, embeddings.shape[3])], dim=1)


class TemporalEncoder(nn.Module):
    """BERT layers like the text encoder's, as wide as the vision tokens, over the frames at each position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text, width = config.text_encoder, config.vision_encoder.width
        if width * text.heads % text.width:
            raise UserError(
                f"temporal_vision_encoder: vision_encoder.width {width} is not a multiple of the text heads' width "
                f"{text.width // text.heads}: change vision_encoder.width or text_encoder.heads"
            )
        bert = bert_config(text, width=width, heads=width * text.heads // text.width)
        self.recompute = False
        self.layer = nn.ModuleList(BertLayer(bert) for _ in range(config.temporal_vision_encoder.num_layers))
        initialize_bert(self, text.initializer_range)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, L, D) to tokens of the same shape; each attends to its position in all frames."""
        batch, frames, length, width = tokens.shape
        states = tokens.transpose(1, 2).reshape(batch * length, frames, width)
        parts = []
        for part in states.split(MAX_SEQUENCES):
            for layer in self.layer:
                part = run_layer(layer, self.recompute, part)
            parts.append(part)
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        return states.view(batch, length, frames, width).transpose(1, 2)
