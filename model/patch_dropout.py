"""Patch dropout: a share of the patch tokens is left out in training, which saves that share of the vision encoder.

Li et al., "Scaling Language-Image Pre-training via Masking" (FLIP), 2023; Liu et al., "PatchDropout", 2023. They draw
for each image; here all images of a forward pass keep the same patches: the frames of a clip stay aligned for the
temporal encoder, and BEiT's position bias is gathered once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from model.torchvision_cpu import Beit, VisionTransformer
from runtime.errors import UserError


class PatchDropout(nn.Module):
    """Takes the place of a module of timm's transformer between the position embeddings and the layers."""

    kept: torch.Tensor | None = None  # (K,) int64: positions of the tokens that the present forward pass keeps

    def __init__(self, share: float, prefix: int) -> None:
        """share: of the patches that are left out; prefix: tokens before the patches, such as [CLS]."""
        super().__init__()
        self.share, self.prefix = share, prefix

    def draw(self, patches: int, device: torch.device) -> torch.Tensor:
        """Choose among `patches` patches at random, and return the positions (K,) of the kept tokens, in order."""
        chosen = torch.randperm(patches, device=device)[: kept_patches(patches, self.share)]
        first = torch.arange(self.prefix, device=device)
        self.kept = torch.cat([first, self.prefix + chosen.sort().values])
        return self.kept

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N, L, D) to the kept ones (N, K, D)."""
        return tokens if self.kept is None else tokens.index_select(1, self.kept)


def kept_patches(patches: int, share: float) -> int:
    """How many of `patches` patches are kept where `share` of them are left out."""
    return max(1, round(patches * (1 - share)))


def add_patch_dropout(transformer: nn.Module, kind: str, share: float) -> PatchDropout | None:
    """Add patch dropout to a transformer of timm; None for `share` 0. Raises UserError where it cannot be added.

    kind: `vision_encoder.type`.
    """
    if share == 0:
        return None
    if not 0 < share < 1:
        raise UserError(f"vision_encoder.patch_dropout is {share}: must be at least 0 and below 1")
    dropout = PatchDropout(share, getattr(transformer, "num_prefix_tokens", 0))
    if isinstance(transformer, VisionTransformer):
        transformer.patch_drop = cast(Any, dropout)
    elif isinstance(transformer, Beit) and transformer.rel_pos_bias is None:
        transformer.pos_drop = dropout
    else:
        raise no_patch_dropout(kind, share)
    return dropout


def no_patch_dropout(kind: str, share: float) -> UserError:
    """The error for a vision encoder without patch dropout."""
    return UserError(
        f"vision_encoder.patch_dropout is {share}, which vision_encoder.type={kind} does not support: set it to 0, or "
        "take beit, vit, deit or a VisionTransformer of timm by its name"
    )
