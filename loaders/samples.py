"""The values that pass from stage to stage of a loader, from a position of the epoch to a batch.

    EpochPlan            order/epoch.py    which sample, caption or question is at a position of the epoch
      -> SampleSpec      order/mixture.py  the sample, and what is shown of it: frames, crop, flip, text
      -> RawSample       shards.py         the JPEG bytes of its frames, or the reason why there are none
      -> DecodedSamples  decode/           the pixels of all samples of a step, or the reason of each without any;
                                           augment.py changes them
      -> Batch           batch.py          the tensors of a step; preprocessing/text.py makes the tokens

train.py chains the stages for training, and replaces samples without pixels at the end of the chain; evaluation.py
chains them for test sets, and reports such samples. No stage calls an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # decoding processes import this file, and start faster without them
    import torch

    from loaders.index import Record


class BadSampleError(Exception):
    """The bytes of a sample cannot be used; the message is the reason that the log shows."""


class Window(NamedTuple):
    """The part of a frame that is shown, in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


class Clip(NamedTuple):
    """The input of a decoder: the bytes of T frames, their size in the index, and the window to show."""

    jpegs: Sequence[bytes]
    height: int
    width: int
    window: Window


class SampleSpec(NamedTuple):
    """A sample and what is shown of it this time: T frames, a window of them, a text or a question's answers."""

    record: Record  # where its bytes are
    frames: np.ndarray  # (T,) int64
    window: Window
    corpus: int = 0  # its number in the mixture
    name: str = ""  # corpus and key, for logs
    text: str = ""
    answers: tuple[tuple[str, float], ...] = ()  # with their weights
    reason: str = ""  # the reason why it cannot be used, known from its index
    extra: Mapping[str, Any] = MappingProxyType({})  # its values of the extra columns
    key: int = 0  # of all random choices for it

    @property
    def visual(self) -> int:
        """A number that is the same for all specs of one image or video."""
        return (self.corpus << 56) | (self.record.shard << 32) | self.record.row

    @property
    def pixels(self) -> tuple[str, bytes]:
        """The key of its pixels: the sample and the frames."""
        return self.name, self.frames.tobytes()


class RawSample(NamedTuple):
    """The JPEG bytes of a sample's T frames; or none, and the reason."""

    spec: SampleSpec
    jpegs: Sequence[bytes]
    reason: str = ""

    def clip(self) -> Clip:
        """The decoder's input; a sample without bytes becomes frames of zero bytes, which cannot be decoded."""
        record = self.spec.record
        return Clip(self.jpegs or [b""] * len(self.spec.frames), record.height, record.width, self.spec.window)


@dataclass(frozen=True)
class DecodedSamples:
    """The pixels of B samples.

    frames: (B, T, S, S, 3) uint8, on the decoder's device; undefined where there is a reason.
    reasons: row -> why the sample has no pixels.
    """

    specs: Sequence[SampleSpec]
    frames: torch.Tensor
    reasons: dict[int, str]

    def with_rows(self, rows: Sequence[int], others: DecodedSamples) -> DecodedSamples:
        """These samples with `others` in some rows; the frames are written in place, because a copy takes long."""
        specs = list(self.specs)
        for row, spec, frames in zip(rows, others.specs, others.frames, strict=True):
            specs[row] = spec
            self.frames[row].copy_(frames)  # from another device perhaps: decode=auto may have chosen another decoder
        return replace(self, specs=specs, reasons={rows[row]: reason for row, reason in others.reasons.items()})


def whole_sample(record: Record, frames: np.ndarray) -> SampleSpec:
    """A sample of which these frames are shown whole."""
    return SampleSpec(record, frames, Window(0, 0, record.height, record.width), reason=record.reason)
