"""Bytes of pixels to the numbers that a model's first layer reads."""

from __future__ import annotations

from functools import lru_cache

import torch


def normalize(
    frames: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Bytes (B, T, H, W, 3) to normalised pixels (B, T, 3, H, W) of `dtype`, on the device the bytes are on."""
    scale, shift = _scale_and_shift(mean, std, frames.device)
    return (frames.permute(0, 1, 4, 2, 3) * scale + shift).to(dtype)


@lru_cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors and offsets (3, 1, 1) float32, made once per device: a copy to a GPU makes the host wait."""
    with torch.inference_mode(False):  # they outlive it
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32).view(3, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32).view(3, 1, 1)
        return scale.to(device), shift.to(device)
