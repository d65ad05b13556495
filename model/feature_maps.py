"""Convolutional and hierarchical backbones of timm: the cells of their feature map are the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from model.backbones import as_tokens, create_backbone, pixel_statistics
from model.config import ModelConfig
from model.vision_encoder import VisionEncoder
from runtime.errors import UserError


def _crashes_channels_last(module: nn.Module) -> bool:
    """Whether the gradient of its weights writes outside of their memory, where CPUs have AVX2 and no AVX-512.

    oneDNN does so (PyTorch 2.11) in fp32: kernels of 1 x 1 that skip pixels of fewer than 8 channels, as RepVGG begins.
    """
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or max(module.stride) == 1:
        return False
    return 1 < module.in_channels // module.groups < 8


class _Features(nn.Module):
    """Tokens and pooled vectors of a backbone."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VisionEncoder`, without the pooled vector before the tokens."""
        features = self.backbone.forward_features(images)
        tokens = as_tokens(self.backbone, features)
        pooled = self.backbone.forward_head(features, pre_logits=True)
        return tokens, pooled if pooled.shape[1] == tokens.shape[2] else tokens.mean(1)


class FeatureMapEncoder(VisionEncoder):
    """A convolutional or hierarchical backbone of timm: each cell of its last feature map is a token.

    The first token and the pooled vector are what its classifier would see; where that has another width than the map,
    the mean of the cells. BatchNorm keeps the statistics of the weights, also in training: running ones would differ
    between processes, and batches of one process are small.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Random weights."""
        super().__init__()
        vision = config.vision_encoder
        self._name = vision.type
        self.mean, self.std = pixel_statistics(vision.type)
        self.features = _Features(create_backbone(vision, config.image_res))
        self._channels_last = not any(map(_crashes_channels_last, self.modules()))

    def train(self, mode: bool = True) -> FeatureMapEncoder:
        """As `nn.Module.train`; modules with running statistics stay in evaluation mode."""
        super().train(mode)
        for module in self._with_statistics():
            module.train(False)
        return self

    def _with_statistics(self) -> list[nn.Module]:
        return [module for module in self.modules() if getattr(module, "track_running_stats", False)]

    @property
    def needs_weights(self) -> bool:
        """Whether random weights cannot be trained: statistics that stay as they are would normalise nothing."""
        return bool(self._with_statistics())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VisionEncoder`."""
        if self._channels_last:  # convolutions of a CPU take half the time
            images = images.contiguous(memory_format=torch.channels_last)
        tokens, pooled = functional_call(self.features, self._converted_buffers(images.dtype), images)
        return torch.cat([pooled[:, None], tokens], 1), pooled

    def _converted_buffers(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The buffers of another floating-point type in this one: DeepSpeed converts parameters, not buffers."""
        named = self.features.named_buffers()
        return {name: each.to(dtype) for name, each in named if each.is_floating_point() and each.dtype != dtype}

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """As `VisionEncoder`. Raises UserError for a backbone without it."""
        try:
            self.features.backbone.set_grad_checkpointing(enable)
        except AssertionError:  # timm's way to say so
            raise UserError(
                f"vision_encoder.type={self._name} has no gradient checkpointing: set gradient_checkpointing=false"
            ) from None
