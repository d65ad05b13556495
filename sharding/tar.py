"""Walks through a tar from end to end: every member with its place and bytes, and whatever is damaged on the way."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import fsspec

BLOCK = 512  # bytes; a tar consists of such blocks
CHUNK = 2**23  # bytes read at a time
NAMING = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)  # members that name the next one
OTHER = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)  # members that hold data but are no file


@dataclass(frozen=True)
class Member:
    """A file in a tar: its bytes start at `offset`; `data` is None where they were not wanted, short where cut off."""

    name: str
    header: bytes  # the tar header before it; empty when that is damaged and the index told what follows
    offset: int
    size: int
    data: bytes | None


@dataclass(frozen=True)
class Damage:
    """What is wrong at a byte of a tar; `certain` is False for what no reader minds, such as padding that is not 0."""

    offset: int
    reason: str
    certain: bool = True


class TarStream:
    """Reads an open file once from its start, counting and hashing its bytes."""

    def __init__(self, file: BinaryIO, heard: Callable[[int], None] | None = None) -> None:
        """`heard` is called with the number of bytes of each read."""
        self.file, self.heard = file, heard or (lambda _: None)
        self.sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size: int, keep: bool = True) -> bytes:
        """The next `size` bytes, fewer at the end of the file; nothing is returned without `keep`."""
        parts: list[bytes] = []
        while size > 0:
            part = self.file.read(min(size, CHUNK))
            if not part:
                break
            self.sha256.update(part)
            self.position += len(part)
            self.heard(len(part))
            size -= len(part)
            if keep:
                parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def walk(
        self, wanted: Callable[[str], bool], known: Mapping[int, tuple[str, int]] | None = None
    ) -> Iterator[Member | Damage]:
        """Files and damages in order, to the end of the tar.

        `wanted` tells from a file's name whether its bytes are returned. After a damaged header the walk goes on at
        the next place that `known` (offset of the data: name and size) or a sound header shows.
        """
        known = known or {}
        name = ""
        ended = False  # the end mark was passed
        while True:
            start = self.position
            header = self.read(BLOCK)
            if len(header) < BLOCK:
                if header or not ended:
                    yield Damage(start, "the tar ends without an end mark: it was cut off")
                return
            if not any(header):
                ended = True
                continue
            info = parse(header)
            if ended:
                yield Damage(start, "bytes after the end mark")
                ended = False
            if info is None:
                yield Damage(start, "damaged tar header")
                name = ""
                if self.position not in known:
                    info, header = self.next_header(known)
                if info is None and self.position in known:
                    yield from self.file_at(*known[self.position], b"", wanted)
                    continue
                if info is None:
                    return
            if info.type in NAMING or info.type in OTHER:
                data = self.read(info.size)
                self.read(-info.size % BLOCK)
                name = given_name(info.type, data) if info.type in NAMING else name
            elif info.isreg():
                yield from self.file_at(name or info.name, info.size, header, wanted)
                name = ""
            else:
                name = ""  # folders and links hold no data

    def file_at(self, name: str, size: int, header: bytes, wanted: Callable[[str], bool]) -> Iterator[Member | Damage]:
        """The file whose data start here."""
        offset, keep = self.position, wanted(name)
        data = self.read(size, keep)
        if self.position < offset + size:
            yield Damage(self.position, f"the tar ends inside {name}: it was cut off")
            return
        yield Member(name, header, offset, size, data if keep else None)
        place = self.position
        padding = self.read(-size % BLOCK)
        if any(padding):
            byte = len(padding) - len(padding.lstrip(b"\0"))
            yield Damage(place + byte, f"the padding after {name} is not zero", certain=False)

    def next_header(self, known: Mapping[int, tuple[str, int]]) -> tuple[tarfile.TarInfo | None, bytes]:
        """Read on until behind a sound header, or to a place that is known."""
        while header := self.read(BLOCK):
            info = parse(header)
            if info is not None and info.name and (header[257:262] == b"ustar"):
                return info, header
            if self.position in known:
                break
        return None, b""


def parse(header: bytes) -> tarfile.TarInfo | None:
    """A tar header's contents; None when it is none, or its checksum is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def given_name(kind: bytes, data: bytes) -> str:
    """The name that a PAX or GNU long-name member gives to the next file; empty when it gives none."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return ""


def open_stream(url: str) -> BinaryIO:
    """Open a local or remote file for one reading from start to end."""
    filesystem, path = fsspec.url_to_fs(url)
    return filesystem.open(path, "rb", block_size=CHUNK, cache_type="readahead")
