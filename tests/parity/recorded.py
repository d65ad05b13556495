"""What the official code's pure functions gave, as recorded in a folder, against ours: texts, clips, images, scores,
answers, learning rates, parameter groups, settings and resized tables (case 08).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from eval.metrics import retrieval_metrics
from eval.tasks.answers import (
    Annotated,
    accuracies,
    accuracy_by_type,
    normalized,
    without_articles,
    without_punctuation,
)
from loaders.decode.cpu import CpuDecoder
from loaders.samples import Clip, Window
from model.checkpoints.files import VOCABULARY
from model.checkpoints.positions import resize_relative
from model.config import ModelConfig, VisionConfig
from model.temporal import embeddings_for_frames, resize_embeddings
from model.vision import TimmEncoder, pixel_statistics
from preprocessing.frames import choose_frames, frames_at_rate
from preprocessing.normalization import normalize
from preprocessing.text import Tokenizer, clean_text
from runtime.settings import read_layers
from sharding.media.picture import picture_size
from tests.parity.comparison import Comparison, as_lists
from tests.parity.training import optimizer_config
from train.config.settings import RunConfig
from train.optimizer import Schedule, parameter_groups

GREY_LEVELS = 1.01  # OpenCV and PyTorch round a bicubic value to 8 bits differently, now and then


def compare_pure(folder: Path) -> Comparison:
    """The functions recorded in tables/ and beside it, as far as they are the same here.

    Raises MissingError or UserError when the vocabulary, that of the folder above, is missing or broken.
    """
    result = Comparison(folder.name)
    _tables(folder, result)
    for path in sorted((folder / "tables").glob("*.json")):
        if path.stem in TABLES:
            TABLES[path.stem](folder, json.loads(path.read_text(encoding="utf-8")), result)
    if (folder / "image_transform.npz").is_file():
        _images(folder, result)
    return result


def _tables(folder: Path, result: Comparison) -> None:
    """Position tables and temporal embeddings in other sizes."""
    with np.load(folder / "interpolation.npz") as arrays:
        tables = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    resize: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
        "beit": resize_relative,
        "vit": _resize_absolute,
        "temporal_interp": embeddings_for_frames,
        "temporal_load": resize_embeddings,
    }
    for name, expected in tables.items():
        match = re.fullmatch(rf"({'|'.join(resize)})_(\d+)_(\d+)_out", name)
        if match is None:
            continue
        kind, start, end = match[1], int(match[2]), int(match[3])
        if kind == "temporal_interp" and end < start:
            continue  # a clip shorter than the table uses its first rows
        result.close(name, resize[kind](tables[f"{kind.split('_')[0]}_{start}_{end}_in"], end), expected)


def _resize_absolute(table: torch.Tensor, patches: int) -> torch.Tensor:
    vision = VisionConfig(type="vit", width=table.shape[2], depth=1, heads=1)
    return TimmEncoder(ModelConfig(vision_encoder=vision)).resize_positions(table, patches)


def _cleaning(_: Path, rows: list[dict[str, Any]], result: Comparison) -> None:
    for number, row in enumerate(rows):
        if row["max_l"] is None:  # only the tokenizer cuts texts here
            result.equal(f"pre_text {number}", clean_text(row["text"]), row["result"])


def _token_ids(folder: Path, table: dict[str, Any], result: Comparison) -> None:
    tokenizer = Tokenizer.load(str(folder.parent / VOCABULARY))
    for number, row in enumerate(table["rows"]):
        ids, mask = tokenizer.encode([row["input"]], table["max_length"])
        result.equal(f"tokenizer {number}: ids", ids[0].tolist(), row["input_ids"])
        result.equal(f"tokenizer {number}: mask", mask[0].tolist(), row["attention_mask"])


def _frames(_: Path, rows: list[dict[str, Any]], result: Comparison) -> None:
    """Of the ways to choose frames those that are the same here: the middle ones, and those at a rate."""
    for number, row in enumerate(rows):
        if row["sample"] == "middle" and row["fix_start"] is None:
            ours = choose_frames("middle", row["num_frames"], row["vlen"], 1.0)
        elif row["sample"].startswith("fps") and row["indices"]:
            ours = frames_at_rate(float(row["sample"][3:]), row["vlen"], row["input_fps"])
            ours = ours[: row["max_num_frames"]] if row["max_num_frames"] > 0 else ours
        else:
            continue
        result.equal(f"frame_indices {number}", ours.tolist(), row["indices"])


def _images(folder: Path, result: Comparison) -> None:
    """The evaluation's view of the images, without antialiasing, as the official environment had it."""
    encoded = [path.read_bytes() for path in sorted((folder / "images").glob("*.png"))]
    with np.load(folder / "image_transform.npz") as arrays:
        for name in (name for name in arrays.files if name.endswith("_official")):
            kind, size = name.split("_")[:2]
            decoder, frames = CpuDecoder(int(size), processes=1), []
            for data in encoded:
                width, height = picture_size(data)
                whole = Window(0, 0, height, width, False)
                frames.append(decoder.decode([Clip([data], height, width, whole)])[0].clone())
            decoder.close()
            mean, std = pixel_statistics(kind)
            level = GREY_LEVELS / (255 * min(std))
            result.close(f"image_transform {name}", normalize(torch.cat(frames), mean, std), arrays[name], 0.0, level)


def _recalls(folder: Path, table: dict[str, Any], result: Comparison) -> None:
    with np.load(folder / "itm_eval.npz") as scores:
        for case, row in table.items():
            truth = as_lists(row["img2txt"]), as_lists(row["txt2img"])
            found = retrieval_metrics(scores[f"{case}_i2t"], scores[f"{case}_t2i"], *truth)
            result.equal(f"itm_eval {case}", list(found.values.items()), list(row["metrics"].items()))


def _answers(_: Path, table: dict[str, Any], result: Comparison) -> None:
    for row in table["normalisation"]:
        text = row["text"]
        ours = [without_punctuation(text), without_articles(text), normalized(text)]
        result.equal(f"normalisation of {text!r}", ours, [row["punctuation"], row["digit_article"], row["full"]])
    questions = [Annotated(q["answer"], q["question_type"], q["answer_type"]) for q in table["ground_truth"]]
    each = accuracies(questions, _given(table), "vqa")
    for question, value in zip(table["ground_truth"], each, strict=True):
        number = str(question["question_id"])
        percent = None if value is None else round(100 * value, 2)
        result.equal(f"accuracy of question {number}", percent, table["per_question_accuracy"][number])
    official = {"overall": table["accuracy"]["overall"]}
    official |= {f"answer_type/{name}": value for name, value in table["accuracy"]["perAnswerType"].items()}
    official |= {f"question_type/{name}": value for name, value in table["accuracy"]["perQuestionType"].items()}
    result.equal("vqa_accuracy", accuracy_by_type(questions, each), official)
    exact = table["open_ended"]
    questions = [Annotated([q["answer"]]) for q in exact["ground_truth"]]
    matched = accuracy_by_type(questions, accuracies(questions, _given(exact), "exact"))
    result.equal("open_ended accuracy", matched, exact["result"])


def _given(table: dict[str, Any]) -> list[str | None]:
    """The prediction for each question, in order."""
    answers = {row["question_id"]: row["answer"] for row in table["predictions"]}
    return [answers.get(question["question_id"]) for question in table["ground_truth"]]


def _rates(_: Path, cases: list[dict[str, Any]], result: Comparison) -> None:
    for number, case in enumerate(cases):
        steps = case["num_training_steps"]  # past them the official rate rises again
        schedule = Schedule(case["num_warmup_steps"], steps, case["min_lr_multi"])
        ours = [[lr * schedule.multiplier(step) for lr in case["base_lrs"]] for step in range(steps)]
        result.close(f"lr_schedule {number}", ours, case["lr_at_step"][:steps], rtol=1e-9, atol=1e-15)


def _groups(_: Path, cases: list[dict[str, Any]], result: Comparison) -> None:
    """Names of parameters by learning rate and weight decay."""
    for number, case in enumerate(cases):
        shapes = {name: len(shape) for name, shape in case["shapes"].items()}
        groups = parameter_groups(shapes, optimizer_config(case["optimizer"]))
        ours = {(group.lr, group.weight_decay): set(group.names) for group in groups}
        official = {(group["lr"], float(group["weight_decay"])): set(group["names"]) for group in case["groups"]}
        result.equal(f"optimizer_groups {number}", ours, official)


def _settings(_: Path, cases: list[dict[str, Any]], result: Comparison) -> None:
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "case.yaml")
            path.write_text(case["yaml"], encoding="utf-8")
            merged = OmegaConf.create(read_layers(RunConfig, path, case["overrides"]))
        official = case["result"]
        if "debug=True" in case["overrides"]:  # officially this turns wandb off; here the two are independent
            official = {**official, "wandb": {"enable": True}}
        result.equal(f"config_merge {number}", OmegaConf.to_container(merged, resolve=True), official)


TABLES: dict[str, Callable[[Path, Any, Comparison], None]] = {
    "pre_text": _cleaning,
    "tokenizer": _token_ids,
    "frame_indices": _frames,
    "itm_eval": _recalls,
    "vqa_accuracy": _answers,
    "lr_schedule": _rates,
    "optimizer_groups": _groups,
    "config_merge": _settings,
}
