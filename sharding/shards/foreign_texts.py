"""The texts of a sample in another tool's tar: its KEY.json and KEY.txt."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any

from sharding.annotations.columns import ABSENT, value_at
from sharding.annotations.extra import extra_value
from sharding.annotations.items import question_of

CAPTION_KEYS = ("captions", "caption", "text", "TEXT")
MARKS = {  # byte order marks; that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class SampleError(Exception):
    """A sample that cannot be indexed; the message is the reason that the report shows."""


def json_fields(texts: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of KEY.json, without nulls."""
    if "json" not in texts:
        return {}
    try:
        fields = json.loads(decoded(texts["json"], "json"))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"its JSON cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise SampleError("its JSON is not an object")
    return {key: value for key, value in fields.items() if not is_null(value)}


def decoded(data: bytes, ending: str) -> str:
    """A text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, which is removed; raises SampleError."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise SampleError(f"its {ending} is not {error.encoding.upper()} at byte {error.start}: convert it") from None
    if "\0" in text:
        raise SampleError(f"its {ending} holds NUL characters, as UTF-16 without a byte order mark does: convert it")
    return text


def is_null(value: Any) -> bool:
    """Whether a value is null, or the NaN that tables have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number_of(value: Any) -> float:
    """A positive number, also one in quotes; 0 for anything else."""
    try:
        number = 0.0 if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        return 0.0
    return number if 0 < number < 1e300 else 0.0


def captions_of(texts: Mapping[str, bytes], fields: Mapping[str, Any]) -> list[str]:
    """A sample's captions; those in its JSON count before KEY.txt."""
    for key in CAPTION_KEYS:
        given = fields.get(key)
        captions: list[Any] = [text for text in (given if isinstance(given, list) else [given]) if not is_null(text)]
        if not all(isinstance(text, str) for text in captions):
            raise SampleError(f"its caption is not a text but {str(given)[:60]!r}")
        if any(text.strip() for text in captions):
            return [text for text in captions if text.strip()]
    text = decoded(texts["txt"], "txt").strip() if "txt" in texts else ""
    return [text] if text else []


def extra_of(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The values of extra columns, name -> type, in a sample's JSON; None where it has none."""
    found = {}
    for name, kind in columns.items():
        value = value_at(fields, name, name.split("."))
        try:
            found[name] = extra_value(None if value is ABSENT else value, kind)
        except ValueError as error:
            raise SampleError(f"its {name} must be {error}") from None
    return found


def times_of(fields: Mapping[str, Any], count: int, rate: float) -> list[float]:
    """Seconds at which a clip's frames are shown: those in its JSON if it has one per frame, else by the frame rate."""
    times = fields.get("frame_times")
    numbers = isinstance(times, list) and all(type(time) in (int, float) and abs(time) < 1e300 for time in times)
    if isinstance(times, list) and numbers and len(times) == count:
        return times
    return [number / rate for number in range(count)]


def questions_of(fields: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The questions in a sample's JSON, with their answers."""
    given = fields.get("questions") or [fields]
    if not isinstance(given, list):
        raise SampleError(f"its questions are not a list but {str(given)[:60]!r}")
    found = []
    for number, record in enumerate(record for record in given if not is_null(record)):
        if not isinstance(record, dict):
            raise SampleError(f"its question is not an object but {str(record)[:60]!r}")
        record = {name: value for name, value in record.items() if not is_null(value)}
        question = record.get("question", "")
        if not isinstance(question, str):
            raise SampleError(f"its question is not a text but {str(question)[:60]!r}")
        if question.strip():
            found.append(with_answers(record, key if given == [fields] else f"{key}#{number}"))
    return found


def with_answers(record: dict[str, Any], default_id: str) -> dict[str, Any]:
    """A question as the index has it: with the weights of its answers, where the JSON is one of ours, or counted."""
    answers = record.get("answers") if "answers" in record else record.get("answer", [])
    answers = [answer for answer in (answers if isinstance(answers, list) else [answers]) if not is_null(answer)]
    if not all(isinstance(answer, str | int | float) for answer in answers):
        raise SampleError(f"its answer is not a text but {str(answers)[:60]!r}")
    counted = question_of({**record, "answer": answers}, default_id)
    weights = record.get("weights")
    if isinstance(weights, list) and len(weights) == len(answers) and all(number_of(weight) for weight in weights):
        counted |= {"answers": [str(answer) for answer in answers], "weights": weights}
    return counted


def choices_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The multiple-choice questions in a sample's JSON: options and the number of the right one, -1 where unknown."""
    given = fields.get("choices") or []
    if not isinstance(given, list):
        raise SampleError(f"its choices are not a list but {str(given)[:60]!r}")
    found = []
    for record in given:
        if is_null(record):
            continue
        options = record.get("options") if isinstance(record, dict) else None
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise SampleError(f"its choice has no list of options but is {str(record)[:60]!r}")
        answer = record.get("answer")
        if is_null(answer):
            answer = -1
        if type(answer) is not int or not -1 <= answer < len(options):
            raise SampleError(f"its choice has the answer {str(answer)[:60]!r}, and {len(options)} options")
        found.append({"question_id": str(record.get("question_id") or ""), "options": options, "answer": answer})
    return found
