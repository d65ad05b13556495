"""Keeps an evaluation from replacing another one, with other results, in the same folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.config import EvalConfig
from eval.outputs import Subject, recorded_settings
from eval.report.evaluations import FORMAT_VERSION
from runtime.errors import UserError

TOLD = 3  # differences

# Settings that change no result, or what else is compared holds.
WITHOUT_EFFECT = {
    "eval_offload", "feature_cache", "batch_size_test", "pair_batch_size", "eval_num_frames", "benchmark", "gallery",
    "gallery_frames", "save_scores",
}  # fmt: skip


@dataclass(frozen=True)
class SplitInput:
    """What a split is evaluated on: its corpus, its contents' digest, its samples, and the frames shown of each."""

    url: str
    sha256: str
    samples: int
    num_frames: int


def check_replaceable(folder: Path, subject: Subject, config: EvalConfig, splits: Mapping[str, SplitInput]) -> None:
    """Raise UserError where `folder` holds results that evaluating `splits` would not give again.

    What cannot be read, or is of another version, is no hindrance.
    """
    try:
        earlier = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        if earlier["version"] != FORMAT_VERSION:
            return
    except (OSError, ValueError, KeyError, TypeError):
        return
    differences = [*_of_weights(earlier, subject), *_of_splits(earlier, splits), *_of_settings(earlier, config)]
    if differences:
        raise UserError(
            f"{folder} holds another evaluation, which this one would replace ({'; '.join(differences[:TOLD])}): give "
            "this one a name of its own, label=NAME, or another output_dir"
        )


def _of_weights(earlier: Mapping[str, Any], subject: Subject) -> Iterator[str]:
    there, here = earlier.get("checkpoint", ""), subject.checkpoint
    if earlier.get("weights") and subject.weights:
        if earlier["weights"] != subject.weights:
            yield f"checkpoint {there} then, {here} now" if there != here else f"{here} had other weights then"
    elif there != here:
        yield f"checkpoint {there or 'of the training itself'} then, {here} now"


def _of_splits(earlier: Mapping[str, Any], splits: Mapping[str, SplitInput]) -> Iterator[str]:
    for name, details in earlier["splits"].items():
        if name not in splits:
            yield f"it has the split {name} too"
            continue
        given, corpus = splits[name], details.get("corpus")
        if corpus is not None and corpus["sha256"] != given.sha256:
            moved = corpus["url"] != given.url
            yield f"{name} was {corpus['url']} then, {given.url} now" if moved else f"{given.url} held other data then"
        elif corpus is None and details["num_visuals"] != given.samples:
            yield f"{name} had {details['num_visuals']:,} samples then, {given.samples:,} now"
        if details["num_frames"] != given.num_frames:
            yield f"{details['num_frames']} test frames then, {given.num_frames} now"


def _of_settings(earlier: Mapping[str, Any], config: EvalConfig) -> Iterator[str]:
    here = json.loads(json.dumps(recorded_settings(config)))
    for key, value in earlier["settings"].items():
        if key not in WITHOUT_EFFECT and key in here and here[key] != value:
            yield f"{key} {value} then, {here[key]} now"
