"""Rows of a CSV or TSV: the fields of each, or why it is unusable; an unclosed quote makes only its own row so."""

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
UNDOUBLED = 'a quote inside a quoted field must be doubled (""): correct it, or set --format tsv, where quotes are text'
SWALLOWED = "a quote is opened, and closed only in a later row: close it, or double it where it is part of the text"


def delimited_rows(handle: IO[bytes], encoding: str, delimiter: str, quoting: int) -> Iterator[tuple[list[str], str]]:
    """(fields, fault) of each row that is not empty; a fault is the reason why the fields are unusable.

    Raises UnicodeDecodeError: bytes are not in an encoding that does not tell where the next character begins.
    """
    csv.field_size_limit(LONGEST_FIELD)
    with io.TextIOWrapper(handle, encoding=encoding, errors="surrogateescape", newline="") as text:
        row: list[str] = []  # lines of the current row
        replayed: deque[str] = deque()  # lines to be parsed a second time
        columns = 0
        reader = None
        while True:
            if reader is None:
                lines = noted_lines(text, replayed, row)
                reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
            row.clear()
            try:
                fields, fault = next(reader), ""
            except StopIteration:
                return
            except csv.Error as error:
                fields, fault = repaired_fields(row, delimiter, error)
            if len(row) > 1 and not fault and holds_rows(row, delimiter, columns or len(fields)):
                fields, fault = [], SWALLOWED
            if fault:
                replayed.extendleft(reversed(row[1:]))
                del row[1:]
                reader = None
            columns = columns or len(fields)
            for line in row:
                if not line.isascii() and (found := UNDECODED.search(line)):
                    byte = ord(found[0]) - 0xDC00
                    fault = f"is not in {encoding} (byte {byte:#04x}): name its --encoding, such as latin-1 or cp1252"
            if fields or fault:
                yield fields, fault


def noted_lines(text: Iterable[str], replayed: deque[str], row: list[str]) -> Iterator[str]:
    """The lines of `replayed`, then those of `text`; each is appended to `row`."""
    while replayed:
        row.append(replayed.popleft())
        yield row[-1]
    for line in text:
        row.append(line)
        yield line


def repaired_fields(row: list[str], delimiter: str, error: csv.Error) -> tuple[list[str], str]:
    """(fields, fault) of a row that is not written as it should be.

    Text behind a closing quote does no harm within a line, and is read as spreadsheets and pandas do; in a row of
    several lines only blanks are taken there, as another quote may have been opened.
    """
    if "field limit" in str(error) and len(row) == 1:
        return [], f"has a field of more than {LONGEST_FIELD} characters"
    sign = re.escape(delimiter)
    behind = " *" if len(row) > 1 else rf'[^{sign}"\r\n]*'
    field = rf'(?:"[^"]*(?:""[^"]*)*"{behind}|[^{sign}"\r\n][^{sign}\r\n]*|)'
    if re.fullmatch(rf"{field}(?:{sign}{field})*[\r\n]*", "".join(row)):
        return next(csv.reader(row, delimiter=delimiter)), ""
    return [], UNCLOSED if len(row) > 1 or "end of data" in str(error) else UNDOUBLED


def holds_rows(lines: list[str], delimiter: str, columns: int) -> bool:
    """Whether all lines of a row are full rows themselves, with a name where the row has its own.

    Lines of a caption are not, even if they list names or numbers: some have too few fields, or blanks after their
    commas.
    """
    cells = [line.rstrip("\r\n").split(delimiter) for line in lines if line.strip()]
    first, last = [each[0] for each in cells], [each[-1] for each in cells]
    blanks = [each[1].startswith(" ") for each in cells if len(each) > 1]
    at_start = all(blanks) or not any(blanks)
    return (at_start and same_kind(first[0], first[1:], cells[1:], columns)) or same_kind(
        last[-1], last[:-1], cells[:-1], columns
    )


def same_kind(own: str, others: list[str], cells: list[list[str]], columns: int) -> bool:
    """Whether a row's name is a whole field, and lines cut into `cells` have one of its kind, and all columns."""
    kind = "" if own.count('"') % 2 else kind_of_name(own)
    return kind != "" and all(
        len(each) == columns > 1 and kind_of_name(name) == kind for name, each in zip(others, cells, strict=True)
    )


def kind_of_name(field: str) -> str:
    """What names of media have in common: the ending of a file's name, or the form of a number; "" for other texts."""
    name = field.strip('"')
    if not name or re.search(r"\s", name):
        return ""
    if ending := re.search(r"\.\w{2,5}$", name):
        return ending[0].lower()
    return re.sub(r"\d+", "0", name) if re.search(r"\d{4}|[A-Za-z_]\d", name) else ""


def guessed_delimiter(start: bytes, encoding: str) -> str:
    """The delimiter that cuts the first line of a file into most columns."""
    line = next(iter(start.decode(encoding, "replace").splitlines()), "")
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader([line], delimiter=delimiter), [])))
