"""The numbers of an evaluation beside the published ones."""

from __future__ import annotations

import json
from dataclasses import dataclass

from launch.reproduce.steps import Reproduction, num_samples

PASSED, DIFFERENT = 0, 1  # exit codes


@dataclass(frozen=True)
class Comparison:
    """A metric of a split, in percent; here: None where the answers of the split are not public, or nothing was
    re-ranked.
    """

    split: str
    metric: str
    published: float
    here: float | None

    @property
    def difference(self) -> float:
        """Points here above the published number; 0 where there is none here."""
        return 0.0 if self.here is None else self.here - self.published


def compare(task: Reproduction) -> list[Comparison]:
    """Every published metric of the row beside the evaluation's."""
    metrics = json.loads(task.metrics_file.read_text(encoding="utf-8"))
    found = []
    for split, published in task.row.published.items():
        here = metrics.get(f"{split}/", metrics.get(split, {}))
        found += [Comparison(split, name, value, here.get(name)) for name, value in published.items()]
    return found


def other_test_sets(task: Reproduction) -> list[str]:
    """Sentences about test corpora that are not as large as the published test sets."""
    found = []
    for split, url in task.evaluation.test_urls().items():
        samples, expected = num_samples(url), task.corpora()[url].samples
        if expected and samples != expected:
            found.append(f"{split}: {url} has {samples:,} of {expected:,} images or videos, the numbers do not compare")
    return found


def report(task: Reproduction, tolerance: float) -> tuple[str, int]:
    """The comparison as text, and the exit code: DIFFERENT beyond `tolerance` points, with another test set, or
    where nothing was re-ranked.
    """
    compared, others = compare(task), other_test_sets(task)
    lines = [f"{'split':<16}{'metric':<10}{'published':>10}{'here':>9}{'difference':>12}"]
    for each in compared:
        here = "       -           -" if each.here is None else f"{each.here:>9.2f}{each.difference:>+12.2f}"
        lines.append(f"{each.split:<16}{each.metric:<10}{each.published:>10.2f}{here}")
    unknown = dict.fromkeys(each.split for each in compared if each.here is None)
    if unknown and task.evaluation.task == "retrieval":
        others += [
            f"{split}: not re-ranked, as the published numbers are: leave out k_test=0, or take a checkpoint whose "
            "matching head was trained"
            for split in unknown
        ]
        unknown = {}
    for split in unknown:
        pattern = task.run_folder / "evaluation" / "*" / "submission" / f"{split}.json"
        lines.append(f"{split}: the answers are not public, upload {pattern} to the benchmark's evaluation server")
    largest = max(abs(each.difference) for each in compared)
    verdict = "within" if largest <= tolerance else "outside of"
    if any(each.here is not None for each in compared):
        lines.append(f"{task.row.name}: largest difference {largest:.2f} points, {verdict} the tolerance {tolerance:g}")
    return "\n".join([*lines, *others]), DIFFERENT if others or largest > tolerance else PASSED
