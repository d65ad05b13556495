"""Reads the two evaluations of a study (launch/study.sh) and writes its table, study.md, and its picture, study.png."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # started by its path, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.charts import grouped_bars, png
from sharding.shapes.scenes import MOTIONS
from sharding.shapes.texts import motion_words

RUNS = {"single": "1 frame", "temporal": "4 frames, temporal encoder"}
RANKINGS = {"i2t_emb": "dual encoder", "i2t_x": "matching"}
CAPTION = "something {}"  # of a motion label


@dataclass(frozen=True)
class Share:
    """A share of `count` cases, in percent, beside what guessing reaches."""

    name: str
    value: float
    chance: float
    count: int

    @property
    def noise(self) -> float:
        """Two standard errors of the share, in percent."""
        share = min(max(self.value / 100, 0.5 / self.count), 1 - 0.5 / self.count)
        return 200 * math.sqrt(share * (1 - share) / self.count)


def direction_share(scores: np.ndarray, texts: list[str], truth: list[str], ranking: str) -> Share:
    """The share of clips in which the true motion scores higher than its reverse.

    scores (N, M) of N clips and M labels `texts`; truth: each clip's label. Ties count half.
    """
    reverse = {CAPTION.format(motion_words(m)): CAPTION.format(motion_words(m.reverse)) for m in MOTIONS}
    column = {text: number for number, text in enumerate(texts)}
    points = [
        (1 + np.sign(scores[clip, column[label]] - scores[clip, column[reverse[label]]])) / 2
        for clip, label in enumerate(truth)
        if reverse[label] in column
    ]
    return Share(f"motion or its reverse ({ranking})", 100 * float(np.mean(points)), 50.0, len(points))


def read(folder: Path) -> list[Share]:
    """The shares of one evaluation folder."""
    metrics = json.loads((folder / "metrics.json").read_text())
    details = json.loads((folder / "evaluation.json").read_text())["splits"]
    predictions: dict[str, Any] = json.loads((folder / "predictions.json").read_text())["motion"]
    texts = [query["text"] for query in predictions["text_to_visual"]]
    truth = [query["correct"][0] for query in predictions["visual_to_text"]]
    shares = []
    with np.load(folder / "scores.npz") as scores:
        for key, ranking in RANKINGS.items():
            shares.append(direction_share(scores[f"motion/{key}"], texts, truth, ranking))
    for split, metric, name in (("motion", "txt_r1", "motion among all"), ("appearance", "img_r10", "appearance R@10")):
        for suffix, ranking in (("_emb/", "dual encoder"), ("/", "matching")):
            chance, count = details[split]["chance"][metric], details[split]["num_visuals"]
            shares.append(Share(f"{name} ({ranking})", metrics[split + suffix][metric], chance, count))
    return shares


def difference(one: Share, several: Share) -> str:
    """`several` less `one` with two standard errors, taken as two samples of clips."""
    return f"{several.value - one.value:+.1f} ± {math.hypot(one.noise, several.noise):.1f}"


def table(found: dict[str, list[Share]]) -> str:
    """Markdown: a row a share, a column a run, then the second run less the first."""
    head = ["", *(RUNS[run] for run in found), "difference", "chance"]
    rows = []
    for one, several in zip(*found.values()):
        shares = [f"{share.value:.1f} ± {share.noise:.1f}" for share in (one, several)]
        rows.append([one.name, *shares, difference(one, several), f"{one.chance:.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def draw(found: dict[str, list[Share]], path: Path) -> None:
    """Bars of every share with its noise, and chance as a line."""
    first = next(iter(found.values()))
    bars = {RUNS[run]: [(share.value, share.noise) for share in shares] for run, shares in found.items()}
    label = "percent of the test clips; black: chance; whiskers: two standard errors"
    figure = grouped_bars([share.name for share in first], bars, [share.chance for share in first], label)
    path.write_bytes(png(figure))


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the study, with single/ and temporal/")
    folder = parser.parse_args().folder
    found = {run: read(folder / run / "evaluation/final") for run in RUNS}
    text = table(found)
    (folder / "study.md").write_text(text)
    draw(found, folder / "study.png")
    sys.stdout.write("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
