"""Media inside tar and zip archives, local or remote: one pass lists the members, then each is one ranged read."""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import logging
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from sharding.media import MediaError

ARCHIVE = re.compile(r"(?<=[^/])\.(tar|zip)(?=/|$)", re.IGNORECASE)
LOCAL_HEADER = 30  # bytes before name and extra field in front of a zip's member
EXTRA = 1024  # bytes read for name and extra field
BATCH = 10_000  # members

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("offset", pa.int64()),  # of the data in a tar, of the local header in a zip
        ("stored", pa.int64()),  # bytes in the archive
        ("size", pa.int64()),  # bytes of the member
        ("method", pa.int16()),  # of compression; -1 in a tar
        ("crc32", pa.uint32()),
    ]
)

log = logging.getLogger("sharding")


@dataclass(frozen=True)
class Member:
    """Where a member lies in its archive: a row of SCHEMA."""

    name: str
    offset: int
    stored: int
    size: int
    method: int
    crc32: int


def split_archive(url: str) -> tuple[str, str] | None:
    """(archive, member) of a path such as `root/a.tar/b/c.jpg`; None where no archive is in it."""
    match = ARCHIVE.search(url, url.find("/", url.find("://") + 3) if "://" in url else 0)
    if match is None or ("://" not in url and os.path.isdir(url[: match.end()])):
        return None
    return url[: match.end()], url[match.end() + 1 :]


class Archive:
    """The members of one archive, listed in a file that all processes of a build map."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.filesystem, self.path = fsspec.url_to_fs(url)
        listing = folder / (hashlib.sha256(url.encode()).hexdigest()[:32] + ".arrow")
        make_listing(url, listing)
        with pa.memory_map(str(listing)) as file:
            self.table = pa.ipc.open_stream(file).read_all().combine_chunks()

    def member(self, name: str) -> Member:
        """The last member of that name; raises MediaError when there is none."""
        names = self.table["name"]
        place = bisect.bisect_right(range(len(names)), name, key=lambda row: names[row].as_py()) - 1
        if place < 0 or names[place].as_py() != name:
            raise MediaError(f"not in the archive {self.url.rsplit('/', 1)[-1]}")
        return Member(**self.table.slice(place, 1).to_pylist()[0])

    def read(self, name: str) -> bytes:
        """A member's bytes; raises MediaError when there is no such member, or it is damaged."""
        member = self.member(name)
        if member.method < 0:
            data = self.filesystem.cat_file(self.path, start=member.offset, end=member.offset + member.stored)
        else:
            end = member.offset + LOCAL_HEADER + len(name.encode()) + EXTRA + member.stored
            data = unpack(self.filesystem.cat_file(self.path, start=member.offset, end=end), member)
        if len(data) != member.size:
            name = self.url.rsplit("/", 1)[-1]
            raise MediaError(f"{len(data)} bytes instead of {member.size} from the archive {name}: cut, or no ranges")
        return data


def unpack(data: bytes, member: Member) -> bytes:
    """The bytes of a zip's member from those that begin at its local header."""
    lengths = int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    body = data[LOCAL_HEADER + lengths :][: member.stored]
    try:
        plain = zlib.decompress(body, -zlib.MAX_WBITS) if member.method == zipfile.ZIP_DEFLATED else body
    except zlib.error as error:
        raise MediaError(f"damaged archive member: {error}") from None
    if zlib.crc32(plain) != member.crc32:
        raise MediaError("damaged archive member: wrong CRC-32")
    return plain


def make_listing(url: str, target: Path) -> None:
    """List an archive's members, sorted by name, in an Arrow file, unless that is done; processes take turns.

    Raises:
        OSError: the archive cannot be read. ValueError: it is no archive, or uses what cannot be read at random.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(target.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        log.info("listing the members of %s", url)
        batches = list(listed(url))
        table = pa.Table.from_batches(batches, SCHEMA).sort_by("name").combine_chunks()
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            with pa.ipc.new_stream(file, SCHEMA) as writer:
                writer.write_table(table)
        os.replace(file.name, target)
    finally:
        os.close(lock)


def listed(url: str) -> Iterator[pa.RecordBatch]:
    """The members of an archive, in its order."""
    find = tar_members if url.lower().endswith(".tar") else zip_members
    with fsspec.open(url, "rb") as file:
        rows: list[dict[str, Any]] = []
        try:
            for member in find(cast(BinaryIO, file)):
                rows.append(vars(member))
                if len(rows) == BATCH:
                    yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
                    rows.clear()
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{url} cannot be read as an archive ({error}): is it complete?") from None
        yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def tar_members(file: BinaryIO) -> Iterator[Member]:
    """The files in a tar."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            if info.isfile() and not info.issparse():
                yield Member(info.name.removeprefix("./"), info.offset_data, info.size, info.size, -1, 0)
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them


def zip_members(file: BinaryIO) -> Iterator[Member]:
    """The files in a zip."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                what = "encrypted" if info.flag_bits & 1 else "compressed in an unusual way"
                raise ValueError(f"{file}: {info.filename} is {what}: unpack the archive first")
            yield Member(
                info.filename, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
            )
