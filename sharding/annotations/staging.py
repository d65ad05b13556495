"""Annotation rows on disk, sorted by the media they are about, so that a plan of any size fits into memory."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import overload

from runtime.errors import AccessError
from sharding.annotations.items import Item, Row

CACHE_KB = 16 * 1024  # of each open database

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Staged:
    """A file of staged rows and its account: rows read = those of the items + the filtered ones by reason."""

    path: str
    items: int
    rows: int
    filtered: dict[str, int]

    @property
    def kept(self) -> int:
        """Rows that belong to items."""
        return self.rows - sum(self.filtered.values())

    def between(self, first: int, end: int) -> StagedItems:
        """The items numbered `first` to `end - 1`, read when they are looked at."""
        return StagedItems(self.path, first, min(end, self.items))


@dataclass(frozen=True)
class StagedItems(Sequence[Item]):
    """A range of staged items: as small as its numbers; the last range that a process looked at stays in memory."""

    path: str
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        return read_items(self.path, self.first, self.end)[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(read_items(self.path, self.first, self.end))


@lru_cache(maxsize=1)
def read_items(path: str, first: int, end: int) -> tuple[Item, ...]:
    """The staged items numbered `first` to `end - 1`, each with its rows in their order of reading."""
    query = "SELECT item, source, texts FROM sorted WHERE item >= ? AND item < ? ORDER BY item, number"
    with closing(connect(path)) as database:
        items = []
        for _, rows in groupby(database.execute(query, (first, end)), key=lambda row: row[0]):
            for place, (_, source, texts) in enumerate(rows):
                if not place:
                    items.append(Item(source))
                items[-1].add(*json.loads(texts))
    return tuple(items)


def stage(rows: Iterable[Row], path: Path, scratch: Path, limit: int = 0) -> Staged:
    """Sort rows into a file at `path`, by media in the order of first appearance, and count them.

    The file appears whole or not at all; `scratch` is a folder for what is unfinished, on the same disk.
    limit: at most so many media are kept, 0 for all; rows about others are counted as filtered.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    unfinished, unsorted = scratch / "rows.sorted", scratch / "rows.unsorted"
    filtered: Counter[str] = Counter()
    try:
        with closing(sqlite3.connect(unfinished)) as database:
            prepare(database, scratch, unsorted)
            with database:
                database.executemany("INSERT INTO new.row VALUES (NULL, ?, ?)", kept_rows(rows, filtered))
            numbered = Numbering(database.execute(BY_MEDIA), limit, filtered)
            with database:
                database.executemany("INSERT INTO sorted VALUES (?, ?, ?, ?)", numbered)
                rows_read = numbered.rows + sum(filtered.values())
                account = numbered.items, rows_read, json.dumps(dict(filtered), ensure_ascii=False)
                database.execute("INSERT INTO account VALUES (?, ?, ?)", account)
    except sqlite3.OperationalError as error:
        raise AccessError(f"annotation rows cannot be staged in {scratch}: {error}") from None
    finally:
        unsorted.unlink(missing_ok=True)
    os.replace(unfinished, path)
    read_items.cache_clear()  # of another file that had this path
    return open_staged(path)


def move_staged(staged: Staged, path: Path) -> Staged:
    """Put the file of staged rows at another path on its disk."""
    os.replace(staged.path, path)
    return replace(staged, path=str(path))


def open_staged(path: Path) -> Staged:
    """The rows that `stage` wrote to `path`."""
    with closing(connect(str(path))) as database:
        items, rows, filtered = database.execute("SELECT items, rows, filtered FROM account").fetchone()
    return Staged(str(path), items, rows, json.loads(filtered))


def connect(path: str) -> sqlite3.Connection:
    """Open a finished file to read it, on file systems without locks as well."""
    return sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True)


# A window over the rows of each media finds its first appearance; sorted by it, media stand in that order.
BY_MEDIA = """
SELECT first, number, source, texts
FROM (SELECT number, source, texts, min(number) OVER (PARTITION BY source) AS first FROM new.row)
ORDER BY first, number
"""


def prepare(database: sqlite3.Connection, scratch: Path, unsorted: Path) -> None:
    """Create the tables without flushing to disk: they need not survive a crash."""
    database.execute("ATTACH ? AS new", (str(unsorted),))
    for name in ("main", "new"):
        database.execute(f"PRAGMA {name}.journal_mode = OFF")
        database.execute(f"PRAGMA {name}.synchronous = OFF")
        database.execute(f"PRAGMA {name}.cache_size = -{CACHE_KB}")
    folder = str(scratch).replace("'", "''")
    database.execute(f"PRAGMA temp_store_directory = '{folder}'")  # for the sort; /tmp is often small
    database.execute("CREATE TABLE new.row (number INTEGER PRIMARY KEY, source TEXT, texts TEXT)")
    database.execute(
        "CREATE TABLE sorted (item INTEGER, number INTEGER, source TEXT, texts TEXT, PRIMARY KEY (item, number)) "
        "WITHOUT ROWID"
    )
    database.execute("CREATE TABLE account (items INTEGER, rows INTEGER, filtered TEXT)")


def kept_rows(rows: Iterable[Row], filtered: Counter[str]) -> Iterator[tuple[str, str]]:
    """(source, texts as JSON) of the rows that are not filtered; the others are counted by reason."""
    for row in rows:
        if row.filtered:
            filtered[row.filtered] += 1
        else:
            yield row.source, encode([row.captions, row.question, row.choice])


class Numbering:
    """Passes (item, number, source, texts) of sorted rows on, items numbered from 0, and counts both."""

    def __init__(self, rows: Iterable[tuple[int, int, str, str]], limit: int, filtered: Counter[str]) -> None:
        self.sorted, self.limit, self.filtered = rows, limit, filtered
        self.items = self.rows = 0

    def __iter__(self) -> Iterator[tuple[int, int, str, str]]:
        last = -1
        for first, number, source, texts in self.sorted:
            if first != last:
                if self.limit and self.items == self.limit:
                    self.filtered[f"not about the first {self.limit} media (--limit)"] += 1
                    continue
                self.items, last = self.items + 1, first
            self.rows += 1
            yield self.items - 1, number, source, texts
