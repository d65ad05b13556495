"""Reads Parquet files without Arrow's threads: a process that ends while these run may be aborted (apache/arrow#34314).

Every module of this program reads Parquet with these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 4096  # rows

Source = str | Path | bytes | BinaryIO  # a local path, a file's contents, an open file


class ParquetError(ValueError):
    """A file is not a Parquet file, or damaged; the message is the reason, in one line."""


def read_table(source: Source, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole file, or some of its columns; checksums of its pages are verified where it has them.

    Raises:
        OSError: it cannot be read. ParquetError: it is not a Parquet file, or damaged.
    """
    with parquet_file(source) as file:
        return file.read(None if columns is None else list(columns), use_threads=False)


def read_batches(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of what `parquet_file` opened, BATCH at a time."""
    yield from file.iter_batches(BATCH, columns=columns, use_threads=False)


def read_schema(source: Source) -> pa.Schema:
    """A file's columns and metadata; raises what `read_table` does."""
    with parquet_file(source) as file:
        return file.schema_arrow


@contextmanager
def parquet_file(source: Source) -> Iterator[pq.ParquetFile]:
    """An open file; what Arrow says of a damaged one, also while its rows are read, becomes a ParquetError."""
    data = pa.BufferReader(source) if isinstance(source, bytes) else source
    try:
        # pre_buffer would start threads as well
        with pq.ParquetFile(data, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the storage's error; Arrow's own for damaged contents are plain OSErrors without a number
        raise ParquetError(" ".join(str(error).split())) from None
