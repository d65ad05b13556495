"""The paper's numbers (Lei, Berg and Bansal, ACL 2023), for comparison in reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eval.metrics import with_means

SOURCE = "Lei, Berg and Bansal, Revealing Single Frame Bias for Video-and-Language Learning, ACL 2023"


@dataclass(frozen=True)
class Published:
    """One row of the paper: a benchmark's split, in one setting, with metrics in percent by their official names.

    pretraining: the corpora's size, 5M or 17M. num_frames: test frames.
    """

    benchmark: str
    split: str
    pretraining: str
    temporal: bool
    zero_shot: bool
    num_frames: int
    metrics: dict[str, float]

    @property
    def title(self) -> str:
        """The setting in words."""
        words = [f"Singularity{'-temporal' if self.temporal else ''} {self.pretraining}"]
        return ", ".join([*words, "zero-shot" if self.zero_shot else "fine-tuned"])


@cache
def all_published() -> tuple[Published, ...]:
    """Every row, means of recalls added."""
    rows = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    for row in rows:
        row["metrics"] = {name: round(value, 2) for name, value in with_means(row["metrics"]).items()}
    return tuple(Published(**row) for row in rows)


def published(benchmark: str | None, split: str, zero_shot: bool) -> list[Published]:
    """The paper's results on a benchmark's split, with or without fine-tuning on it."""
    return [
        row for row in all_published() if (row.benchmark, row.split, row.zero_shot) == (benchmark, split, zero_shot)
    ]


def benchmarks() -> list[str]:
    """Names of the benchmarks that the paper reports."""
    return list(dict.fromkeys(row.benchmark for row in all_published()))
