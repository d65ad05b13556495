"""Annotation rows on disk, sorted by the media they are about, so that a plan of any size fits into memory."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
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
            for position, (_, source, texts) in enumerate(rows):
                if not position:
                    items.append(Item(source))
                items[-1].add(*json.loads(texts))
    return tuple(items)


def stage(rows: Iterable[Row], path: Path, scratch: Path, limit: int = 0) -> Staged:
    """Sort rows into a file at `path`, by media in the order of first appearance, and count them.

    The file appears whole or not at all; `scratch` is a folder for what is unfinished, on the same disk.
    limit: maximum number of media, 0 for all; rows about others are counted as filtered.

    Raises OSError: the disk is full, or the folder cannot be written to.
    """
    unfinished, unsorted = scratch / "rows.sorted", scratch / "rows.unsorted"
    filtered: Counter[str] = Counter()
    try:
        with closing(sqlite3.connect(unfinished)) as database:
            prepare(database, scratch, unsorted)
            with database:
                kept = database.executemany(
                    "INSERT INTO new.row VALUES (NULL, ?, ?)", kept_rows(rows, filtered)
                ).rowcount
                database.execute(BY_MEDIA, (limit or sys.maxsize,))
                items, left = database.execute("SELECT coalesce(max(item) + 1, 0), count(*) FROM sorted").fetchone()
                if left < kept:
                    filtered[f"not about the first {limit} media (--limit)"] += kept - left
                account = items, left + filtered.total(), json.dumps(dict(filtered), ensure_ascii=False)
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


# The inner window finds the first appearance of each medium; ranked by it, media are numbered in that order.
BY_MEDIA = """
INSERT INTO sorted
SELECT rank - 1, number, source, texts
FROM (
    SELECT dense_rank() OVER (ORDER BY first) AS rank, number, source, texts
    FROM (SELECT number, source, texts, min(number) OVER (PARTITION BY source) AS first FROM new.row)
)
WHERE rank <= ?
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
            extra = [row.extra] if row.extra else []
            yield row.source, encode([row.captions, row.question, row.choice, *extra])
