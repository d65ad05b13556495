"""One shard: its tar with exact byte offsets, its parquet index, both complete or absent."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.shards.schema import INDEX_SCHEMA, TYPES, UNREADABLE, ShardInfo
from storage.parquet import read_schema
from storage.policy import retry, storage_errors
from storage.urls import join_url

BLOCK = 512  # bytes of a tar header
NOTE = b"build"  # key of an index's metadata: what a resumed build must know of a finished shard
INDEXED = b"indexed"  # the same for an index that was made afterwards


@dataclass(frozen=True)
class FinishedShard:
    """A published shard, the number of annotation rows in it, and its failures (source, rows, reason)."""

    info: ShardInfo
    rows: int
    failures: list[dict[str, Any]]


class ShardWriter:
    """Collects the samples of one shard in a temporary file; `close` publishes it under its name.

    Use as a context manager: unfinished files are removed at its end. Each writer has its own folder in `scratch`,
    because an older attempt at the same shard may still be running on a node that was given up.
    """

    def __init__(self, output: str, name: str, scratch: Path, columns: Mapping[str, str] | None = None) -> None:
        """columns: extra ones of the index, name -> type."""
        self.output, self.name, self.columns = output, name, columns or {}
        self.folder = Path(tempfile.mkdtemp(dir=scratch))
        self.path = self.folder / name
        self.file = self.path.open("wb", buffering=2**20)
        self.size = 0  # bytes written
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what is left of the temporary file."""
        self.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, key: str, jpegs: list[bytes], row: dict[str, Any]) -> None:
        """Write a sample's frames and its JSON; `row` holds its other index columns."""
        still = row["fps"] is None
        names = [f"{key}.jpg"] if still else [f"{key}.{number:03d}.jpg" for number in range(len(jpegs))]
        offsets = [self.write(name, data) for name, data in zip(names, jpegs, strict=True)]
        self.write(f"{key}.json", json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode())
        self.rows.append(
            {
                "key": key,
                "offsets": offsets,
                "sizes": [len(data) for data in jpegs],
                "crc32s": [zlib.crc32(data) for data in jpegs],
                **row,
            }
        )

    def write(self, name: str, data: bytes) -> int:
        """Append a member; returns the byte offset of its data in the tar.

        tarfile's own `addfile` would copy the header's fields and the data once more.
        """
        padding = -len(data) % BLOCK
        self.file.write(tar_header(name, len(data)))
        self.file.write(data)
        self.file.write(bytes(padding))
        offset = self.size + BLOCK
        self.size = offset + len(data) + padding
        return offset

    def close(self, rows: int, failures: list[dict[str, Any]]) -> FinishedShard:
        """Publish tar, then index: a shard whose index carries its final name is complete.

        `rows` (annotation rows packed) and `failures` (source, rows, reason) travel in the index's metadata,
        so that an interrupted build forgets none.
        """
        end = 2 * BLOCK  # of zeros mark the end, and more of them fill the last record
        self.file.write(bytes(end + -(self.size + end) % tarfile.RECORDSIZE))
        self.file.close()
        index = self.path.with_suffix(".parquet")
        facts: dict[str, Any] = {**counts(self.rows), "bytes": self.path.stat().st_size, "sha256": sha256(self.path)}
        write_index(index, self.rows, {"facts": facts, "rows": rows, "failures": failures}, self.columns)
        info = shard_info(self.name, facts, index.name, index.read_bytes())
        publish(self.path, join_url(self.output, self.name))
        publish(index, join_url(self.output, info.index_name))
        return FinishedShard(info, rows, failures)


def tar_header(name: str, size: int) -> bytes:
    """The bytes before a member of `size` bytes: as tarfile makes them, of nothing but a name and a size.

    Name, size and checksum are put into a copy of one header, which costs a tenth of a new one; tarfile makes the
    headers of names and sizes that do not fit. webdataset's TarWriter gives the same bytes, but packing photos of 256
    pixels then takes 1.3x the processor time.
    """
    encoded = name.encode("ascii", "replace")
    if len(encoded) > 100 or b"?" in encoded or size >= 8**11:
        return plain_header(name, size).tobuf(tarfile.USTAR_FORMAT)
    header, total = header_form()
    digits = b"%011o" % size
    total += sum(encoded) + sum(digits)
    return b"".join((encoded, header[len(encoded) : 124], digits, header[135:148], b"%06o" % total, header[154:]))


def plain_header(name: str, size: int) -> tarfile.TarInfo:
    """A member's header before it is bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info


@functools.cache
def header_form() -> tuple[bytes, int]:
    """The header of an empty member without a name, and the sum of its bytes without those of size and checksum."""
    header = plain_header("", 0).tobuf(tarfile.USTAR_FORMAT)
    return header, sum(header[:124]) + sum(header[135:148]) + 8 * ord(" ") + sum(header[156:])


def write_index(
    path: Path, rows: list[dict[str, Any]], note: dict[str, Any], columns: Mapping[str, str], key: bytes = NOTE
) -> None:
    """Write a shard's index; `note` goes into its metadata. columns: extra ones, name -> type (of schema.TYPES)."""
    fields = [*INDEX_SCHEMA, *(pa.field(name, TYPES[kind]) for name, kind in columns.items())]
    write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields, {key: json.dumps(note)})), path)


def write_table(index: pa.Table, path: Path) -> None:
    """Write an index to a local file."""
    pq.write_table(index, path, compression="zstd", write_page_checksum=True)


def read_note(schema: pa.Schema) -> dict[str, Any]:
    """The notes in the metadata of an index; empty for another tool's file."""
    metadata = schema.metadata or {}
    return json.loads(metadata.get(INDEXED) or metadata.get(NOTE) or "{}")


def shard_info(tar: str, facts: Mapping[str, Any], index_name: str, index: bytes) -> ShardInfo:
    """A shard's line of corpus.json, of its tar's `facts` and the contents of its index."""
    digest = hashlib.sha256(index).hexdigest()
    unusual = "" if index_name == tar.removesuffix(".tar") + ".parquet" else index_name
    return ShardInfo(tar, **facts, index_bytes=len(index), index_sha256=digest, index=unusual)


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Numbers of samples, frames, captions, questions and choices in a shard's index rows."""
    of = {"frames": "offsets", "captions": "captions", "questions": "questions", "choices": "choices"}
    return {"samples": len(rows), **{unit: sum(len(row[column]) for row in rows) for unit, column in of.items()}}


def publish(path: Path, target: str) -> None:
    """Move a finished file to its target: a rename on local disk, an upload elsewhere."""
    filesystem, target_path = fsspec.url_to_fs(target)
    if "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        os.replace(path, target_path)
    else:
        with storage_errors(target, "write"):
            retry(filesystem.put_file, str(path), target_path)
        path.unlink()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished_shard(output: str, name: str) -> FinishedShard | None:
    """A shard that an earlier build completed; None unless the shard and its index are complete."""
    url = join_url(output, name)
    with storage_errors(url, "read"):
        filesystem, tar = fsspec.url_to_fs(url)
        try:
            data = retry(filesystem.cat_file, tar.removesuffix(".tar") + ".parquet")
            size = retry(filesystem.size, tar)
        except FileNotFoundError:
            return None
    try:
        note = read_note(read_schema(data))
        if size != note["facts"]["bytes"]:
            return None
        info = shard_info(name, note["facts"], name.removesuffix(".tar") + ".parquet", data)
        return FinishedShard(info, note["rows"], note["failures"])
    except (*UNREADABLE, KeyError):
        return None
