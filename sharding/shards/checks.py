"""Checks one shard: its tar byte by byte against its index, its checksums, and corpus.json."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from runtime.process_pool import Advance
from sharding.media.frames import MediaError
from sharding.media.picture import decode_picture
from sharding.media.tar import Damage, LinkError, Locations, Member, TarStream, open_stream
from sharding.shards.foreign import PICTURES, split_name
from sharding.shards.schema import INDEX_SCHEMA, UNREADABLE, ShardInfo, is_index_schema, media_type_of, read_file
from sharding.shards.writing import counts, read_note, shard_info, tar_header
from storage.parquet import read_table
from storage.policy import describe_error, retry

LISTED = 1000  # faults of one shard that are listed; the rest is counted
PLACES = ("key", "offsets", "sizes", "crc32s")  # columns of the index that the sample's JSON in the tar lacks


@dataclass(frozen=True)
class Fault:
    """Something wrong with a corpus: in which file, with which sample, at which byte (-1: no certain one), and what."""

    file: str
    reason: str
    key: str = ""
    offset: int = -1

    def __str__(self) -> str:
        """The fault as one line."""
        parts = [self.file, self.key, f"byte {self.offset}" if self.offset >= 0 else "", self.reason]
        return ": ".join(part for part in parts if part)


@dataclass(frozen=True)
class Check:
    """A shard to check: URLs of both files, its line of corpus.json (None: not to be trusted)."""

    number: int
    tar: str
    index: str
    info: ShardInfo | None
    own: bool  # packed by this program: names and texts in the tar are exactly those of the index
    decode: bool


@dataclass
class Report:
    """The result of checking a shard."""

    check: Check
    faults: list[Fault] = field(default_factory=list)
    tar_is_intact: bool = False
    index_is_intact: bool = False
    info: ShardInfo | None = None  # of an intact shard, from the files themselves
    media_type: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)  # as the index lists them


def check_shard(check: Check, advance: Advance) -> Report:
    """Everything wrong with a shard."""
    report = Report(check)
    index_name, tar_name = check.index.rsplit("/", 1)[-1], check.tar.rsplit("/", 1)[-1]
    table, data, faults = read_checked_table(check, index_name)
    rows = [] if table is None else table.to_pylist()
    faults += index_faults(check.info, index_name, rows) if table is not None else []
    note = read_note(table.schema) if table is not None else {}
    expected = check.info or (ShardInfo(tar_name, **note["facts"], index_bytes=0, index_sha256="") if note else None)
    report.faults += faults

    def traverse() -> TarCheck:
        with open_stream(check.tar) as file:
            stream = TarStream(file, lambda part: advance(0, 0, part))
            walk = TarCheck(check, tar_name, table, rows, stream)
            walk.run(None if expected is None else expected.bytes)
            return walk

    try:
        walk = retry(traverse)
    except Exception as error:  # each store has its own errors
        report.faults.append(Fault(tar_name, unread(error)))
    else:
        sha256 = walk.stream.sha256.hexdigest()
        as_written = expected is None or sha256 == expected.sha256
        found = walk.faults + ([] if as_written else walk.minor)
        if not as_written and not found:
            found = [Fault(tar_name, "its SHA-256 differs from the recorded one, although every member is intact")]
        report.faults += found
        report.tar_is_intact = as_written and not walk.damaged
        report.index_is_intact = table is not None and not faults and not (walk.mismatches and as_written)
        if report.index_is_intact and table is not None:
            report.failures = note.get("failures", [])
            report.media_type = media_type_of(table)
            facts: dict[str, Any] = {**counts(rows), "bytes": walk.stream.position, "sha256": sha256}
            report.info = shard_info(tar_name, facts, index_name, data)
    more = len(report.faults) - LISTED
    if more > 0:
        report.faults = [*report.faults[:LISTED], Fault(tar_name, f"and {more} more")]
    advance(int(not report.faults), int(bool(report.faults)), 0)
    return report


def read_checked_table(check: Check, name: str) -> tuple[pa.Table | None, bytes, list[Fault]]:
    """(the index, or None where it cannot be used; its bytes; its faults)."""
    try:
        data = retry(read_file, check.index)
    except Exception as error:  # each store has its own errors
        return None, b"", [Fault(name, unread(error))]
    digest = hashlib.sha256(data).hexdigest()
    if check.info and digest != check.info.index_sha256:
        size = "" if len(data) == check.info.index_bytes else f" ({len(data)} bytes, {check.info.index_bytes} expected)"
        return None, data, [Fault(name, f"its SHA-256 differs from the one in corpus.json{size}")]
    try:
        table = read_table(data)
    except UNREADABLE as error:
        return None, data, [Fault(name, f"is not a readable index: {error}")]
    if not is_index_schema(table.schema):
        return None, data, [Fault(name, "lacks columns of an index")]
    return table, data, []


def unread(error: Exception) -> str:
    """The fault of a file that cannot be read."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {describe_error(error)}"


def index_faults(info: ShardInfo | None, name: str, rows: list[dict[str, Any]]) -> Iterator[Fault]:
    """Faults of an index that contradicts corpus.json or itself."""
    if info:
        for unit, count in counts(rows).items():
            if count != getattr(info, unit):
                yield Fault(name, f"holds {count} {unit}, corpus.json has {getattr(info, unit)}")
    for key, count in Counter(row["key"] for row in rows).items():
        if count > 1:
            yield Fault(name, f"{count} samples have this key", key)
    for row in rows:
        if not len(row["offsets"]) == len(row["sizes"]) == len(row["crc32s"]) or not row["offsets"]:
            yield Fault(name, "offsets, sizes and CRC-32s are inconsistent", row["key"])


@dataclass
class Frame:
    """A frame of the index, to be found in the tar."""

    row: int
    number: int
    size: int
    crc32: int


class TarCheck:
    """One traversal of a tar: `faults`, and `minor` ones that count only if the tar's SHA-256 is wrong."""

    def __init__(
        self, check: Check, name: str, table: pa.Table | None, rows: list[dict[str, Any]], stream: TarStream
    ) -> None:
        self.check, self.name, self.table, self.rows, self.stream = check, name, table, rows, stream
        self.faults: list[Fault] = []
        self.minor: list[Fault] = []
        self.damaged = self.mismatches = 0  # faults of the tar itself; places where the index does not fit it
        self.number_of = {row["key"]: number for number, row in enumerate(self.rows)}
        self.frames: dict[int, list[Frame]] = defaultdict(list)  # links let several samples share a file
        for number, row in enumerate(self.rows):
            for frame, (offset, size, crc32) in enumerate(zip(row["offsets"], row["sizes"], row["crc32s"])):
                self.frames[offset].append(Frame(number, frame, size, crc32))
        self.texts: dict[int, dict[str, Any]] = {}
        self.locations = Locations()
        self.links: list[Member] = []
        self.elsewhere: list[tuple[Member, Frame]] = []  # frames in the file of another sample: is it a link?

    def run(self, size: int | None) -> None:
        """Read the tar to its end; `size`: the bytes it should have."""
        known = {offset: (self.name_of(frames[0]), frames[0].size) for offset, frames in self.frames.items()}
        cut = False
        for found in self.stream.walk(lambda _: True, known):
            if isinstance(found, Damage):
                fault = Fault(self.name, found.reason, offset=found.offset)
                (self.faults if found.certain else self.minor).append(fault)
                self.damaged += found.certain
                cut = cut or "cut off" in found.reason
            else:
                self.check_member(found)
        if size is not None and size != self.stream.position:
            self.damaged += 1
            reason = f"{self.stream.position} bytes, {size} expected"
            self.faults.append(Fault(self.name, reason, offset=min(self.stream.position, size)))
        self.check_links()
        self.check_unseen(cut)
        self.compare_texts()

    def name_of(self, frame: Frame) -> str:
        """The name of a frame's file in a tar of our own."""
        row = self.rows[frame.row]
        return f"{row['key']}.jpg" if row["fps"] is None else f"{row['key']}.{frame.number:03d}.jpg"

    def check_member(self, member: Member) -> None:
        """Check one member against the index."""
        key, ending = split_name(member.name)
        if not self.check.own:
            self.locations.add(member)
        if member.link:
            self.links.append(member)
            return
        frames = self.frames.pop(member.offset, [])
        if self.check.own and member.header and member.header != tar_header(member.name, member.size):
            self.minor.append(Fault(self.name, "its tar header is not as written", key, member.offset - 512))
        for frame in frames:
            if self.check.own or self.rows[frame.row]["key"] in (key, key.replace(".", "_")):  # earlier versions' keys
                self.check_frame(member, frame)
            else:
                self.elsewhere.append((member, frame))
        if frames or not self.check.own or self.table is None:
            return
        if ending.rsplit(".", 1)[-1] in PICTURES or (ending == "json" and key not in self.number_of):
            self.mismatch(f"{member.name} is not in the index", key, member.offset)
        elif ending == "json" and member.data is not None:
            try:
                self.texts[self.number_of[key]] = json.loads(member.data)
            except ValueError:
                self.damaged += 1
                self.faults.append(Fault(self.name, "its JSON cannot be read", key, member.offset))

    def check_links(self) -> None:
        """Check frames in files of other names: links must lead there."""
        linked = set()
        for link in self.links:
            with suppress(LinkError):
                linked.add((split_name(link.name)[0], self.locations.target(link).offset))
        for member, frame in self.elsewhere:
            row = self.rows[frame.row]
            if (row["key"], member.offset) in linked:
                self.check_frame(member, frame)
            else:
                self.mismatch(f"frame {frame.number}: the tar has {member.name} here", row["key"], member.offset)

    def check_frame(self, member: Member, frame: Frame) -> None:
        """Check a frame's name, size, CRC-32, and with `decode` its pixels."""
        row, data = self.rows[frame.row], member.data or b""
        where = f"frame {frame.number}"
        if self.check.own and member.name != self.name_of(frame):
            self.mismatch(f"{where}: the tar has {member.name} here", row["key"], member.offset)
        elif member.size != frame.size:
            self.mismatch(f"{where}: {member.size} bytes, the index has {frame.size}", row["key"], member.offset)
        elif zlib.crc32(data) != frame.crc32:
            self.damaged += 1
            reason = f"{where}: CRC-32 does not match the index"
            self.faults.append(Fault(self.name, reason, row["key"], member.offset))
        elif self.check.decode:
            reason = undecodable(data, row["width"], row["height"])
            if reason:
                self.faults.append(Fault(self.name, f"{where}: {reason}", row["key"], member.offset))

    def mismatch(self, reason: str, key: str, offset: int) -> None:
        """Note that index and tar contradict each other."""
        self.mismatches += 1
        self.faults.append(Fault(self.name, reason, key, offset))

    def check_unseen(self, cut: bool) -> None:
        """Frames of the index that the tar lacks; of a tar that was cut off only their number is reported."""
        left = [(offset, frame) for offset, frames in self.frames.items() for frame in frames]
        if cut and left:
            lost = {self.rows[frame.row]["key"]: None for _, frame in left}
            self.damaged += 1
            reason = f"{len(lost)} samples from here on are missing"
            self.faults.append(Fault(self.name, reason, next(iter(lost)), min(self.frames)))
            return
        for offset, frame in left:
            reason = f"frame {frame.number}: the index has its start here, the tar has no file here"
            self.mismatch(reason, self.rows[frame.row]["key"], offset)

    def compare_texts(self) -> None:
        """Compare the JSON of every sample with its row of the index."""
        if not self.texts or self.table is None:
            return
        numbers = list(self.texts)
        there = {name for text in self.texts.values() for name in text}  # extra columns may be in the index only
        columns = [
            name
            for name in self.table.column_names
            if name not in PLACES and (name in INDEX_SCHEMA.names or name in there)
        ]
        wanted = self.table.select(columns).take(numbers)
        try:
            found = pa.Table.from_pylist([self.texts[number] for number in numbers], schema=wanted.schema)
        except (pa.ArrowException, TypeError, ValueError) as error:
            self.faults.append(Fault(self.name, f"texts in the tar differ from the index: {error}"))
            self.damaged += 1
            return
        if found.equals(wanted):
            return
        for index, (here, there) in enumerate(zip(found.to_pylist(), wanted.to_pylist())):
            other = [column for column in columns if here[column] != there[column]]
            if other:
                key = self.rows[numbers[index]]["key"]
                self.mismatch(f"its JSON and the index differ in {', '.join(other)}", key, -1)


def undecodable(data: bytes, width: int, height: int) -> str:
    """The reason why a picture does not decode to the index's size; empty if it does."""
    try:
        pixels = decode_picture(data).pixels
    except MediaError as error:
        return str(error)
    found = (pixels.shape[1], pixels.shape[0])
    if found == (width, height):
        return ""
    remedy = "; EXIF rotates it: index it again" if found == (height, width) else ""
    return f"{found[0]}x{found[1]} pixels, the index has {width}x{height}{remedy}"
