"""Rows and items: a row is one annotation of an image or video, an item is that medium with all its rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Any

MEDIA_TYPES = ("image", "video")

SEGMENT = re.compile(r"#t=(\d+(?:\.\d+)?)(?:,(\d+(?:\.\d+)?))?$")  # a W3C media fragment

FLOAT_TEXT = re.compile(r"[0-9]+\.0+|[0-9](?:\.[0-9]+)?e\+[0-9]{2}")  # whole numbers as tables of floats write them


@dataclass(frozen=True, slots=True)
class Row:
    """One annotation row: captions, or a question, or a choice about the media `source`.

    source: path or URL, with `#t=START,END` where the row is about a segment of a clip.
    filtered: the reason why the row is left out, empty when it is not.
    """

    source: str = ""
    captions: tuple[str, ...] = ()
    question: dict[str, Any] | None = None  # as schema.QUESTION; an empty question_id is filled in later
    choice: dict[str, Any] | None = None  # as schema.CHOICE; likewise
    filtered: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # values of the extra columns


@dataclass
class Item:
    """One image or video and every text that annotation rows give it; `rows` counts those rows."""

    source: str
    rows: int = 0
    captions: list[str] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # the first value of each that is not null

    def add(
        self,
        captions: Iterable[str],
        question: dict[str, Any] | None,
        choice: dict[str, Any] | None,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Take in one more row."""
        self.rows += 1
        self.extra |= {name: value for name, value in extra.items() if self.extra.get(name) is None}
        self.captions.extend(captions)
        for entry, entries in ((question, self.questions), (choice, self.choices)):
            if entry is not None:
                entries.append({**entry, "question_id": entry["question_id"] or f"{self.source}#{len(entries)}"})


def segment_suffix(start: float, end: float) -> str:
    """`#t=START,END` (seconds) of a segment; `end` is infinite where that reaches the clip's end."""
    return f"#t={seconds(start)}" + ("" if math.isinf(end) else f",{seconds(end)}")


def seconds(value: float) -> str:
    """Seconds without needless digits."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def split_segment(source: str) -> tuple[str, float, float]:
    """(media path, start, end) of a source; 0 and infinity without a segment."""
    match = SEGMENT.search(source)
    if match is None:
        return source, 0.0, math.inf
    return source[: match.start()], float(match[1]), float(match[2] or math.inf)


def question_of(record: dict[str, Any], default_id: str) -> dict[str, Any]:
    """A question with its distinct answers, most frequent first, and each one's share of the annotators."""
    given = record.get("answer", [])
    given = given if isinstance(given, list) else [given]
    answers = Counter(plain(answer) for answer in given if answer is not None)
    total = sum(answers.values())
    ranked = sorted(answers.items(), key=lambda pair: -pair[1])
    return {
        "question_id": identifier(record.get("question_id", default_id)),
        "question": str(record["question"]),
        "answers": [answer for answer, _ in ranked],
        "weights": [count / total for _, count in ranked],
        "question_type": plain(record.get("question_type", "")),
        "answer_type": plain(record.get("answer_type", "")),
    }


def plain(value: Any) -> str:
    """A value as text; a whole number without the ".0" of a column of floats."""
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return str(value)


def identifier(value: Any) -> str:
    """An identity as text: 42, 42.0 and "42.0" are the same one."""
    return plain(Decimal(value)) if isinstance(value, str) and FLOAT_TEXT.fullmatch(value) else plain(value)
