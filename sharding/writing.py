"""One shard: its tar with exact byte offsets, its parquet index, both complete or absent."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.schema import INDEX_SCHEMA, ShardInfo, join_url

BLOCK = 512  # bytes of a tar header
FAILURES = b"failures"  # key of an index's metadata


class ShardWriter:
    """Collects the samples of one shard in a temporary file; `close` publishes it under its name."""

    def __init__(self, output: str, name: str, scratch: str) -> None:
        self.output, self.name = output, name
        self.path = Path(scratch) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("wb")
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        self.rows: list[dict[str, Any]] = []

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
        """Append a member; returns the byte offset of its data in the tar."""
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, 0o644
        offset = self.tar.offset + BLOCK
        self.tar.addfile(info, io.BytesIO(data))
        return offset

    def close(self, failures: list[dict[str, Any]]) -> ShardInfo:
        """Publish tar, then index: a shard whose index carries its final name is complete.

        `failures` (source, rows, reason) travel in the index's metadata, so that an interrupted build forgets none.
        """
        self.tar.close()
        self.file.close()
        index = self.path.with_suffix(".parquet")
        write_index(index, self.rows, failures)
        info = shard_info(self.name, self.path, index, self.rows)
        publish(self.path, join_url(self.output, self.name))
        publish(index, join_url(self.output, info.index_name))
        return info


def write_index(path: Path, rows: list[dict[str, Any]], failures: list[dict[str, Any]]) -> None:
    """Write a shard's index; `failures` go into its metadata."""
    schema = INDEX_SCHEMA.with_metadata({FAILURES: json.dumps(failures)})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def publish(path: Path, target: str) -> None:
    """Move a finished file to its place: a rename on local disk, an upload elsewhere."""
    filesystem, place = fsspec.url_to_fs(target)
    if "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        os.replace(path, place)
    else:
        filesystem.put_file(str(path), place)
        path.unlink()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_info(name: str, tar: Path, index: Path, rows: list[dict[str, Any]]) -> ShardInfo:
    """The line of `corpus.json` about a shard whose two files lie at `tar` and `index`."""
    return ShardInfo(
        name=name,
        samples=len(rows),
        frames=sum(len(row["offsets"]) for row in rows),
        captions=sum(len(row["captions"]) for row in rows),
        questions=sum(len(row["questions"]) for row in rows),
        choices=sum(len(row["choices"]) for row in rows),
        bytes=tar.stat().st_size,
        sha256=sha256(tar),
        index_bytes=index.stat().st_size,
        index_sha256=sha256(index),
    )


def finished_shard(output: str, name: str) -> tuple[ShardInfo, list[dict[str, Any]]] | None:
    """A shard that an earlier build completed, with its failures; None when it is not there (local outputs only)."""
    tar = Path(output) / name
    index = tar.with_suffix(".parquet")
    if not (tar.exists() and index.exists()):
        return None
    table = pq.read_table(index)
    return shard_info(name, tar, index, table.to_pylist()), json.loads(table.schema.metadata[FAILURES])
