"""Opening annotation files of any store, compressed or not, and their JSON as records, one at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, TypeVar

import fsspec
import ijson
from fsspec.compression import compr
from fsspec.utils import infer_compression

from runtime.errors import MissingError, UserError
from sharding.annotations.formats.json_text import Located, Mended, Plain, Unparsable
from storage.policy import BucketError, causes, retry, status_of, storage_errors

BLOCK = 2**20  # bytes of a remote file read at a time
LONGEST_LINE = 2**20  # bytes of a line of JSON that is looked at to tell lines from an object
NOT_JSON = (ijson.JSONError, Unparsable, UnicodeDecodeError)  # the last of half a pair of surrogates
DAMAGED = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)  # of what is compressed; also OSErrors of no number
BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an annotation file; `number` counts them from 1."""

    file: str
    number: int
    fields: dict[str, Any]
    filtered: str = ""  # why a reader leaves it out
    fault: str = ""  # why it cannot be understood
    columns: tuple[str, ...] = ()  # of its file, where only some of them are read

    def value(self, key: str) -> Any:
        """What it says under a key; raises ValueError when it says nothing."""
        if key not in self.fields:
            raise UserError(f'{self.place}: no "{key}"; its columns are {self.names}: check --corpus')
        return self.fields[key]

    @property
    def names(self) -> str:
        """The names of its columns, for messages."""
        return ", ".join(self.columns or self.fields)

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.file}, record {self.number}"


class Steady(io.RawIOBase):
    """A file of a remote store; a read that breaks off is tried again from where it began."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there is something."""
        data = retry(self._read_at, self.file.tell(), len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read_at(self, position: int, size: int) -> bytes:
        self.file.seek(position)
        return self.file.read(size)


@contextmanager
def unpacked(file: str) -> Iterator[IO[bytes]]:
    """An annotation file of any store, decompressed."""
    if "://" not in file or file.startswith("file://"):
        with fsspec.open(file, "rb", compression="infer") as handle:
            yield handle
        return
    packed = infer_compression(file)
    with retry(fsspec.open(file, "rb").open) as remote, io.BufferedReader(Steady(remote), BLOCK) as handle:
        yield compr[packed](handle, mode="rb") if packed else handle


@contextmanager
def opened(file: str) -> Iterator[IO[bytes]]:
    """An annotation file's bytes, decompressed (.gz, .bz2, .xz, .zst), without a byte order mark.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: a remote store fails again and again, or refuses the credentials.
        ValueError: it is in UTF-16, or cannot be decompressed.
    """
    try:
        with storage_errors(file, "read annotations from"), unpacked(file) as handle:
            start = handle.read(4)
            if start[:2] in BOMS or b"\0\0" in (start[::2], start[1::2]):
                raise UserError(f"annotation file {file} is in UTF-16: save it as UTF-8")
            handle.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            yield handle
    except DAMAGED as error:
        raise UserError(undone(file, error)) from None
    except BucketError:
        raise
    except OSError as error:
        if infer_compression(file) and type(error) in (OSError, gzip.BadGzipFile) and error.errno is None:
            raise UserError(undone(file, error)) from None
        absent = any(isinstance(cause, FileNotFoundError) for cause in causes(error))
        if absent and status_of(error) in (None, 404):
            raise MissingError(f"annotation file {file} does not exist: check --annotations") from None
        if not isinstance(error, IsADirectoryError):
            raise
        raise UserError(f"{file} is a folder: --annotations are files, such as {file.rstrip('/')}/*.json") from None


def undone(file: str, error: Exception) -> str:
    """What is said of a compressed file that cannot be decompressed."""
    return f"annotation file {file} cannot be decompressed ({error}): is it complete, and compressed as its name says?"


def json_records(file: str, place: str = "") -> Iterator[Record]:
    """Records of the JSON list at `place`: "" the file itself, "images" a list in an object, "*" an object's entries.

    An entry KEY: VALUE becomes a record of KEY under "key" and VALUE's own fields, or, where it is no object, "value".

    Raises:
        ValueError: the file is no JSON, or of another form.
    """
    check_form(file, "list" if place == "" else "object")
    if place == "*":
        entries = parsed(file, lambda handle: ijson.kvitems(handle, "", use_float=True))
        for number, (key, value) in enumerate(entries, 1):
            yield Record(file, number, {"key": key, **(value if isinstance(value, dict) else {"value": value})})
        return
    found = False
    values = parsed(file, lambda handle: ijson.items(handle, f"{place}.item" if place else "item", use_float=True))
    for number, value in enumerate(values, 1):
        found = True
        if isinstance(value, dict):
            yield Record(file, number, value)
        else:
            yield Record(file, number, {}, fault=f"must be an object, not {str(value)[:60]!r}")
    if place and not found and place.split(".")[0] not in list(json_keys(file)):
        has = first_keys(file) or "nothing"
        raise UserError(f'annotation file {file} has no "{place}", but {has}: check --corpus and --records')


def parsed(file: str, parse: Callable[[Any], Iterator[Found]]) -> Iterator[Found]:
    """What `parse` finds in a JSON file; from what it refuses on, in the file's contents as Mended.

    Raises:
        ValueError: the file is no JSON.
    """
    done = 0
    with opened(file) as handle:
        try:
            for found in parse(Plain(handle)):
                yield found
                done += 1
            return
        except NOT_JSON:
            pass
    with opened(file) as handle:
        stream = Located(Mended(handle), math.inf)
        try:
            for number, found in enumerate(parse(stream)):
                if number >= done:
                    yield found
            return
        except NOT_JSON:
            pass
    raise not_json(file, parse, stream.last)


def not_json(file: str, parse: Callable[[Any], Iterator[Found]], slow: int) -> UserError:
    """What is said of a file that is no JSON, and where, found by reading it again, from byte `slow` on one by one."""
    number = 0
    with opened(file) as handle:
        stream = Located(Mended(handle), slow)
        try:
            for _ in parse(stream):
                number += 1
            reason = "it could be read the second time: run the same command again"
        except NOT_JSON as error:
            reason = json_reason(error)
    after = f", after entry {number}" if number else ""
    place = f"line {stream.line}, column {max(stream.column, 1)}{after}"
    return UserError(f"annotation file {file} is not JSON ({reason}): {place}")


def json_reason(error: Exception) -> str:
    """What the JSON library's error means, with the remedy where there is one."""
    reason = str(error).strip().splitlines()[0]
    known = {
        "UTF8": "it is not in UTF-8: save it so",
        "codec": "it is not in UTF-8: save it so",
        "premature EOF": "it ends too early: is it complete?",
        "trailing garbage": "more follows behind its end: JSON lines need --format jsonl, several lists a file each",
    }
    return next(
        (meaning for words, meaning in known.items() if words in reason), f"{reason.rstrip('.')}: write it again"
    )


def first_sign(file: str) -> bytes:
    """The first character of a file that is not blank."""
    with opened(file) as handle:
        return handle.read(4096).lstrip()[:1]


def is_json_lines(file: str) -> bool:
    """Whether a file, whatever its name, holds JSON lines: an object is its first line, and another one follows."""
    with opened(file) as handle:
        lines = [handle.readline(LONGEST_LINE).strip() for _ in range(2)]
    if not all(line[:1] == b"{" for line in lines):
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def first_record(file: str) -> Record | None:
    """The first object of a JSON list; None where there is no such."""
    return next(json_records(file), None) if first_sign(file) == b"[" else None


def json_value(file: str, key: str) -> Any:
    """A value of a JSON object that stands before its long lists; None where it has none of that name."""
    return next(parsed(file, lambda handle: ijson.items(handle, key, use_float=True)), None)


def json_keys(file: str) -> Iterator[str]:
    """The keys of a JSON object, or of the first object of a JSON list, as they are met; none for anything else."""
    return parsed(file, keys_of)


def first_keys(file: str) -> str:
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


def check_form(file: str, wanted: str) -> None:
    """Raise ValueError where a JSON file is no list, or no object, as `wanted`."""
    with opened(file) as handle:
        start = handle.read(4096).lstrip()
    if not start:
        raise UserError(f"annotation file {file} is empty")
    found = {b"[": "list", b"{": "object"}.get(start[:1])
    if found is None:
        raise UserError(f"annotation file {file} is not JSON: it begins with {start[:20].decode(errors='replace')!r}")
    if found != wanted and found == "object":
        raise UserError(
            f"annotation file {file} must be a JSON list of records, but is an object with "
            f"{first_keys(file)}: choose the --corpus that describes it, or name the list's key "
            "with --records"
        )
    if found != wanted:
        raise UserError(f"annotation file {file} must be a JSON object, but is a list: check --corpus")
