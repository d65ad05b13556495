"""Assigns items to shards: a pure function of annotations and settings, so any worker can build any shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import UserError
from runtime.flags import flag
from sharding.annotations.items import MEDIA_TYPES, Item
from sharding.annotations.staging import Staged
from storage.fetching import Fetching

FRAMES_PER_CLIP = 24  # assumed when clips are spread over shards, before any is opened
BYTES_PER_PIXEL = 0.25  # of a JPEG at the usual quality, assumed likewise
SMALLEST_SHARD = {"image": 64, "video": 8}  # samples
SPREAD = 16  # number of shards for small corpora, for as many workers, unless the shards get too small


@dataclass(frozen=True)
class ShardSettings:
    """The settings that decide the shards' bytes; recorded in corpus.json."""

    name: str = flag("", "first part of the shards' file names (default: the output folder's name)")
    media_type: str = flag("", "required unless --corpus says it", choices=MEDIA_TYPES)
    size: int = flag(224, "shorter side of stored frames in pixels (default: as --corpus says, or %(default)s)")
    quality: int = flag(90, "JPEG quality, 1 to 100 (default: %(default)s)")
    fps: float = flag(2.0, "stored frames per second of video (default: as --corpus says, or 2)")
    max_frames: int = flag(0, "maximum number of frames per clip (default: as --corpus says, or all)")
    shard_mb: int = flag(256, "target size of a shard (default: %(default)s)")

    def check(self) -> None:
        """Raise ValueError, with the remedy, for settings that cannot work."""
        if self.media_type not in MEDIA_TYPES:
            raise UserError(f"--media-type is {self.media_type!r}, must be image or video")
        if self.size < 16 or self.fps <= 0 or self.max_frames < 0 or not 1 <= self.quality <= 100:
            raise UserError("--size must be at least 16, --fps above 0, --max-frames 0 or more, --quality 1 to 100")
        if self.shard_mb < 1:
            raise UserError(f"--shard-mb is {self.shard_mb}, must be at least 1")
        if "." in self.name or "/" in self.name or not 1 <= len(self.name) <= 60:
            raise UserError(f"--name {self.name!r} must be 1 to 60 characters without dots and slashes")

    def samples_per_shard(self, samples: int) -> int:
        """Number of items in each shard when `samples` items are packed."""
        frames = 1 if self.media_type == "image" else self.max_frames or FRAMES_PER_CLIP
        by_size = self.shard_mb * 2**20 / (frames * self.size**2 * 4 / 3 * BYTES_PER_PIXEL)
        return max(1, min(int(by_size), max(SMALLEST_SHARD[self.media_type], math.ceil(samples / SPREAD))))

    def shares(self, samples: int) -> dict[str, int]:
        """Description of the assignment of `samples` items to shards, for `build.json`."""
        return {"items": samples, "samples_per_shard": self.samples_per_shard(samples)}


@dataclass(frozen=True)
class Task:
    """One shard to build: its number, its items, where from and where to."""

    number: int
    items: Sequence[Item]  # read from disk where they are looked at; a list to send a task to another machine
    media_root: str
    output: str
    scratch: str
    settings: ShardSettings
    fetching: Fetching
    extra_columns: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The shard's file name."""
        return f"{self.settings.name}-{self.number:06d}.tar"

    def key(self, number: int) -> str:
        """The key of the task's item `number`, unique in the corpus."""
        return f"{self.number:06d}{number:06d}"


def plan_shards(
    staged: Staged,
    settings: ShardSettings,
    media_root: str,
    output: str,
    scratch: Path,
    fetching: Fetching,
    extra_columns: dict[str, str] | None = None,
) -> list[Task]:
    """One task per shard; together they contain every item once, in order."""
    each, where = settings.samples_per_shard(staged.items), (media_root, output, str(scratch))
    return [
        Task(number, staged.between(first, first + each), *where, settings, fetching, extra_columns or {})
        for number, first in enumerate(range(0, staged.items, each))
    ]
