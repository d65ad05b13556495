"""Media inside tar and zip archives, local or remote: one traversal lists the members, then each is one ranged read."""

from __future__ import annotations

import bisect
import bz2
import hashlib
import logging
import lzma
import os
import posixpath
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from runtime.errors import UserError
from sharding.media.frames import MediaError
from sharding.media.tar import Damage, LinkError, TarStream, compression_of, follow
from storage.files import atomic_file
from storage.single_flight import process_lock

ARCHIVE = re.compile(r"(?<=[^/])\.(zip|tar|tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)(?=/|$)", re.IGNORECASE)
LOCAL_HEADER = 30  # bytes before name and extra field in front of a zip's member
ENTRY = 46  # and in its directory
EXTRA = 1024  # bytes read for name and extra field
BATCH = 10_000  # members
IN_TAR = -1  # instead of a zip's method, in a tar
ZSTD = 93
METHODS = {1: "shrink", 6: "implode", 9: "deflate64", 94: "MP3", 95: "xz", 96: "JPEG", 97: "WavPack", 98: "PPMd"}
NAME_ENCODINGS = ("utf-8", "cp437", "cp1252", "gb18030", "cp932", "cp949", "big5", "cp1251")  # the likely first

SCHEMA = pa.schema(
    [
        ("name", pa.binary()),
        ("offset", pa.int64()),  # of the data in a tar, of the local header in a zip
        ("stored", pa.int64()),  # bytes in the archive
        ("size", pa.int64()),  # bytes of the member
        ("method", pa.int16()),  # of compression in a zip; IN_TAR in a tar
        ("crc32", pa.uint32()),
        ("link", pa.binary()),  # of a link: where it leads
        ("hard", pa.bool_()),
        ("unreadable", pa.string()),  # why the member cannot be read
    ]
)

log = logging.getLogger("sharding")


@dataclass(frozen=True)
class Member:
    """The position of a member in its archive: a row of SCHEMA."""

    name: bytes
    offset: int
    stored: int
    size: int
    method: int
    crc32: int
    link: bytes = b""
    hard: bool = False
    unreadable: str = ""


def split_archive(url: str) -> tuple[str, str] | None:
    """(archive, member) of a path such as `root/a.tar/b/c.jpg`; None where no archive is in it."""
    match = ARCHIVE.search(url, url.find("/", url.find("://") + 3) if "://" in url else 0)
    if match is None or ("://" not in url and os.path.isdir(url[: match.end()])):
        return None
    return url[: match.end()], url[match.end() + 1 :]


class Archive:
    """The members of one archive, listed in a file that all processes of a build map.

    Raises OSError: the archive cannot be read. ValueError: it is none, or cannot be read at random.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.name = url, url.rsplit("/", 1)[-1]
        self.filesystem, self.path = fsspec.url_to_fs(url)
        listing = folder / (hashlib.sha256(url.encode()).hexdigest()[:32] + ".arrow")
        make_listing(url, listing)
        with pa.memory_map(str(listing)) as file:
            self.table = pa.ipc.open_stream(file).read_all().combine_chunks()
        notes = {key.decode(): value.decode() for key, value in (self.table.schema.metadata or {}).items()}
        if notes["error"]:
            raise ValueError(notes["error"])
        self.damage = notes["damage"]

    def find(self, path: bytes, before: int | None = None) -> Member | None:
        """The last member with a path, or the last one before an offset."""
        names = self.table["name"]
        position = bisect.bisect_right(range(len(names)), path, key=lambda row: names[row].as_py()) - 1
        while position >= 0 and names[position].as_py() == path:
            member = Member(**self.table.slice(position, 1).to_pylist()[0])
            if before is None or member.offset < before:
                return member
            position -= 1
        return None

    def member(self, name: str) -> Member:
        """The file of that name, links followed; raises MediaError when there is none."""
        for path in encoded_names(name, is_zip(self.url)):
            try:
                return follow(path, self.find)
            except KeyError:
                continue
            except LinkError as error:
                raise MediaError(f"{name} in {self.name} {error}") from None
        damage = f", which is damaged at {self.damage}" if self.damage else ""
        raise MediaError(f"not in the archive {self.name}{damage}")

    def read(self, name: str) -> bytes:
        """A member's bytes; raises MediaError when there is no such member, or it cannot be read or is damaged."""
        member = self.member(name)
        if member.unreadable:
            raise MediaError(f"{name} in {self.name} {member.unreadable}: unpack the archive first")
        data = self.bytes_at(member.offset, member.stored if member.method == IN_TAR else read_size(member))
        if member.method != IN_TAR:
            missing = LOCAL_HEADER + lengths_in(data) + member.stored - len(data)
            data = unpack(data if missing <= 0 else data + self.bytes_at(member.offset + len(data), missing), member)
        if len(data) != member.size:
            raise MediaError(
                f"{len(data)} bytes instead of {member.size} from the archive {self.name}: it is truncated, or its "
                "server ignores ranges"
            )
        return data

    def bytes_at(self, offset: int, size: int) -> bytes:
        """A range of the archive."""
        return cast(bytes, self.filesystem.cat_file(self.path, start=offset, end=offset + size))


def is_zip(url: str) -> bool:
    """Whether an archive is a zip."""
    return url.lower().endswith(".zip")


def encoded_names(name: str, in_zip: bool) -> Iterator[bytes]:
    """The paths that a member of this name may have in an archive: in UTF-8, composed or not, in older encodings."""
    name = posixpath.normpath(name.replace("\\", "/") if in_zip else name)
    if name.isascii():
        yield name.encode()
        return
    yield name.encode("utf-8", "surrogateescape")
    for composed in (unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        yield composed.encode("utf-8", "surrogateescape")
    for encoding in NAME_ENCODINGS:
        try:
            yield name.encode(encoding)
        except UnicodeEncodeError:
            continue


def read_size(member: Member) -> int:
    """Bytes to read of a zip's member, from its local header on: more than it takes but for very long extra fields."""
    return LOCAL_HEADER + len(member.name) + EXTRA + member.stored


def lengths_in(data: bytes) -> int:
    """Bytes of name and extra field behind a zip's local header."""
    return int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")


def unpack(data: bytes, member: Member) -> bytes:
    """The bytes of a zip's member from those that begin at its local header."""
    if not data.startswith(b"PK\3\4"):
        raise MediaError("damaged archive member: it has no header")
    body = data[LOCAL_HEADER + lengths_in(data) :][: member.stored]
    try:
        unpacked = decompress(body, member)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, pa.ArrowException) as error:
        raise MediaError(f"damaged archive member: {error}") from None
    if zlib.crc32(unpacked) != member.crc32:
        raise MediaError("damaged archive member: wrong CRC-32")
    return unpacked


def decompress(body: bytes, member: Member) -> bytes:
    """A zip's member, decompressed to at most one byte more than its directory states."""
    if member.method == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, member.size + 1)
    if member.method == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor().decompress(body, member.size + 1)
    if member.method == zipfile.ZIP_LZMA:
        return decompress_lzma(body, member.size)
    if member.method == ZSTD:
        return cast(bytes, pa.decompress(body, member.size, "zstd", asbytes=True))
    return body


def decompress_lzma(body: bytes, size: int) -> bytes:
    """LZMA as zips have it: version, length of the properties, properties (a byte of three numbers, window), data."""
    if len(body) < 9 or body[2:4] != b"\5\0" or body[4] >= 225:
        raise ValueError("no LZMA properties")
    first, contexts = divmod(body[4], 9)
    numbers = {"lc": contexts, "lp": first % 5, "pb": first // 5, "dict_size": int.from_bytes(body[5:9], "little")}
    form = {"id": lzma.FILTER_LZMA1, **numbers}
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[form]).decompress(body[9:], size)


def make_listing(url: str, target: Path) -> None:
    """List an archive's members, sorted by name, in an Arrow file, unless that is done; processes take turns.

    Its metadata say why it is not an archive, so that it is not read for each of its members, and where it is damaged.
    Raises OSError when it cannot be read.
    """
    with process_lock(target.with_suffix(".lock")):
        if target.exists():
            return
        log.info("listing the members of %s", url)
        damages: list[Damage] = []
        batches: list[pa.RecordBatch] = []
        notes = {"error": "", "damage": ""}
        try:
            batches.extend(listed(url, damages))
        except ValueError as error:
            notes["error"] = str(error)
        for damage in damages[:10]:
            log.warning("%s is damaged at byte %d: %s", url, damage.offset, damage.reason)
        if damages:
            notes["damage"] = f"byte {damages[0].offset} ({damages[0].reason})"
        table = pa.Table.from_batches(batches, SCHEMA).sort_by("name").replace_schema_metadata(notes)
        with atomic_file(target) as temporary, pa.ipc.new_stream(str(temporary), table.schema) as writer:
            writer.write_table(table.combine_chunks())


def listed(url: str, damages: list[Damage]) -> Iterator[pa.RecordBatch]:
    """The members of an archive, in its order; what is damaged in it is added to `damages`.

    Raises ValueError: it is not an archive, or cannot be read at random.
    """
    with fsspec.open(url, "rb") as file:
        found = zip_members(cast(BinaryIO, file)) if is_zip(url) else tar_members(url, cast(BinaryIO, file), damages)
        rows: list[dict[str, Any]] = []
        try:
            for member in found:
                rows.append(vars(member))
                if len(rows) == BATCH:
                    yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
                    rows.clear()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError) as error:  # the second: zipfile's own
            raise UserError(f"{url} cannot be read as an archive ({error}): is it complete?") from None
        yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def tar_members(url: str, file: BinaryIO, damages: list[Damage]) -> Iterator[Member]:
    """The files and links in a tar."""
    stream, empty = TarStream(file, skips=True), True
    for found in stream.walk(lambda _: False):
        if isinstance(found, Damage):
            if found.offset == 0 and (kind := compression_of(stream.head)):
                raise UserError(f"{url} is compressed as a whole ({kind}): unpack it, then its files can be read")
            if found.certain:
                damages.append(found)
        else:
            empty = False
            position = found.offset, found.size, found.size, IN_TAR, 0
            yield Member(found.path, *position, found.link, found.hard, found.unreadable)
    if empty and damages:
        raise EOFError(f"{damages[0].reason} at byte {damages[0].offset}, and no intact one")


class RawNames:
    """A zip whose directory calls no name UTF-8: zipfile takes no archive with a name that is not what it is called.

    It decodes all names as code page 437 then, which has a character for every byte.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """The next bytes, with another flag in every entry of the directory."""
        data = bytearray(self.file.read(size))
        position = 0
        while data[position : position + 4] == b"PK\1\2" and len(data) >= position + ENTRY:
            data[position + 9] &= 0xF7
            position += ENTRY + sum(struct.unpack_from("<3H", data, position + 28))  # name, extra field, comment
        return bytes(data)


def zip_members(file: BinaryIO) -> Iterator[Member]:
    """The files in a zip."""
    with zipfile.ZipFile(cast(BinaryIO, RawNames(file))) as archive:
        for info in archive.infolist():
            name = info.orig_filename.encode("cp437")
            path = posixpath.normpath(name.replace(b"\\", b"/"))
            if name.endswith((b"/", b"\\")):
                continue
            readable = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, ZSTD)
            unreadable = ""
            if info.flag_bits & 1:
                unreadable = "is encrypted"
            elif info.compress_type not in readable:
                unreadable = f"is compressed with {METHODS.get(info.compress_type, f'method {info.compress_type}')}"
            position = info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
            yield Member(path, *position, unreadable=unreadable)
