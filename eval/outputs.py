"""Writes an evaluation's folder: metrics, outcomes, scores, predictions, and the report."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import EvalConfig
from eval.outcomes import Outcomes, intervals, write_outcomes
from eval.report.evaluations import FORMAT_VERSION
from eval.report.grouping import items_digest
from eval.report.page import write_report
from runtime.activity import progress
from runtime.units import data_size
from storage.files import atomic_folder

MODEL_INPUT = ("image_res", "antialias", "paragraph", "max_txt_l", "max_q_len", "max_a_len", "precision")


@dataclass(frozen=True)
class SplitOutput:
    """What is written of one test set.

    metrics: entries of metrics.json. details: of evaluation.json. predictions: of predictions.json;
    submission: in the benchmark's own format. matrices: of scores, float32. gallery: examples for the
    report, with `pictures` as JPEG bytes by name.
    """

    name: str
    metrics: dict[str, dict[str, float]]
    details: dict[str, Any]
    outcomes: Sequence[Outcomes]
    predictions: Any
    gallery: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)
    submission: list[dict[str, Any]] | None = None
    matrices: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """The evaluation's name in reports (by default run and label) and its weights.

    checkpoint: their name as given; weights: a digest of them; started_from: what their training started from, in
    words; each empty where unknown.
    zero_shot: the weights were not fine-tuned; temporal: the model has a temporal encoder.
    """

    title: str = ""
    checkpoint: str = ""
    weights: str = ""
    zero_shot: bool = False
    temporal: bool = False
    started_from: str = ""


def write_evaluation(
    folder: str | Path,
    splits: Sequence[SplitOutput],
    config: EvalConfig,
    subject: Subject = Subject(),
    save_scores: bool = True,
) -> Path:
    """Write test sets' results to `folder` (RUN/evaluation/LABEL), replacing an older evaluation.

    To be called by rank 0. The folder appears complete or not at all:

    - metrics.json: {"SPLIT/": {"txt_r1": ...}, "SPLIT_emb/": {...}}, re-ranked and dual encoder; {"SPLIT": {...}} of
      questions and multiple choice
    - evaluation.json: sizes, settings, intervals, chance level, missing samples, seconds
    - outcomes.parquet: how each query went, see `eval.outcomes`
    - scores.npz, unless save_scores is off: of retrieval SPLIT/i2t_x, SPLIT/t2i_x, SPLIT/i2t_emb (its transpose is
      t2i_emb), float32
    - predictions.json: the results of each query; submission/SPLIT.json: in the benchmark's format
    - gallery.json and thumbnails/: examples for the report, with pictures
    - report.html
    """
    folder = Path(folder)
    matrices = {f"{split.name}/{key}": each for split in splits for key, each in split.matrices.items()}
    with atomic_folder(folder) as temporary, ThreadPoolExecutor(1) as writer:
        (temporary / "thumbnails").mkdir()
        saved = writer.submit(_write_scores, temporary / "scores.npz", matrices) if matrices and save_scores else None
        _write_results(temporary, splits, config, subject)
        if saved is not None:
            _wait_for(saved, temporary / "scores.npz")
    write_report([folder], folder / "report.html")
    return folder


def _wait_for(saved: Future[None], path: Path) -> None:
    """Return when the file is written; reports progress as long as it grows."""
    size = 0
    while not saved.done():
        wait([saved], timeout=1)
        if path.is_file() and path.stat().st_size > size:
            size = path.stat().st_size
            progress(f"writing {path.name}, {data_size(size)}")
    saved.result()


def _write_scores(path: Path, matrices: Mapping[str, np.ndarray]) -> None:
    """Write an .npz; re-ranked scores, mostly one value, are compressed, similarities would not shrink."""
    plain = {name: matrix for name, matrix in matrices.items() if name.endswith("_emb")}
    packed = {name: matrix for name, matrix in matrices.items() if name not in plain}
    for compression, chosen in ((zipfile.ZIP_STORED, plain), (zipfile.ZIP_DEFLATED, packed)):
        with zipfile.ZipFile(path, "a", compression, compresslevel=1) as archive:
            for name, matrix in chosen.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, matrix)


def _write_results(temporary: Path, splits: Sequence[SplitOutput], config: EvalConfig, subject: Subject) -> None:
    outcomes = [part for split in splits for part in split.outcomes]
    write_json(temporary / "metrics.json", {name: row for split in splits for name, row in split.metrics.items()})
    write_json(temporary / "evaluation.json", _details(splits, outcomes, config, subject))
    write_outcomes(temporary / "outcomes.parquet", outcomes)
    write_json(temporary / "predictions.json", {split.name: split.predictions for split in splits})
    for split in splits:
        if split.submission is not None:
            (temporary / "submission").mkdir(exist_ok=True)
            write_json(temporary / "submission" / f"{split.name}.json", split.submission)
        for name, picture in split.pictures.items():
            (temporary / "thumbnails" / name).write_bytes(picture)
    write_json(temporary / "gallery.json", {split.name: split.gallery for split in splits})


def _details(
    splits: Sequence[SplitOutput], outcomes: Sequence[Outcomes], config: EvalConfig, subject: Subject
) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        **asdict(subject),
        "task": config.task,
        "benchmark": config.benchmark,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": recorded_settings(config),
        "intervals": intervals(outcomes),
        "splits": {split.name: {"items_sha256": items_digest(split.predictions), **split.details} for split in splits},
    }


def recorded_settings(config: EvalConfig) -> dict[str, Any]:
    """The settings that evaluation.json keeps: those of evaluation and of the model's input."""
    values = asdict(config)
    kept = {key: value for key, value in values.items() if key in EvalConfig.__dataclass_fields__ or key in MODEL_INPUT}
    if "video_input" in values:
        kept["sample_type_test"] = values["video_input"]["sample_type_test"]
    return kept


def write_json(path: Path, value: Any) -> None:
    """Write plain values as indented UTF-8."""
    progress(f"writing {path.name}")
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
