"""Opening annotation files of any store, compressed or not, and their JSON as records, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import ijson

BOMS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an annotation file; `number` counts them from 1."""

    file: str
    number: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.file}, record {self.number}"


@contextmanager
def opened(file: str) -> Iterator[IO[bytes]]:
    """An annotation file's bytes, decompressed (.gz, .bz2, .xz, .zst), without a byte order mark.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is in UTF-16.
    """
    try:
        with fsspec.open(file, "rb", compression="infer") as handle:
            start = handle.read(4)
            if start[:2] in BOMS:
                raise ValueError(f"annotation file {file} is in {BOMS[start[:2]]}: save it as UTF-8")
            handle.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            yield handle
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file {file} does not exist: check --annotations") from None
    except IsADirectoryError:
        raise ValueError(f"{file} is a folder: --annotations are files, such as {file.rstrip('/')}/*.json") from None


def json_records(file: str, place: str = "") -> Iterator[Record]:
    """Records of the JSON list at `place`: "" the file itself, "images" a list in an object, "*" an object's entries.

    An entry KEY: VALUE becomes a record of KEY under "key" and VALUE's own fields, or, where it is no object, "value".

    Raises:
        ValueError: the file is no JSON, or of another form.
    """
    found = False
    with opened(file) as handle, json_errors(file):
        check_form(file, "list" if place == "" else "object")
        if place == "*":
            entries = ijson.kvitems(handle, "", use_float=True)
            for number, (key, value) in enumerate(entries, 1):
                yield Record(file, number, {"key": key, **(value if isinstance(value, dict) else {"value": value})})
            return
        values = ijson.items(handle, f"{place}.item" if place else "item", use_float=True)
        for number, value in enumerate(values, 1):
            found = True
            if not isinstance(value, dict):
                raise ValueError(f"annotation file {file}, record {number} must be an object, not {str(value)[:60]!r}")
            yield Record(file, number, value)
    if place and not found and place.split(".")[0] not in json_keys(file):
        raise ValueError(f'annotation file {file} has no "{place}"; it has {", ".join(json_keys(file)) or "nothing"}')


def json_keys(file: str) -> list[str]:
    """The keys of a JSON object, or of the first object of a JSON list; none for anything else."""
    keys: list[str] = []
    with opened(file) as handle, json_errors(file):
        depth, wanted = 0, 1
        for event, value in ijson.basic_parse(handle):
            if event == "start_array" and depth == 0:
                wanted = 2
            if event == "map_key" and depth == wanted:
                keys.append(value)
            depth += event in ("start_map", "start_array")
            depth -= event in ("end_map", "end_array")
            if wanted == 2 and depth < 2 and event != "start_array":
                break
    return keys


def check_form(file: str, wanted: str) -> None:
    """Raise ValueError where a JSON file is no list, or no object, as `wanted`."""
    with opened(file) as handle:
        start = handle.read(4096).lstrip()
    if not start:
        raise ValueError(f"annotation file {file} is empty")
    found = {b"[": "list", b"{": "object"}.get(start[:1])
    if found is None:
        raise ValueError(f"annotation file {file} is not JSON: it begins with {start[:20].decode(errors='replace')!r}")
    if found != wanted and found == "object":
        raise ValueError(
            f"annotation file {file} must be a JSON list of records, but is an object with "
            f"{', '.join(json_keys(file)[:12])}: choose the --corpus that describes it, or name the list's key "
            "with --records"
        )
    if found != wanted:
        raise ValueError(f"annotation file {file} must be a JSON object, but is a list: check --corpus")


@contextmanager
def json_errors(file: str) -> Iterator[None]:
    """The JSON library's errors as one line that names the file."""
    try:
        yield
    except ijson.JSONError as error:
        reason = str(error).strip().splitlines()[0]
        if "UTF8" in reason:
            reason = "it is not in UTF-8: save it so"
        raise ValueError(f"annotation file {file} is not JSON ({reason})") from None
