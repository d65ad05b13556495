"""Augmentations of decoded frames, named by the setting `augmentations`; crop and flip are part of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from loaders.batch import copied
from loaders.order.choices import own_numbers
from loaders.samples import DecodedSamples
from runtime.errors import UserError
from runtime.plugins import Registry

NUMBERS = 16  # random ones of a sample for each augmentation
EXACT = 2**24  # float32 holds these many numbers in [0, 1) of equal distance

# Called with frames (B, T, H, W, 3) uint8, which it may change, and numbers (B, NUMBERS) float32 in [0, 1), both on the
# device where batches are used; returns frames of the same shape and type. The numbers depend on the seed, the sample,
# its traversal and the augmentation's name only.
Augmentation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
AUGMENTATIONS: Registry[Augmentation] = Registry("augmentations")


def check_augmentations(names: Sequence[str]) -> None:
    """Raise UserError for a name that is none of an augmentation's, or stands twice."""
    for number, name in enumerate(names):
        AUGMENTATIONS[name]  # raises where there is none
        if name in names[:number]:
            raise UserError(f"augmentations names {name} twice: its random numbers would be the same, remove one")


def augmented(samples: DecodedSamples, names: Sequence[str], device: torch.device) -> DecodedSamples:
    """The samples after the augmentations of these names, in order, on `device`; as they are without any.

    On a GPU the work is queued on the default stream, where the training step finds it done; the host does not wait.
    Raises UserError: there is no such augmentation, or it returns something else than frames.
    """
    if not names:
        return samples
    frames = copied(samples.frames, device)
    shape = frames.shape
    keys = np.array([spec.key for spec in samples.specs], np.uint64)
    for name in names:
        frames = AUGMENTATIONS[name](frames, copied(augmentation_numbers(keys, name), device))
        if not isinstance(frames, torch.Tensor) or frames.shape != shape or frames.dtype != torch.uint8:
            found = f"{frames.dtype} {tuple(frames.shape)}" if isinstance(frames, torch.Tensor) else f"{type(frames)}"
            raise UserError(f"augmentations: {name} returned {found}, must return torch.uint8 {tuple(shape)}")
    return replace(samples, frames=frames)


def augmentation_numbers(keys: np.ndarray, name: str) -> torch.Tensor:
    """Random numbers (B, NUMBERS) float32 in [0, 1) of an augmentation for samples with these keys (B,) uint64."""
    numbers = own_numbers(keys, name, NUMBERS)
    return torch.from_numpy((np.floor(numbers * EXACT) / EXACT).astype(np.float32))
