"""Reads a corpus' annotation files to rows: each file by the reader of its format."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import glob_translate

from runtime.errors import MissingError, UserError
from runtime.settings import listed_nearest, nearest
from sharding.annotations.columns import Columns, RowError, RowMaker
from sharding.annotations.config import Reading
from sharding.annotations.files import AnnotationFile, Record, check_exists
from sharding.annotations.formats.datasets import (
    activitynet_qa_records,
    coco_records,
    flickr_records,
    msrvtt_records,
    sbu_records,
    something_records,
    visual_genome_records,
    vqa_records,
)
from sharding.annotations.formats.json_files import first_bytes, first_record, is_json_lines, json_records
from sharding.annotations.formats.tables import (
    csv_records,
    img2dataset_records,
    jsonl_records,
    parquet_records,
    tsv_records,
)
from sharding.annotations.items import Row
from storage.policy import check_bucket, retry, storage_errors
from storage.urls import plain_scheme

MAGIC = set("*?[")  # characters of a pattern

FileReader = Callable[[AnnotationFile, Reading], Iterator[Record]]
JoinReader = Callable[[Sequence[AnnotationFile], Reading], Iterator[Record]]


def json_or_lines(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Records of a JSON file, or of JSON lines that are called .json, as datasets' to_json does."""
    if not reading.records and is_json_lines(file):
        return jsonl_records(file, reading)
    return json_records(file, reading.records)


def lines_or_json(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Records of JSON lines, or of a JSON list under a name for lines."""
    return json_records(file) if first_bytes(file)[:1] == b"[" else jsonl_records(file, reading)


ENDINGS: dict[str, FileReader] = {
    "json": json_or_lines,
    "jsonl": lines_or_json,
    "ndjson": lines_or_json,
    "csv": csv_records,
    "tsv": tsv_records,
    "parquet": parquet_records,
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def by_ending(file: AnnotationFile, reading: Reading) -> Iterator[Record]:
    """Records of a file, in the format of its extension; raises ValueError for an unknown one."""
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    ending = name.rpartition(".")[2]
    if ending not in ENDINGS:
        formats = ", ".join((*READERS, *JOINING))
        raise UserError(
            f"annotation file {file.name}: its name does not show its format; set --format to one of {formats}"
        )
    return ENDINGS[ending](file, reading)


READERS: dict[str, FileReader] = {
    "auto": by_ending,
    **{name: reader for name, reader in ENDINGS.items() if name != "ndjson"},
    "img2dataset": img2dataset_records,
    "coco": coco_records,
    "flickr": flickr_records,
    "something": something_records,
}
JOINING: dict[str, JoinReader] = {  # formats whose records are spread over several files
    "sbu": sbu_records,
    "msrvtt": msrvtt_records,
    "visual_genome": visual_genome_records,
    "vqa": vqa_records,
    "activitynet_qa": activitynet_qa_records,
}


def read_rows(names: Sequence[str], reading: Reading, scratch: Path | None = None, digest: Any = None) -> Iterator[Row]:
    """The rows of annotation files, in order. Files in Singularity's own JSON are known by their first record.

    scratch: a folder for copies of remote files. digest: a hash object; in the end it has taken in all files, in order.

    Raises FileNotFoundError: a file does not exist. ValueError: a file has another form, or a record lacks its media or
    its text.
    """
    check_reading(reading)
    joined = reading.format in JOINING
    for group in [names] if joined else [[name] for name in names]:
        with ExitStack() as stack:
            hashed = None if joined else digest  # files that are read side by side are hashed afterwards
            files = [stack.enter_context(AnnotationFile(name, scratch, hashed)) for name in group]
            yield from rows_of(files, reading)
            for file in files if digest else ():
                file.finish(digest)


def check_reading(reading: Reading) -> None:
    """Raise UserError, with the nearest names, for a format or an encoding that does not exist."""
    known = [*READERS, *JOINING]
    if reading.format not in known:
        near = nearest(reading.format, known) or known
        raise UserError(f"--format {reading.format}: unknown format, {listed_nearest(near)}")
    try:
        codecs.lookup(reading.encoding)
    except LookupError:
        raise UserError(f"--encoding {reading.encoding}: unknown encoding") from None


def rows_of(files: Sequence[AnnotationFile], reading: Reading) -> Iterator[Row]:
    """The rows of open files."""
    maker = RowMaker(reading.columns, reading.keep, reading.extra_columns)
    # Segments set by the corpus, such as the first 30 seconds, apply to its official JSON as well.
    usual = Columns(start=reading.columns.start, end=reading.columns.end)
    own = RowMaker(usual, reading.keep, reading.extra_columns)
    for official, group in groupby(files, key=lambda file: is_official(file, maker)):
        records = records_of(list(group), Reading(format="json") if official else reading)
        for record in records:
            try:
                yield (own if official else maker).row(record)
            except RowError as error:
                if not reading.skip_bad_rows:
                    raise
                yield Row(filtered=f"bad row: {error.kind}")
            except RecursionError:
                raise UserError(f"{record.location}: it is nested too deeply to be read") from None


def records_of(files: Sequence[AnnotationFile], reading: Reading) -> Iterator[Record]:
    """The records of open files, by the reader of their format."""
    if reading.format in JOINING:
        return JOINING[reading.format](files, reading)
    return chain.from_iterable(READERS[reading.format](file, reading) for file in files)


def is_official(file: AnnotationFile, maker: RowMaker) -> bool:
    """Whether a file is a JSON list in Singularity's own form, and not what the columns describe."""
    if ".json" not in file.name.lower() or ".jsonl" in file.name.lower():
        return False
    first = first_record(file)
    if first is None or not any(isinstance(first.fields.get(key), str) for key in ("image", "video")):
        return False
    return ("caption" in first.fields or "question" in first.fields) and not maker.matches(first)


def expanded(patterns: Sequence[str]) -> list[str]:
    """Names of files, those with `*`, `?` or `[` replaced by what they match, in order of name.

    Raises FileNotFoundError: a file does not exist, or nothing matches.
    """
    files = []
    for pattern in map(plain_scheme, patterns):
        if not MAGIC & set(pattern):
            check_exists(pattern)
            files.append(pattern)
            continue
        filesystem, path = fsspec.url_to_fs(pattern)
        with storage_errors(pattern, "read annotations from"):
            found = retry(matching, filesystem, path)
        if not found:
            check_bucket(pattern)
            raise MissingError(f"no annotation file matches {pattern}: check --annotations")
        files += [filesystem.unstrip_protocol(each) if "://" in pattern else each for each in found]
    return files


def matching(filesystem: Any, path: str) -> list[str]:
    """The files that match a pattern, in order of name; folders that exist under the literal name are not patterns."""
    parts = path.split("/")
    known = 1
    while known < len(parts) and (not MAGIC & set(parts[known]) or filesystem.exists("/".join(parts[: known + 1]))):
        known += 1
    folder, rest = "/".join(parts[:known]), "/".join(parts[known:])
    if not rest:
        return [path]
    if not MAGIC & set(folder):
        return sorted(filesystem.glob(path))
    pattern = re.compile(glob_translate(rest))
    found = filesystem.find(folder, maxdepth=None if "**" in rest else rest.count("/") + 1)
    return sorted(each for each in found if pattern.match(each[len(folder) + 1 :]))
