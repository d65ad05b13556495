"""A node's cache of remote bytes on a local disk: bounded, least recently used evicted first, safe against crashes.

How it stays consistent, with any number of processes that may be killed at any moment:
- SQLite holds one row per item: its name, its size, when it was last used, and which process is fetching it.
- Space is reserved before anything is fetched: one transaction writes a row and evicts older items. The files never
  take more than the budget.
- An item's file is written in parts/ and renamed: a file in items/ is complete. The next process that opens the cache
  reclaims what a dead process had reserved or was writing.
- A file is removed before its row. A row without a file is a missing item.
- Each opening compares rows and files in a few folders, in turn: a process may have died between the two, and a power
  cut may leave files without rows. Opening takes as long with a million items as with a thousand.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from runtime.errors import UserError
from storage.files import atomic_file

log = logging.getLogger(__name__)

FOLDER = "singularity-cache-1"  # inside the user's folder: nothing outside of it is removed
POLL = 0.02  # seconds between two checks whether another process has fetched an item
RECORD_SECONDS = 5.0  # between two records of which items were used
ITEMS_CHECKED = 1000  # items whose files and rows are compared when a cache is opened
AFTER = chr(0x10FFFF)  # sorts after any character of a name
SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, used REAL NOT NULL,
    owner TEXT  -- the process that fetches it; null: complete
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON items (used);
CREATE INDEX IF NOT EXISTS by_owner ON items (owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS checked (folder TEXT NOT NULL);  -- of items/: the last one compared with the rows
INSERT INTO checked SELECT '' WHERE NOT EXISTS (SELECT * FROM checked);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON items BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON items BEGIN UPDATE total SET bytes = bytes - old.size; END;
"""


class DiskCache:
    """Items by name, at most `budget` bytes. Safe for threads and processes.

    counters: cache_hits, cache_misses, cache_evictions.
    """

    def __init__(self, folder: str, budget: int) -> None:
        """Open or make the cache. Raises ValueError when the folder cannot be written to."""
        self.folder, self.budget = Path(folder) / FOLDER, budget
        self.counters: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._process = 0
        self._used: dict[str, float] = {}
        self._recorded = time.monotonic()
        self._warned = False
        try:
            for name in ("items", "parts"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with self._transaction() as database:
                self._reclaim(database)
                self._check_folders(database)
        except OSError as error:
            raise UserError(f"cache.folder={folder} cannot be written to ({error.strerror}): choose another") from None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes | None:
        """An item's bytes from `offset` on; None when it is missing."""
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(descriptor, os.fstat(descriptor).st_size if size is None else size, offset)
        finally:
            os.close(descriptor)
        self._used[name] = time.time()
        return data

    def has(self, name: str) -> bool:
        """Whether an item is complete."""
        return self._path(name).exists()

    def reserve(self, sizes: Mapping[str, int]) -> dict[str, bool]:
        """Reserve space for missing items: name -> True for those that the caller now must `put` or `drop`.

        Those with False are being fetched by another process, or are complete, or do not fit.
        """
        mine = dict.fromkeys(sizes, False)
        with self._tolerating_errors(), self._transaction() as database:
            self._record_use(database)
            for name, size in sizes.items():
                row = database.execute("SELECT owner FROM items WHERE name = ?", (name,)).fetchone()
                if row is not None and (is_alive(row[0]) if row[0] is not None else self.has(name)):
                    continue
                self._remove(database, name)
                if self._make_room(database, size):
                    values = name, size, time.time(), this_process()
                    database.execute("INSERT INTO items VALUES (?, ?, ?, ?)", values)
                    mine[name] = True
        return mine

    def wait_for(self, name: str, seconds: float) -> bytes | None:
        """An item that another process is fetching; None when it takes longer or that process has failed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            data = self.read(name)
            if data is not None or not self._is_coming(name):
                return data or self.read(name)
            time.sleep(POLL * (0.5 + random.random()))
        return None

    def _is_coming(self, name: str) -> bool:
        """Whether a living process is fetching an item."""
        row = None
        with self._tolerating_errors(), self._transaction() as database:
            row = database.execute("SELECT owner FROM items WHERE name = ?", (name,)).fetchone()
        return row is not None and row[0] is not None and is_alive(row[0])

    def put(self, name: str, data: bytes) -> None:
        """Write an item that was reserved; on a full disk it is dropped instead."""
        temporary = self.folder / "parts" / f"{this_process()} {threading.get_ident()}"
        try:
            self._path(name).parent.mkdir(exist_ok=True)
            with atomic_file(self._path(name), temporary=temporary) as path:
                path.write_bytes(data)
        except OSError as error:
            self._warn(error.strerror)
            self.drop([name])
            return
        with self._tolerating_errors(), self._transaction() as database:
            mine = database.execute(
                "UPDATE items SET owner = NULL WHERE name = ? AND owner = ?", (name, this_process())
            )
            if not mine.rowcount:  # this process was considered dead: no row counts the file
                self._path(name).unlink(missing_ok=True)

    def drop(self, names: Sequence[str]) -> None:
        """Remove items: damaged ones, or what was reserved and could not be fetched."""
        with self._tolerating_errors(), self._transaction() as database:
            for name in names:
                self._remove(database, name)

    def close(self) -> None:
        """Record what was used, and close the database; the next use reopens it."""
        with self._tolerating_errors(), self._transaction() as database:
            self._recorded = -RECORD_SECONDS
            self._record_use(database)
        with self._lock:
            self._database.close()
            self._process = 0

    @contextlib.contextmanager
    def _tolerating_errors(self) -> Iterator[None]:
        """If the database cannot be changed, for example on a full disk, reads continue without the cache."""
        try:
            yield
        except sqlite3.Error as error:
            self._warn(f"SQLite: {error}")
        except OSError as error:  # the database is reopened after a fork
            self._warn(error.strerror)

    def _warn(self, reason: str | None) -> None:
        if not self._warned:
            log.warning("cache %s: %s; reading continues without it", self.folder, reason)
        self._warned = True

    def _path(self, name: str) -> Path:
        return self.folder / "items" / name[:2] / name

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction, exclusive among threads and processes."""
        with self._lock:
            if self._process != os.getpid():  # a connection must not be used after a fork
                self._database, self._process = self._open(), os.getpid()
            database = self._database
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.commit()
            except BaseException:
                database.rollback()
                raise

    def _open(self) -> sqlite3.Connection:
        path = self.folder / "items.sqlite"
        try:
            return self._connect(path)
        except sqlite3.OperationalError as error:
            raise OSError(0, f"SQLite: {error}") from None
        except sqlite3.DatabaseError as error:
            log.warning("cache %s is damaged (%s): it starts empty", self.folder, error)
            for file in self.folder.glob("items.sqlite*"):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "items", ignore_errors=True)
            (self.folder / "items").mkdir(exist_ok=True)
            return self._connect(path)

    def _connect(self, path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        with (self.folder / "opening").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # SQLite does not wait for another process that sets the journal mode
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        return database

    def _total(self, database: sqlite3.Connection) -> int:
        return int(database.execute("SELECT bytes FROM total").fetchone()[0])

    def _make_room(self, database: sqlite3.Connection, size: int) -> bool:
        """Evict the least recently used items until `size` bytes fit; False when they cannot."""
        while self._total(database) + size > self.budget:
            rows = database.execute("SELECT name FROM items WHERE owner IS NULL ORDER BY used LIMIT 16").fetchall()
            if not rows:
                return False
            for (name,) in rows:
                self._remove(database, name)
                self.counters["cache_evictions"] += 1
                if self._total(database) + size <= self.budget:
                    break
        return True

    def _remove(self, database: sqlite3.Connection, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        database.execute("DELETE FROM items WHERE name = ?", (name,))

    def _reclaim(self, database: sqlite3.Connection) -> None:
        """Remove reservations and partial files of dead processes."""
        for name, owner in database.execute("SELECT name, owner FROM items WHERE owner IS NOT NULL").fetchall():
            if not is_alive(owner):
                self._remove(database, name)
        for path in (self.folder / "parts").iterdir():
            if not is_alive(path.name.rpartition(" ")[0]):
                path.unlink(missing_ok=True)

    def _check_folders(self, database: sqlite3.Connection) -> None:
        """Compare about ITEMS_CHECKED files and rows in the next folders of items/; remove those without the other."""
        (last,) = database.execute("SELECT folder FROM checked").fetchone()
        folders, checked = [entry.name for entry in os.scandir(self.folder / "items") if entry.is_dir()], 0
        for folder in sorted(folders, key=lambda folder: (folder <= last, folder)):
            checked += self._check(database, folder)
            last = folder
            if checked >= ITEMS_CHECKED:
                break
        database.execute("UPDATE checked SET folder = ?", (last,))

    def _check(self, database: sqlite3.Connection, folder: str) -> int:
        """Compare files and rows in one folder; returns their number."""
        within = "SELECT name, owner FROM items WHERE name >= ? AND name < ?"
        rows = dict(database.execute(within, (folder, folder + AFTER)).fetchall())
        there = set(os.listdir(self.folder / "items" / folder))
        for name in there - rows.keys():
            (self.folder / "items" / folder / name).unlink(missing_ok=True)
        for name, owner in rows.items():
            if owner is None and name not in there:
                self._remove(database, name)
        return len(there | rows.keys())

    def _record_use(self, database: sqlite3.Connection) -> None:
        """Record every RECORD_SECONDS which items this process has used."""
        if time.monotonic() - self._recorded < RECORD_SECONDS:
            return
        self._recorded, used, self._used = time.monotonic(), self._used, {}
        database.executemany("UPDATE items SET used = ? WHERE name = ?", [(at, name) for name, at in used.items()])


def this_process() -> str:
    """This process, distinct from later ones with the same number."""
    return f"{os.getpid()} {start_ticks(os.getpid())}"


def is_alive(owner: str) -> bool:
    """Whether the process that `this_process` described still runs."""
    process, _, ticks = owner.partition(" ")
    return start_ticks(int(process)) == ticks


def start_ticks(process: int) -> str:
    """When a process was started, in the kernel's ticks; empty when it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""
