"""JSON annotation files as records, one at a time: a list, a list inside an object, or the entries of an object."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import ijson

from runtime.errors import UserError
from sharding.annotations.files import AnnotationFile, Record, record_of
from sharding.annotations.formats.json_text import CheckedJson, Located, RepairedJson, Unparsable

LONGEST_LINE = 2**20  # bytes of a line of JSON that is looked at to tell lines from an object
NOT_JSON = (ijson.JSONError, Unparsable, UnicodeDecodeError)  # the last of half a pair of surrogates

Found = TypeVar("Found")


def json_records(file: AnnotationFile, location: str = "") -> Iterator[Record]:
    """Records of the JSON list at `location`: "" the file, "images" a list in an object, "*" an object's entries.

    An entry KEY: VALUE becomes a record of KEY under "key" and VALUE's own fields, or "value" if it is not an object.

    Raises ValueError: the file is not JSON, or of another form.
    """
    check_form(file, "list" if location == "" else "object")
    if location == "*":
        entries = parsed(file, lambda handle: ijson.kvitems(handle, "", use_float=True))
        for number, (key, value) in enumerate(entries, 1):
            yield Record(file.name, number, {"key": key, **(value if isinstance(value, dict) else {"value": value})})
        return
    found = False
    values = parsed(
        file, lambda handle: ijson.items(handle, f"{location}.item" if location else "item", use_float=True)
    )
    for number, value in enumerate(values, 1):
        found = True
        yield record_of(file, number, value)
    if location and not found and location.split(".")[0] not in list(json_keys(file)):
        has = first_keys(file) or "nothing"
        raise UserError(f'annotation file {file.name} has no "{location}", but {has}: check --corpus and --records')


def parsed(file: AnnotationFile, parse: Callable[[Any], Iterator[Found]]) -> Iterator[Found]:
    """The values that `parse` finds in a JSON file; after a parse error it continues with RepairedJson.

    Raises ValueError: the file is not JSON.
    """
    done = 0
    with file.opened() as handle:
        try:
            for found in parse(CheckedJson(handle)):
                yield found
                done += 1
            return
        except NOT_JSON:
            pass
    with file.opened() as handle:
        stream = Located(RepairedJson(handle), math.inf)
        try:
            for number, found in enumerate(parse(stream)):
                if number >= done:
                    yield found
            return
        except NOT_JSON:
            pass
    raise not_json(file, parse, stream.last)


def not_json(file: AnnotationFile, parse: Callable[[Any], Iterator[Found]], slow: int) -> UserError:
    """The error of a file that is not JSON, with the position: it is parsed again, from byte `slow` on one by one."""
    number = 0
    with file.opened() as handle:
        stream = Located(RepairedJson(handle), slow)
        try:
            for _ in parse(stream):
                number += 1
            reason = "it could be read the second time: run the same command again"
        except NOT_JSON as error:
            reason = json_reason(error)
    after = f", after entry {number}" if number else ""
    location = f"line {stream.line}, column {max(stream.column, 1)}{after}"
    return UserError(f"annotation file {file.name} is not JSON ({reason}): {location}")


def json_reason(error: Exception) -> str:
    """A message for an error of the JSON library, with the remedy if there is one."""
    reason = str(error).strip().splitlines()[0]
    known = {
        "UTF8": "it is not in UTF-8: save it so",
        "codec": "it is not in UTF-8: save it so",
        "premature EOF": "it is truncated: is it complete?",
        "trailing garbage": "more follows behind its end: JSON lines need --format jsonl, several lists a file each",
    }
    return next(
        (meaning for words, meaning in known.items() if words in reason), f"{reason.rstrip('.')}: write it again"
    )


def first_character(file: AnnotationFile) -> bytes:
    """The first character of a file that is not blank."""
    with file.opened() as handle:
        return handle.read(4096).lstrip()[:1]


def is_json_lines(file: AnnotationFile) -> bool:
    """Whether a file, whatever its name, holds JSON lines: an object is its first line, and another one follows."""
    with file.opened() as handle:
        lines = [handle.readline(LONGEST_LINE).strip() for _ in range(2)]
    if not all(line[:1] == b"{" for line in lines):
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def first_record(file: AnnotationFile) -> Record | None:
    """The first object of a JSON list; None where there is no such."""
    return next(json_records(file), None) if first_character(file) == b"[" else None


def json_value(file: AnnotationFile, key: str) -> Any:
    """A value of a JSON object, which comes before its long lists; None where it has none of that name."""
    return next(parsed(file, lambda handle: ijson.items(handle, key, use_float=True)), None)


def json_keys(file: AnnotationFile) -> Iterator[str]:
    """The keys of a JSON object, or of the first object of a JSON list, as they are met; none for anything else."""
    return parsed(file, keys_of)


def first_keys(file: AnnotationFile) -> str:
    """The first of a file's keys, in one line, for messages."""
    return " ".join(", ".join(islice(json_keys(file), 12)).split())


def keys_of(handle: Any) -> Iterator[str]:
    """`json_keys` of an open file."""
    depth, wanted = 0, 1
    for event, value in ijson.basic_parse(handle):
        if event == "start_array" and depth == 0:
            wanted = 2
        if event == "map_key" and depth == wanted:
            yield value
        depth += event in ("start_map", "start_array")
        depth -= event in ("end_map", "end_array")
        if wanted == 2 and depth < 2 and event != "start_array":
            return


def check_form(file: AnnotationFile, wanted: str) -> None:
    """Raise ValueError where a JSON file is not a list or not an object, as `wanted`."""
    with file.opened() as handle:
        start = handle.read(4096).lstrip()
    if not start:
        raise UserError(f"annotation file {file.name} is empty")
    found = {b"[": "list", b"{": "object"}.get(start[:1])
    if found is None:
        raise UserError(
            f"annotation file {file.name} is not JSON: it begins with {start[:20].decode(errors='replace')!r}"
        )
    if found != wanted and found == "object":
        raise UserError(
            f"annotation file {file.name} must be a JSON list of records, but is an object with "
            f"{first_keys(file)}: choose the --corpus that describes it, or name the list's key "
            "with --records"
        )
    if found != wanted:
        raise UserError(f"annotation file {file.name} must be a JSON object, but is a list: check --corpus")
