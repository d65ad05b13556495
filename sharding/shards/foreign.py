"""The samples of a webdataset tar that another tool wrote, or of ours without its index, as rows of an index."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO

from sharding.media.frames import MediaError
from sharding.media.picture import picture_size
from sharding.media.tar import Damage, LinkError, Locations, Member, TarStream, compression_of
from sharding.shards.foreign_texts import (
    SampleError,
    captions_of,
    choices_of,
    extra_of,
    json_fields,
    number_of,
    questions_of,
    times_of,
)

PICTURES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov", "mpg", "mpeg", "flv", "wmv", "m4v", "ts", "gif")
TEXTS = ("json", "txt")
CLUTTER = "file of macOS (._*, __MACOSX/, .DS_Store): no part of a sample"
NO_ENDING = "file without an ending: no part of a sample"


@dataclass
class Sample:
    """The files of one key in a tar: pictures by ending, texts, endings of other files.

    duplicates: how many more files of an ending there are, with other contents. broken: why it cannot be indexed.
    """

    key: str
    pictures: dict[str, Picture] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    duplicates: Counter[str] = field(default_factory=Counter)
    broken: str = ""

    @property
    def frame_endings(self) -> list[str]:
        """Endings of the frames of a clip in order (999.jpg before 1000.jpg), or of the one picture; empty without."""
        ranked = sorted(self.pictures, key=lambda ending: (PICTURES.index(ending.rsplit(".", 1)[-1]), ending))
        if self.is_clip:
            numbered = {frame_number(ending): ending for ending in reversed(ranked)}
            return [numbered[number] for number in sorted(numbered) if number >= 0]
        whole = [ending for ending in ranked if ending in PICTURES]
        return (whole or sorted(ranked))[:1]

    @property
    def is_clip(self) -> bool:
        """Whether its frames are numbered."""
        return any(frame_number(ending) >= 0 for ending in self.pictures)


@dataclass(frozen=True)
class Picture:
    """The position of a picture's bytes, and its size in pixels; `broken` is the reason if it has none."""

    offset: int
    size: int
    crc32: int
    width: int
    height: int
    broken: str = ""


@dataclass
class Contents:
    """The content of one tar: index rows, skipped samples with the reason, damages, its SHA-256 and size.

    remarks: what else was left out, by kind.
    """

    rows: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    damages: list[Damage]
    sha256: str
    bytes: int
    is_video: bool
    rate_assumed: bool
    remarks: Counter[str] = field(default_factory=Counter)


class Reader:
    """Collects the samples of one tar."""

    def __init__(self, file: BinaryIO, on_read: Callable[[int], None] | None) -> None:
        self.file, self.stream = file, TarStream(file, on_read)
        self.samples: dict[str, Sample] = {}
        self.failures: list[dict[str, Any]] = []
        self.damages: list[Damage] = []
        self.remarks: Counter[str] = Counter()
        self.locations = Locations()
        self.links: list[Member] = []

    def run(self) -> None:
        """Read the tar to its end; raises ValueError when it is not a plain tar."""
        last = ""
        empty = True
        for found in self.stream.walk(is_wanted):
            if isinstance(found, Damage):
                self.note(found, last)
            else:
                empty = False
                self.locations.add(found)
                last = self.see(found) or last
        if empty and self.damages:
            raise ValueError(f"no plain tar: {self.damages[0].reason}")
        self.read_links()

    def note(self, damage: Damage, last: str) -> None:
        """Take in a damage, behind a member of the sample `last`."""
        if damage.offset == 0 and not self.stream.position:
            raise ValueError("an empty file")
        if damage.offset == 0 and compression_of(self.stream.head):
            raise ValueError("no plain tar; compressed shards cannot be read in part: unpack them first")
        if damage.certain:
            self.damages.append(damage)
        if damage.cut and split_name(damage.cut)[0] == last:
            self.samples.pop(last, None)  # one of its files is missing

    def see(self, member: Member) -> str:
        """Take in a member; returns the key of its sample, or nothing where it belongs to none."""
        key, ending = split_name(member.name)
        if is_clutter(member.name):
            self.remarks[CLUTTER] += 1
            return ""
        if not key or key.endswith("/"):
            if is_wanted(member.name):
                reason = "its name begins with a dot: it has no key"
                self.failures.append({"source": member.name, "rows": 1, "reason": reason})
            return ""
        if not ending:
            self.remarks[NO_ENDING] += 1
            return ""
        sample = self.samples.setdefault(key, Sample(key))
        if member.link:
            self.links.append(member)
        elif member.unreadable and is_wanted(member.name):
            sample.broken = sample.broken or f"{member.name} {member.unreadable}: pack the tar again without that"
        else:
            take(sample, ending, member.data, member.offset)
        return key

    def read_links(self) -> None:
        """Read the targets of links, in the order of the tar."""
        found = []
        for link in self.links:
            key, ending = split_name(link.name)
            try:
                target = self.locations.target(link)
                if target.unreadable:
                    raise LinkError(f"is a link to a file that {target.unreadable}")
                found.append((target.offset, target.size, self.samples[key], ending, is_wanted(link.name)))
            except LinkError as error:
                if is_wanted(link.name):
                    self.samples[key].broken = self.samples[key].broken or f"{link.name} {error}"
        for offset, size, sample, ending, wanted in sorted(found, key=lambda each: each[0]):
            data = None
            if wanted:
                self.file.seek(offset)
                data = self.file.read(size)
            take(sample, ending, data, offset)


def read_contents(
    file: BinaryIO,
    fps: float,
    on_read: Callable[[int], None] | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Contents:
    """Index rows of a tar's samples in order; fps: rate of clips' frames where their JSON does not say it.

    columns: keys of KEY.json -> their types, which become extra columns.
    Raises ValueError: it is not a plain tar, or holds whole videos instead of frames.
    """
    reader = Reader(file, on_read)
    reader.run()
    samples = list(reader.samples.values())
    pictured = [sample for sample in samples if sample.pictures or sample.broken]
    videos = [sample for sample in samples if any(ending in VIDEOS for ending in sample.others)]
    if videos and not pictured:
        name = next(f"{videos[0].key}.{ending}" for ending in videos[0].others if ending in VIDEOS)
        raise ValueError(
            f"contains whole videos ({name}), and frames cannot be read from those one by one: repack them with "
            "`python -m sharding.build --media-type video --media-root FOLDER_OF_THE_TARS`, which reads clips inside "
            f'tars: in the annotations a path is such as "00000.tar/{name}"'
        )
    is_video = any(sample.is_clip for sample in pictured)
    rows, assumed = [], False
    for sample in samples:
        try:
            row, guessed = row_of(sample, is_video, fps, columns)
        except SampleError as error:
            reader.failures.append({"source": sample.key, "rows": 1, "reason": str(error)})
            continue
        rows.append(row)
        assumed = assumed or guessed
        if sample.duplicates:
            more = max(sample.duplicates.values())
            reason = f"is in the tar {more + 1} times, with different contents: the first is indexed"
            reader.failures.append({"source": sample.key, "rows": more, "reason": reason})
        reader.remarks.update(remark_on(sample))
    hashed = reader.stream.sha256.hexdigest(), reader.stream.position
    return Contents(rows, reader.failures, reader.damages, *hashed, is_video, assumed, reader.remarks)


def remark_on(sample: Sample) -> list[str]:
    """Remarks on the pictures and texts of a sample that are left out."""
    texts = sorted(ending for ending in sample.others if ending.rsplit(".", 1)[-1] in TEXTS)
    remarks = [
        f"{ending}: not read, as a key ends at the first dot of a name; texts are KEY.txt, KEY.json" for ending in texts
    ]
    if left := sorted(set(sample.pictures) - set(sample.frame_endings)):
        taken = "the numbered frames are" if sample.is_clip else f"{sample.frame_endings[0]} is"
        remarks.append(f"{', '.join(left)} in the same sample: {taken} taken")
    return remarks


def is_wanted(name: str) -> bool:
    """Whether a file's bytes are needed for the index."""
    return split_name(name)[1].rsplit(".", 1)[-1] in (*PICTURES, *TEXTS)


def is_clutter(name: str) -> bool:
    """Whether a file is one of those that macOS adds to archives."""
    *folders, file = name.split("/")
    return file.startswith("._") or file == ".DS_Store" or "__MACOSX" in folders


def split_name(name: str) -> tuple[str, str]:
    """(key, ending) of a member by webdataset's rule: the key ends at the first dot of the file's name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower()


def frame_number(ending: str) -> int:
    """7 of `007.jpg`; -1 where a picture has no number."""
    number, _, rest = ending.partition(".")
    return int(number) if rest and number.isdecimal() else -1


def take(sample: Sample, ending: str, data: bytes | None, offset: int) -> None:
    """Note a file with its sample."""
    if data is not None and ending.rsplit(".", 1)[-1] in PICTURES:
        picture = picture_of(data, offset)
        first = sample.pictures.setdefault(ending, picture)
        sample.duplicates[ending] += (first.size, first.crc32) != (picture.size, picture.crc32)
    elif data is not None and ending in TEXTS:
        sample.duplicates[ending] += sample.texts.setdefault(ending, data) != data
    else:
        sample.others.append(ending)


def picture_of(data: bytes, offset: int) -> Picture:
    """Location and size of a picture, as it is shown; only its header is read."""
    try:
        (width, height), broken = picture_size(data), ""
    except MediaError as error:
        reason = str(error).removeprefix("unreadable image: ")
        width, height, broken = 0, 0, f"unreadable picture: {reason}" if data else "empty picture"
    return Picture(offset, len(data), zlib.crc32(data), width, height, broken)


def row_of(
    sample: Sample, is_video: bool, fps: float, columns: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, Any], bool]:
    """A sample's row of the index, and whether its frame rate was guessed; raises SampleError."""
    check_duplicates(sample)
    frames = [sample.pictures[ending] for ending in sample.frame_endings]
    if not frames:
        raise SampleError(f"no picture among its files ({', '.join([*sample.texts, *sample.others])})")
    for number, frame in enumerate(frames):
        if frame.broken:
            raise SampleError(f"frame {number}: {frame.broken}" if is_video else frame.broken)
    stated = json_fields(sample.texts)
    rate = (number_of(stated.get("fps")) or fps or 1.0) if is_video else None
    row = {
        "key": sample.key,
        "offsets": [frame.offset for frame in frames],
        "sizes": [frame.size for frame in frames],
        "crc32s": [frame.crc32 for frame in frames],
        "width": frames[0].width,
        "height": frames[0].height,
        "fps": rate,
        "duration": None if rate is None else number_of(stated.get("duration")) or len(frames) / rate,
        "frame_times": [] if rate is None else times_of(stated, len(frames), rate),
        "source": str(stated.get("source") or stated.get("url") or sample.key),
        "captions": captions_of(sample.texts, stated),
        "questions": questions_of(stated, sample.key),
        "choices": choices_of(stated),
        **extra_of(stated, columns),
    }
    return row, rate is not None and not number_of(stated.get("fps")) and not fps


def check_duplicates(sample: Sample) -> None:
    """Raise SampleError where a sample cannot be indexed, or files of one name leave open which belong together."""
    sample.duplicates = +sample.duplicates
    if sample.broken:
        raise SampleError(sample.broken)
    times = {1 + sample.duplicates[ending] for ending in (*sample.pictures, *sample.texts)}
    if len(times) > 1:
        raise SampleError(
            f"{', '.join(sorted(sample.duplicates))} more than once in the tar, with different contents: it is unclear "
            "which files belong together"
        )
