"""Rows of a CSV or TSV: the fields of each, or why it has none. A quote that is not closed costs its own row alone."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import IO

DELIMITERS = ",;\t|"
LONGEST_FIELD = 2**24  # characters; an unclosed quote reaches it soon
UNDECODED = re.compile(r"[\udc80-\udcff]")  # what surrogateescape makes of bytes that are not in the encoding
UNCLOSED = "a quote is opened and never closed: close it, or double it where it is part of the text"
UNDOUBLED = 'a quote inside a quoted field must be doubled (""): mend it, or set --format tsv, where quotes are text'
SWALLOWED = "a quote is opened, and closed only in a later row: close it, or double it where it is part of the text"


def delimited_rows(handle: IO[bytes], encoding: str, delimiter: str, quoting: int) -> Iterator[tuple[list[str], str]]:
    """(fields, fault) of each row that is not empty; a fault tells why the fields are not to be used.

    Raises:
        UnicodeDecodeError: bytes are not in an encoding that does not tell where the next character begins.
    """
    csv.field_size_limit(LONGEST_FIELD)
    with io.TextIOWrapper(handle, encoding=encoding, errors="surrogateescape", newline="") as text:
        row: list[str] = []  # lines of the row at hand
        again: deque[str] = deque()  # lines that are to be read once more
        columns = 0
        reader = None
        while True:
            if reader is None:
                lines = recorded(text, again, row)
                reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
            row.clear()
            try:
                fields = next(reader)
                fault = SWALLOWED if len(row) > 1 and holds_rows(row, delimiter, columns) else ""
            except StopIteration:
                return
            except csv.Error as error:
                fields, fault = understood(row, delimiter, error)
            if fault:
                again.extendleft(reversed(row[1:]))
                del row[1:]
                reader = None
            columns = columns or len(fields)
            for line in row:
                if not line.isascii() and (found := UNDECODED.search(line)):
                    byte = ord(found[0]) - 0xDC00
                    fault = f"is not in {encoding} (byte {byte:#04x}): name its --encoding, such as latin-1 or cp1252"
            if fields or fault:
                yield fields, fault


def recorded(text: Iterable[str], again: deque[str], row: list[str]) -> Iterator[str]:
    """The lines of `again`, then those of `text`; each is noted in `row`."""
    while again:
        row.append(again.popleft())
        yield row[-1]
    for line in text:
        row.append(line)
        yield line


def understood(row: list[str], delimiter: str, error: csv.Error) -> tuple[list[str], str]:
    """(fields, fault) of a row that is not written as it should be; blanks behind a closing quote do no harm."""
    if "field limit" in str(error) and len(row) == 1:
        return [], f"has a field of more than {LONGEST_FIELD} characters"
    field = rf'(?:"(?:[^"]|"")*" *|[^{re.escape(delimiter)}"\r\n][^{re.escape(delimiter)}\r\n]*|)'
    if re.fullmatch(rf"{field}(?:{re.escape(delimiter)}{field})*[\r\n]*", "".join(row)):
        return next(csv.reader(row, delimiter=delimiter)), ""
    return [], UNCLOSED if len(row) > 1 or "end of data" in str(error) else UNDOUBLED


def holds_rows(lines: list[str], delimiter: str, columns: int) -> bool:
    """Whether lines of a quoted field are rows: they begin, or end, with a name of the same kind as the row does.

    Lines of a caption do not: they hold no file names or numbers in the place of the row's own.
    """
    full = [line.count(delimiter) >= max(columns - 1, 1) for line in lines]
    starts = [kind_of_name(line.split(delimiter, 1)[0]) for line in lines]
    ends = [kind_of_name(line.rsplit(delimiter, 1)[-1]) for line in lines]
    return bool(starts[0] and any(each == starts[0] and whole for each, whole in zip(starts[1:], full[1:]))) or bool(
        ends[-1] and any(each == ends[-1] and whole for each, whole in zip(ends[:-1], full[:-1]))
    )


def kind_of_name(field: str) -> str:
    """What names of media have in common: the ending of a file's name, or the form of a number; "" for other texts."""
    name = field.strip().strip('"')
    if not name or re.search(r"\s", name):
        return ""
    if ending := re.search(r"\.\w{2,5}$", name):
        return ending[0].lower()
    return re.sub(r"\d+", "0", name) if re.search(r"\d{4}|[A-Za-z_]\d", name) else ""


def guessed_delimiter(start: bytes, encoding: str) -> str:
    """The delimiter that cuts the first line of a file into most columns."""
    line = next(iter(start.decode(encoding, "replace").splitlines()), "")
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader([line], delimiter=delimiter), [])))
