"""Records of an annotation file found by a key, on disk: what joins questions to answers, captions to files."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from typing import Any

from sharding.annotations.files import Record
from sharding.annotations.items import identifier

CACHE_KB = 16 * 1024


class Lookup:
    """The fields of records by the value of one of them; a later record replaces an earlier one.

    They lie in a temporary file that goes with this object.
    """

    def __init__(self, records: Iterable[Record], key: str) -> None:
        self.database = sqlite3.connect("")  # SQLite's name for a file that is deleted when it is closed
        self.database.execute(f"PRAGMA cache_size = -{CACHE_KB}")
        self.database.execute("CREATE TABLE record (key TEXT PRIMARY KEY, fields TEXT) WITHOUT ROWID")
        with self.database:
            self.database.executemany(
                "INSERT OR REPLACE INTO record VALUES (?, ?)",
                ((identifier(record.value(key)), json.dumps(record.fields, ensure_ascii=False)) for record in records),
            )

    def get(self, key: Any) -> dict[str, Any] | None:
        """The fields of the record with that key; None when there is none."""
        found = self.database.execute("SELECT fields FROM record WHERE key = ?", (identifier(key),)).fetchone()
        return json.loads(found[0]) if found else None
