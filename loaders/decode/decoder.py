"""The interface of all decoders: JPEG bytes of a batch to cropped 8-bit frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from loaders.samples import Clip, DecodedSamples, RawSample

BATCHES_AT_ONCE = 2  # in the decoding stage: the second one fills the gaps at the end of the first


class Decoder(Protocol):
    """Decodes the clips of a batch; a bad one harms no other. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The value of `decode` that means this one."""

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """Frames (B, T, S, S, 3) uint8 RGB, and the reason of each clip that failed (its frames are undefined)."""

    def close(self) -> None:
        """Release threads, processes and memory."""


def decode_samples(decoder: Decoder, samples: Sequence[RawSample]) -> DecodedSamples:
    """The pixels of a batch's samples. One that has no bytes keeps its own reason."""
    frames, bad = decoder.decode([sample.clip() for sample in samples])
    reasons = {row: samples[row].reason or reason for row, reason in bad.items()}
    return DecodedSamples([sample.spec for sample in samples], frames, reasons)
