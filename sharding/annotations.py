"""Annotation files to items: one image or video with all its captions, questions and choices."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec

MEDIA_KEYS = ("image", "video")
PART = re.compile(r"#t=(\d+(?:\.\d+)?)(?:,(\d+(?:\.\d+)?))?$")  # the W3C's form of a part of a clip


@dataclass
class Item:
    """One image or video and every text that annotation rows give it; `rows` counts those rows."""

    source: str
    rows: int = 0
    captions: list[str] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)


def read_items(files: Iterable[str]) -> list[Item]:
    """Items of the annotation files in order of first appearance; rows about the same media are merged.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not a JSON list of records, or a record lacks its media or its text.
    """
    items: dict[str, Item] = {}
    for file in files:
        for number, record in enumerate(read_records(file)):
            source = media_of(record, file, number)
            item = items.setdefault(source, Item(source))
            item.rows += 1
            add_text(item, record, file, number)
    return list(items.values())


def read_records(file: str) -> Iterator[dict[str, Any]]:
    """Records of one annotation file in the official JSON form."""
    try:
        with fsspec.open(file, "rt", encoding="utf-8") as handle:
            records = json.load(handle)
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file {file} does not exist: check --annotations") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"annotation file {file} is not JSON ({error})") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f'annotation file {file} must be a JSON list of {{"image" or "video": path, "caption": ...}}')
    yield from records


def media_of(record: dict[str, Any], file: str, number: int) -> str:
    """The media path of a record, with `#t=START,END` where it is a part of a clip.

    Raises:
        ValueError: naming file and record when there is no path, or its "start" and "end" are no seconds.
    """
    for key in MEDIA_KEYS:
        if isinstance(record.get(key), str) and record[key]:
            return record[key] + part_of(record, file, number)
    raise ValueError(f'{file}, record {number}: no "image" or "video" path; its keys are {sorted(record)}')


def part_of(record: dict[str, Any], file: str, number: int) -> str:
    """`#t=START,END` (seconds) of a record with "start" or "end"; else nothing."""
    start, end = record.get("start"), record.get("end")
    if start is None and end is None:
        return ""
    try:
        first, last = float(start or 0), math.inf if end is None else float(end)
    except (TypeError, ValueError):
        first, last = 0.0, -1.0
    if not 0 <= first < last:
        raise ValueError(f'{file}, record {number}: "start" {start!r} and "end" {end!r} must be seconds, start first')
    return f"#t={seconds(first)}" + ("" if math.isinf(last) else f",{seconds(last)}")


def seconds(value: float) -> str:
    """Seconds without needless digits."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def split_part(source: str) -> tuple[str, float, float]:
    """(media path, start, end) of a source; 0 and infinity where it names no part."""
    match = PART.search(source)
    if match is None:
        return source, 0.0, math.inf
    return source[: match.start()], float(match[1]), float(match[2] or math.inf)


def add_text(item: Item, record: dict[str, Any], file: str, number: int) -> None:
    """Add a record's caption, question or choice to its item."""
    if "question" in record:
        item.questions.append(question_of(record, f"{item.source}#{len(item.questions)}"))
        return
    caption = record.get("caption")
    captions = [caption] if isinstance(caption, str) else caption
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise ValueError(f'{file}, record {number}: "caption" must be a text or a list of texts, not {caption!r}')
    if isinstance(record.get("answer"), int):
        number_of = str(record.get("question_id", f"{item.source}#{len(item.choices)}"))
        item.choices.append({"question_id": number_of, "options": captions, "answer": record["answer"]})
    else:
        item.captions.extend(captions)


def question_of(record: dict[str, Any], default_id: str) -> dict[str, Any]:
    """A question with its distinct answers, most frequent first, and each one's share of the annotators."""
    given = record.get("answer", [])
    answers = Counter(str(answer) for answer in (given if isinstance(given, list) else [given]))
    total = sum(answers.values())
    ranked = sorted(answers.items(), key=lambda pair: -pair[1])
    return {
        "question_id": str(record.get("question_id", default_id)),
        "question": str(record["question"]),
        "answers": [answer for answer, _ in ranked],
        "weights": [count / total for _, count in ranked],
        "question_type": str(record.get("question_type", "")),
        "answer_type": str(record.get("answer_type", "")),
    }
