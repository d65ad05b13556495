"""What the official code's pure functions gave, as recorded in a folder, against ours: texts, clips, images, scores,
answers, learning rates, parameter groups and settings.

`python -m tests.parity` asks for it, because these functions live in all the rooms.
"""

from __future__ import annotations

import json
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
from loaders.batch import normalize
from loaders.decode.cpu import CpuDecoder
from loaders.order.choices import choose_frames, frames_at_rate
from loaders.samples import Clip, Window
from loaders.text import Tokenizer, clean_text
from model.checkpoints.files import VOCABULARY
from model.vision import pixel_statistics
from sharding.media.picture import picture_size
from tests.parity.comparison import Comparison
from train.config.files import without_none_strings
from train.config.settings import DifferentLearningRate, OptimizerConfig
from train.groups import parameter_groups
from train.schedule import Schedule

GREY_LEVELS = 1.01  # OpenCV and PyTorch round a bicubic value to 8 bits differently, now and then


def compare_recorded(folder: Path, result: Comparison) -> None:
    """Add to `result` all that `folder` has recorded in tables/ and beside it, and that is the same here.

    The vocabulary is that of the folder above. Raises FileNotFoundError or ValueError when that is missing or broken.
    """
    for path in sorted((folder / "tables").glob("*.json")):
        if path.stem in TABLES:
            TABLES[path.stem](folder, json.loads(path.read_text(encoding="utf-8")), result)
    if (folder / "image_transform.npz").is_file():
        _images(folder, result)


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
            texts_of_visual = [row["img2txt"][str(i)] for i in range(len(row["img2txt"]))]
            visuals_of_text = [[row["txt2img"][str(i)]] for i in range(len(row["txt2img"]))]
            found = retrieval_metrics(scores[f"{case}_i2t"], scores[f"{case}_t2i"], texts_of_visual, visuals_of_text)
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
        settings = case["optimizer"]
        config = OptimizerConfig(
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            different_lr=DifferentLearningRate(**settings["different_lr"]),
        )
        groups = parameter_groups({name: len(shape) for name, shape in case["shapes"].items()}, config)
        ours = {(group.lr, group.weight_decay): set(group.names) for group in groups}
        official = {(group["lr"], float(group["weight_decay"])): set(group["names"]) for group in case["groups"]}
        result.equal(f"optimizer_groups {number}", ours, official)


def _settings(_: Path, cases: list[dict[str, Any]], result: Comparison) -> None:
    for number, case in enumerate(cases):
        merged = OmegaConf.merge(OmegaConf.create(case["yaml"]), OmegaConf.from_dotlist(case["overrides"]))
        official = case["result"]
        if "debug=True" in case["overrides"]:  # officially this turns wandb off; here the two are independent
            official = {**official, "wandb": {"enable": True}}
        result.equal(
            f"config_merge {number}", without_none_strings(OmegaConf.to_container(merged, resolve=True)), official
        )


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
