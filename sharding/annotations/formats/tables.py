"""CSV, TSV, Parquet and JSON-lines annotation files as records, one at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc

from runtime.errors import UserError
from sharding.annotations.columns import used_names
from sharding.annotations.config import Reading
from sharding.annotations.files import AnnotationFile, Record, record_of
from sharding.annotations.formats.delimited import delimited_rows, guessed_delimiter
from storage.parquet import ParquetError, parquet_file, read_batches

DECODER = json.JSONDecoder(parse_constant=lambda _: None)  # NaN and infinity become None
UNCONVERTED = (ValueError, TypeError, KeyError, OverflowError, pa.ArrowException)  # of Arrow's values to Python's


def csv_records(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Rows of a CSV; quoted fields may contain delimiters and line breaks."""
    with file.opened() as handle:
        delimiter = reading.delimiter or guessed_delimiter(handle.read(65536), reading.encoding)
    return table_records(file, reading, delimiter, csv.QUOTE_MINIMAL)


def tsv_records(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Rows of a TSV, in which quotes are characters as others."""
    return table_records(file, reading, reading.delimiter or "\t", csv.QUOTE_NONE)


def table_records(file: AnnotationFile, reading: Reading, delimiter: str, quoting: int) -> Iterator[Record]:
    """Rows of a table as text; the first line names the columns unless `reading.header` does.

    Raises ValueError: it is empty, its header cannot be read, or two columns that may be used have one name.
    """
    if len(delimiter) != 1:
        raise UserError(f"--delimiter {delimiter!r}: must be one character")
    number = 0
    with file.opened() as handle:
        try:
            rows = delimited_rows(handle, reading.encoding, delimiter, quoting)
            header, fault = (reading.header, "") if reading.header else next(rows, ([], ""))
            names = tuple(name.strip() for name in header)
            if fault:
                raise UserError(f"annotation file {file.name}, its first line: {fault}")
            if not names:
                raise UserError(f"annotation file {file.name} is empty")
            check_names(file.name, names, used_names(reading.columns, reading.keep, reading.extra_columns))
            for values, fault in rows:
                number += 1
                if not fault and len(values) != len(names):
                    fault = (
                        f"has {len(values)} fields where {len(names)} columns are expected ({', '.join(names)}): "
                        "correct the row, or set --delimiter or --header"
                    )
                yield Record(file.name, number, dict(zip(names, values, strict=False)), fault=fault)
        except UnicodeDecodeError as error:
            raise UserError(
                f"annotation file {file.name} is not in {reading.encoding} (byte {error.object[error.start]:#04x} near "
                f"row {number + 1}): name its --encoding, such as latin-1 or cp1252"
            ) from None


def parquet_records(file: AnnotationFile, reading: Reading, more: Sequence[str] = ()) -> Iterator[Record]:
    """Rows of a Parquet file, of which only columns that `reading` may use are read, and those called `more`.

    Raises ValueError: it is not a Parquet file, damaged, or two of these columns have one name.
    """
    used = used_names(reading.columns, reading.keep, reading.extra_columns).union(more)
    with file.opened() as handle:
        try:
            with parquet_file(cast(BinaryIO, handle)) as table:
                names = tuple(table.schema_arrow.names)
                check_names(file.name, names, used)
                yield from parquet_rows(file.name, names, read_batches(table, [name for name in names if name in used]))
        except ParquetError as error:
            raise UserError(f"annotation file {file.name} is not a Parquet file, or damaged ({error})") from None


def parquet_rows(file: str, names: tuple[str, ...], batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    """The rows of batches as records; those with a value that cannot be read have a fault."""
    number = 0
    for batch in batches:
        faults: dict[int, str] = {}  # position in the batch -> what is wrong with that row
        columns = {name: values_of(name, batch.column(name), faults) for name in batch.schema.names}
        for position in range(batch.num_rows):
            number += 1
            values = {name: column[position] for name, column in columns.items()}
            yield Record(file, number, values, fault=faults.get(position, ""), columns=names)


def values_of(name: str, column: pa.Array, faults: dict[int, str]) -> list[Any]:
    """A column's values, NaN as None; those that cannot be read are None as well, and noted in `faults`."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        return column.to_pylist()
    except UNCONVERTED:
        values: list[Any] = []
        for position, scalar in enumerate(column):
            try:
                values.append(value_of(scalar))
            except UnicodeDecodeError as error:
                values.append(None)
                faults[position] = f'"{name}" is not in UTF-8 (byte {error.object[error.start]:#04x}): write it again'
            except UNCONVERTED as error:
                values.append(None)
                faults[position] = f'"{name}" cannot be read ({" ".join(str(error).split())}): write it as text'
        return values


def value_of(scalar: pa.Scalar) -> Any:
    """A value; as text, where Python has none of its kind, as for nanoseconds."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except UNCONVERTED:
        return scalar.cast(pa.string()).as_py()


def check_names(file: str, names: Sequence[str], used: Iterable[str]) -> None:
    """Raise ValueError where two columns that are used have one name."""
    for name in used:
        if names.count(name) > 1:
            raise UserError(
                f'annotation file {file} has {names.count(name)} columns named "{name}": rename all but one, or name '
                "other columns with --columns"
            )


def img2dataset_records(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Rows of the Parquet file that img2dataset and video2dataset write beside each tar, with its name as `shard`.

    Rows whose media were not fetched are left out, by their status.
    """
    shard = file.name.rsplit("/", 1)[-1].partition(".")[0]
    for record in parquet_records(file, reading, more=["status"]):
        status = record.value("status")
        reason = "" if status == "success" else f"status is {status}"
        yield replace(record, fields={**record.fields, "shard": shard}, filtered=reason)


def jsonl_records(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Lines of a file of JSON objects."""
    number = 0
    with file.opened() as handle:
        for row, line in enumerate(handle, 1):
            if not line.strip():
                continue
            number += 1
            try:
                fields = DECODER.decode(line.decode())
                if b"\\ud" in line.lower():  # half of a pair of surrogates is not text that could be stored
                    fields = json.loads(json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace"))
            except UnicodeDecodeError as error:
                fault = f"line {row} is not in UTF-8 (byte {error.object[error.start]:#04x}): save the file so"
                yield Record(file.name, number, {}, fault=fault)
                continue
            except (ValueError, RecursionError) as error:
                position, reason = f"line {row}", str(error)
                if isinstance(error, json.JSONDecodeError):
                    column = min(error.pos, len(error.doc.rstrip())) + 1
                    position, reason = f"line {row}, column {column}", error.msg
                yield Record(file.name, number, {}, fault=f"{position} is not JSON ({reason})")
                continue
            yield record_of(file, number, fields)


def text_lines(file: AnnotationFile, reading: Reading) -> Iterator[str]:
    """Lines of a text file without their line breaks."""
    with file.opened() as handle, io.TextIOWrapper(handle, encoding=reading.encoding, newline="\n") as text:
        number = 0
        try:
            for line in text:
                number += 1
                yield line.rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError(
                f"annotation file {file.name} is not in {reading.encoding} (near line {number + 1}): name its "
                "--encoding, such as latin-1 or cp1252"
            ) from None
