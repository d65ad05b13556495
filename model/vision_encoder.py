"""What the model needs of a vision backbone, and the registry of backbones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from runtime.plugins import Registry


class VisionEncoder(nn.Module):
    """What the model needs of a vision backbone; each frame of a clip is encoded by itself.

    A class that derives from it, registered with `@VISION("NAME")`, is chosen by `vision_encoder.type: NAME`. It is
    built as `Class(config, **options)`: the ModelConfig and `vision_encoder.options`.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # that pixels in [0, 1] are normalised with
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    recompute = False  # whether gradient checkpointing is on, see `model.text.run_layer`
    measured: tuple[int, int] | None = None  # of an own backbone: FLOPs and tokens of an image, set when it is built

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (N, 3, H, W), H = W = image_res, to tokens (N, L, D) and pooled vectors (N, D).

        D is `vision_encoder.width`, L the same for all images. The fusion layers attend to the tokens, of which the
        first stands for the whole image; VTC compares the pooled vectors.
        """
        raise NotImplementedError

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Whether the backward pass computes activations again."""
        self.recompute = enable

    def resized(self, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Tensor `name` of a checkpoint, whose shape differs from `shape` here, for example for another image_res.

        By default as it is, which is an error later.
        """
        return tensor

    def from_published(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `vision_encoder.pretrained` by the names of this module; surplus ones are ignored."""
        return state


VISION: Registry[Callable[..., VisionEncoder]] = Registry(
    "vision_encoder.type", "the name of another image backbone of timm"
)
