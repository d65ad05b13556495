"""Traverses a tar from start to end: every member with its offset and bytes, and all damage; follows links."""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol, TypeVar

import fsspec

BLOCK = 512  # bytes; a tar consists of such blocks
CHUNK = 2**23  # bytes read at a time
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)  # members that describe the next one, or all others
LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}  # the same, of GNU tar
LONGEST = 2**26  # bytes of such a member; a larger one is damaged
NO_DATA = (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
NO_FILE = (b"D", b"V", b"N")  # GNU tar: a folder's list, the volume's label, a list of names
OTHER_VOLUME = b"M"
LONGEST_CHAIN = 40  # links, as Linux follows
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22": "lz4"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar, or a link to one.

    Its bytes start at `offset`; `data` is None where they were not wanted, short where cut off. `name` can be printed
    and stored whatever its bytes are; `path` is those bytes, normalised.
    """

    name: str
    header: bytes  # the tar header before it; empty when that is damaged and `known` names the file
    offset: int
    size: int
    data: bytes | None
    path: bytes = b""
    link: bytes = b""  # of a link: the path of what it leads to
    hard: bool = False  # a hard link, which leads to a member before it
    unreadable: str = ""  # why the bytes at `offset` are not the file's


@dataclass(frozen=True)
class Damage:
    """A fault at a byte of a tar; `certain` is False if readers ignore it, such as padding that is not 0."""

    offset: int
    reason: str
    certain: bool = True
    cut: str = ""  # the name of the file that the tar ends inside


class TarStream:
    """Reads an open file once from its start, counting and hashing its bytes."""

    def __init__(self, file: BinaryIO, on_read: Callable[[int], None] | None = None, skips: bool = False) -> None:
        """`on_read` is called with the number of bytes of each read; with `skips` only what is wanted is read.

        Then the SHA-256 is of nothing.
        """
        self.file, self.on_read, self.skips = file, on_read or (lambda _: None), skips
        self.sha256 = hashlib.sha256()
        self.position = 0
        self.head = b""  # the first bytes
        self.end = -1  # of the file, where it is known

    def read(self, size: int, keep: bool = True) -> bytes:
        """The next `size` bytes, fewer at the end of the file; nothing is returned without `keep`."""
        if self.skips and not keep:
            self.skip(size)
            return b""
        parts: list[bytes] = []
        while size > 0:
            part = self.file.read(min(size, CHUNK))
            if not part:
                break
            if not self.position:
                self.head = part[:8]
            self.sha256.update(part)
            self.position += len(part)
            self.on_read(len(part))
            size -= len(part)
            if keep:
                parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> None:
        """Pass over `size` bytes, fewer at the end of the file."""
        if self.end < 0:
            self.end = self.file.seek(0, 2)
        self.position = min(self.position + size, self.end)
        self.file.seek(self.position)

    def walk(
        self, wanted: Callable[[str], bool], known: Mapping[int, tuple[str, int]] | None = None
    ) -> Iterator[Member | Damage]:
        """Files, links and damages in order, to the end of the tar.

        `wanted` tells from a file's name whether its bytes are returned. After a damaged header the walk continues at
        the next place that `known` (offset of the data: name and size) or a valid header shows.
        """
        known = known or {}
        for_all: dict[str, bytes] = {}  # what members describe of all that follow
        for_next: dict[str, bytes] = {}  # and of the next one
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
                for_next = {}
                if self.position not in known:
                    info, header = self.next_header(known)
                if info is None and self.position in known:
                    name, size = known[self.position]
                    yield from self.file_at(name.encode("utf-8", "surrogateescape"), size, b"", wanted)
                    continue
                if info is None:
                    return
            if info.type in PAX or info.type in LONG:
                described = self.description(info)
                if described is None:
                    yield Damage(start, "damaged description of the next member")
                (for_all if info.type == tarfile.XGLTYPE else for_next).update(described or {})
            else:
                yield from self.entry(info, header, for_all | for_next, wanted)
                for_next = {}

    def description(self, info: tarfile.TarInfo) -> dict[str, bytes] | None:
        """The attributes in a PAX or GNU member; None if it is damaged."""
        data = self.read(info.size, info.size <= LONGEST)
        self.read(-info.size % BLOCK)
        if info.type in LONG:
            return {LONG[info.type]: data.partition(b"\0")[0]}
        return pax_records(data) if len(data) == info.size else None

    def entry(
        self, info: tarfile.TarInfo, header: bytes, described: Mapping[str, bytes], wanted: Callable[[str], bool]
    ) -> Iterator[Member | Damage]:
        """The member of a header and its earlier descriptions; nothing for folders and devices."""
        name = described.get("GNU.sparse.name") or described.get("path") or info.name.encode("utf-8", "surrogateescape")
        digits = described.get("size", b"")
        size = int(digits) if digits.isdigit() and len(digits) <= 20 else info.size
        if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            hard = info.type == tarfile.LNKTYPE
            link = described.get("linkpath") or info.linkname.encode("utf-8", "surrogateescape")
            target = link if hard else posixpath.join(posixpath.dirname(name), link)
            yield Member(shown(name), header, self.position, 0, None, plain(name), plain(target), hard)
        elif info.type in NO_FILE:
            self.read(size + -size % BLOCK, keep=False)
        elif info.type not in NO_DATA:
            unreadable = "begins in another volume" if info.type == OTHER_VOLUME else ""
            if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in described):
                unreadable = "is stored as a sparse file"
            more = header[482:483] if info.type == tarfile.GNUTYPE_SPARSE else b""
            while more.strip(b"\0"):  # blocks with more of the map of its parts
                more = self.read(BLOCK)[504:505]
            yield from self.file_at(name, size, header, wanted, unreadable)

    def file_at(
        self, name: bytes, size: int, header: bytes, wanted: Callable[[str], bool], unreadable: str = ""
    ) -> Iterator[Member | Damage]:
        """The file whose data start here."""
        text = shown(name)
        offset, keep = self.position, not unreadable and wanted(text)
        data = self.read(size, keep)
        if self.position < offset + size:
            yield Damage(self.position, f"the tar ends inside {text}: it was cut off", cut=text)
            return
        yield Member(text, header, offset, size, data if keep else None, plain(name), unreadable=unreadable)
        begin = self.position
        padding = self.read(-size % BLOCK)
        if any(padding):
            byte = len(padding) - len(padding.lstrip(b"\0"))
            yield Damage(begin + byte, f"the padding after {text} is not zero", certain=False)

    def next_header(self, known: Mapping[int, tuple[str, int]]) -> tuple[tarfile.TarInfo | None, bytes]:
        """Read until after a valid header, or to a known position."""
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


def pax_records(data: bytes) -> dict[str, bytes] | None:
    """The records of a PAX member; None when it is damaged."""
    records: dict[str, bytes] = {}
    while data.rstrip(b"\0"):
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 20 or not len(length) < int(length) <= len(data):
            return None
        record, data = data[: int(length)], data[int(length) :]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals:
            return None
        records[key.decode("utf-8", "replace")] = value
    return records


def shown(name: bytes) -> str:
    """A name that can be printed and stored, with bytes that are not UTF-8 as \\xe9."""
    return name.decode("utf-8", "backslashreplace")


def plain(name: bytes) -> bytes:
    """A path without `./`, `a/../` and doubled slashes."""
    return posixpath.normpath(name)


def compression_of(head: bytes) -> str:
    """The compression of a file with these first bytes; empty if none."""
    return next((kind for mark, kind in COMPRESSED.items() if head.startswith(mark)), "")


def open_stream(url: str) -> BinaryIO:
    """Open a local or remote file for one reading from start to end."""
    filesystem, path = fsspec.url_to_fs(url)
    return filesystem.open(path, "rb", block_size=CHUNK, cache_type="readahead")


class Entry(Protocol):
    """A file or link of a tar: its offset, the path that a link leads to, and whether that is an earlier member."""

    @property
    def offset(self) -> int: ...  # noqa: D102

    @property
    def link(self) -> bytes: ...  # noqa: D102

    @property
    def hard(self) -> bool: ...  # noqa: D102


Found = TypeVar("Found", bound=Entry)
Find = Callable[[bytes, int | None], Found | None]  # the last entry of a path, before an offset if one is given


class LinkError(ValueError):
    """A link that leads to no file."""


class Locations:
    """The members of one tar by path, without their bytes."""

    def __init__(self) -> None:
        self._members: dict[bytes, list[Member]] = defaultdict(list)

    def add(self, member: Member) -> None:
        """Note the next member."""
        self._members[member.path].append(replace(member, header=b"", data=None))

    def find(self, path: bytes, before: int | None) -> Member | None:
        """The last member with a path, or the last one before an offset."""
        found = reversed(self._members.get(path, []))
        return next((member for member in found if before is None or member.offset < before), None)

    def target(self, link: Member) -> Member:
        """The file that a link leads to; raises LinkError when that is none."""
        try:
            return follow(link.link, self.find, link.offset if link.hard else None)
        except KeyError:
            raise LinkError(f"is a link to {shown(link.link)}, which is not in the archive") from None


def follow(path: bytes, find: Find[Found], before: int | None = None) -> Found:
    """The file at a path, at the end of whatever links lead to it; of several the last one, `before` an offset.

    Raises KeyError: there is nothing of that path. LinkError: there is a link, but it leads to no file.
    """
    wanted, linked = path, False
    for _ in range(LONGEST_CHAIN):
        entry = find(wanted, before) or find(wanted, None)
        if entry is not None and not entry.link:
            return entry
        if entry is not None:
            wanted, before = entry.link, entry.offset if entry.hard else None
        else:
            turned = through_folder(wanted, find)
            if turned is None:
                break
            wanted, before = turned, None
        linked = True
    else:
        raise LinkError("is a link that leads to itself")
    if not linked:
        raise KeyError(path)
    raise LinkError(f"is a link to {shown(wanted)}, which is not in the archive")


def through_folder(path: bytes, find: Find[Found]) -> bytes | None:
    """Another path to the same, where a folder of it is a link; None where none is."""
    for slash in (slash for slash, byte in enumerate(path) if byte == ord("/")):
        folder = find(path[:slash], None)
        if folder is not None and folder.link:
            return plain(folder.link + path[slash:])
    return None
