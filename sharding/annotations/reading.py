"""How the files of a corpus are read: the form they have, and their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharding.annotations.columns import Columns, RowMaker
from sharding.annotations.files import json_records
from sharding.annotations.items import Row


@dataclass
class Reading:
    """What decides which rows annotation files give, besides their contents."""

    columns: Columns = field(default_factory=Columns)
    keep: dict[str, Any] = field(default_factory=dict)  # column -> the value, or the list of values, of rows to keep
    limit: int = 0  # at most so many media, 0: all


def read_rows(files: Sequence[str], reading: Reading) -> Iterator[Row]:
    """The rows of annotation files, in order.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file has another form, or a record lacks its media or its text.
    """
    maker = RowMaker(reading.columns, reading.keep)
    for file in files:
        for record in json_records(file):
            yield maker.row(record)
