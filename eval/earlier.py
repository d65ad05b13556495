"""Refuses to replace an evaluation folder by an evaluation that differs."""

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

MAX_LISTED = 3  # differences

# Settings that change no result, or that are compared otherwise.
WITHOUT_EFFECT = {
    "eval_offload", "feature_cache", "batch_size_test", "pair_batch_size", "eval_num_frames", "benchmark", "gallery",
    "gallery_frames", "save_scores",
}  # fmt: skip


@dataclass(frozen=True)
class SplitInput:
    """The data of a split: its corpus, the digest of its contents, its samples and frames per sample."""

    url: str
    sha256: str
    samples: int
    num_frames: int


def check_replaceable(folder: Path, subject: Subject, config: EvalConfig, splits: Mapping[str, SplitInput]) -> None:
    """Raise UserError where `folder` holds results of other weights, corpora or settings.

    A folder that cannot be read, or of another version, may be replaced.
    """
    try:
        earlier = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        if earlier["version"] != FORMAT_VERSION:
            return
    except (OSError, ValueError, KeyError, TypeError):
        return
    differences = [*_weights(earlier, subject), *_splits(earlier, splits), *_settings(earlier, config)]
    if differences:
        raise UserError(
            f"{folder} has another evaluation, which this one would replace ({'; '.join(differences[:MAX_LISTED])}): "
            "choose another name with label=NAME, or another output_dir"
        )


def _weights(earlier: Mapping[str, Any], subject: Subject) -> Iterator[str]:
    there, here = earlier.get("checkpoint", ""), subject.checkpoint
    if earlier.get("weights") and subject.weights:
        if earlier["weights"] != subject.weights:
            yield f"checkpoint was {there}, is {here}" if there != here else f"the weights of {here} have changed"
    elif there != here:
        yield f"checkpoint was {there or 'the training itself'}, is {here}"


def _splits(earlier: Mapping[str, Any], splits: Mapping[str, SplitInput]) -> Iterator[str]:
    for name, details in earlier["splits"].items():
        if name not in splits:
            yield f"it also has the split {name}"
            continue
        given, corpus = splits[name], details.get("corpus")
        if corpus is not None and corpus["sha256"] != given.sha256:
            moved = corpus["url"] != given.url
            yield f"{name} was {corpus['url']}, is {given.url}" if moved else f"the data of {given.url} have changed"
        elif corpus is None and details["num_visuals"] != given.samples:
            yield f"{name} had {details['num_visuals']:,} samples, has {given.samples:,}"
        if details["num_frames"] != given.num_frames:
            yield f"test frames were {details['num_frames']}, are {given.num_frames}"


def _settings(earlier: Mapping[str, Any], config: EvalConfig) -> Iterator[str]:
    here = json.loads(json.dumps(recorded_settings(config)))
    for key, value in earlier["settings"].items():
        if key not in WITHOUT_EFFECT and key in here and here[key] != value:
            yield f"{key} was {value}, is {here[key]}"
