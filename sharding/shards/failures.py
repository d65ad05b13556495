"""Media that could not be packed: every one with its reason in `failures.parquet`, summed up by kind of reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import MissingError, UserError
from sharding.reasons import count_kinds
from sharding.shards.writing import publish, sha256
from storage.parquet import parquet_file, read_batches, read_table
from storage.urls import join_url

FILE = "failures.parquet"
SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # the media's name in the annotation
        ("rows", pa.int64()),  # annotation rows lost with it
        ("reason", pa.string()),
    ]
)
ROW_GROUP = 2**16  # rows


class TooManyFailures(UserError):
    """A larger share of the media failed than the user allows."""

    exit_code = 1


class FailureLog:
    """Collects failures shard by shard, on disk, and counts them by kind; `publish` writes them in order."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.shards: list[int] = []
        self.count = self.rows = 0
        self.kinds: Counter[str] = Counter()

    def add(self, shard: int, failures: list[dict[str, Any]]) -> None:
        """Note the failures (source, rows, reason) of one shard."""
        if not failures:
            return
        pq.write_table(pa.Table.from_pylist(failures, schema=SCHEMA), self._shard_file(shard))
        self.shards.append(shard)
        self.count += len(failures)
        self.rows += sum(failure["rows"] for failure in failures)
        count_kinds(self.kinds, (failure["reason"] for failure in failures))

    def publish(self, output: str) -> dict[str, str]:
        """Write `failures.parquet` to the folder `output`, in the order of shards; returns {its name: its SHA-256}."""
        path = self.scratch / FILE
        with pq.ParquetWriter(path, SCHEMA) as writer:
            held: list[pa.Table] = []
            for shard in sorted(self.shards):
                held.append(read_table(self._shard_file(shard)))
                if sum(table.num_rows for table in held) >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            writer.write_table(pa.concat_tables(held) if held else SCHEMA.empty_table())
        digest = sha256(path)
        publish(path, join_url(output, FILE))
        return {FILE: digest}

    def _shard_file(self, shard: int) -> Path:
        return self.scratch / f"failures-{shard:06d}.parquet"


def read_failures(url: str) -> Iterator[dict[str, Any]]:
    """The rows of a corpus' `failures.parquet`, streamed.

    Raises FileNotFoundError: there is none. ValueError: it is damaged.
    """
    path = join_url(url, FILE)
    try:
        with fsspec.open(path, "rb") as file:
            with parquet_file(cast(BinaryIO, file)) as table:
                for batch in read_batches(table):
                    yield from batch.to_pylist()
    except FileNotFoundError:
        raise MissingError(f"{path} does not exist: {url} was packed without it, or is not done yet") from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): `python -m sharding.verify {url} --repair` rebuilds it"
        ) from None
