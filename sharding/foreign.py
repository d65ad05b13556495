"""The samples of a webdataset tar that another tool wrote, or of ours without its index, as rows of an index."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from sharding.annotations.items import question_of
from sharding.media import MediaError
from sharding.media.picture import picture_size
from sharding.tar import Damage, Member, TarStream

PICTURES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov", "mpg", "mpeg", "flv", "wmv", "m4v", "ts", "gif")
TEXTS = ("json", "txt")
CAPTION_KEYS = ("captions", "caption", "text", "TEXT")


class SampleError(Exception):
    """A sample that cannot be indexed; the message is the reason that the report shows."""


@dataclass
class Sample:
    """What a tar holds under one key: its pictures by ending, its texts, endings of other files."""

    key: str
    pictures: dict[str, Picture] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def frames(self) -> list[Picture]:
        """The frames of a clip in order (999.jpg before 1000.jpg), or the one picture; empty when there is none."""
        if self.is_clip:
            numbered = sorted((frame_number(ending), ending) for ending in self.pictures)
            return [self.pictures[ending] for number, ending in numbered if number >= 0]
        whole = [ending for ending in PICTURES if ending in self.pictures]
        return [self.pictures[ending] for ending in (whole or sorted(self.pictures))[:1]]

    @property
    def is_clip(self) -> bool:
        """Whether its frames are numbered."""
        return any(frame_number(ending) >= 0 for ending in self.pictures)


@dataclass(frozen=True)
class Picture:
    """Where a picture's bytes lie, and its pixels; `broken` is the reason when they are none."""

    offset: int
    size: int
    crc32: int
    width: int
    height: int
    broken: str = ""


@dataclass
class Contents:
    """What one tar holds: index rows, samples left out with the reason, damages, its SHA-256 and size."""

    rows: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    damages: list[Damage]
    sha256: str
    bytes: int
    is_video: bool
    rate_assumed: bool


def read_contents(file: BinaryIO, fps: float, heard: Callable[[int], None] | None = None) -> Contents:
    """Index rows of a tar's samples in order; fps: rate of clips' frames where their JSON does not say it.

    Raises:
        ValueError: it is no plain tar, or holds whole videos instead of frames.
    """
    stream = TarStream(file, heard)
    samples: dict[str, Sample] = {}
    damages: list[Damage] = []
    last = ""
    for found in stream.walk(is_wanted):
        if isinstance(found, Damage):
            if found.offset == 0:
                if not stream.position:
                    raise ValueError("an empty file")
                raise ValueError("no plain tar; compressed shards cannot be read in part: unpack them first")
            if found.certain:
                damages.append(found)
            continue
        last, ending = split_name(found.name)
        take(samples.setdefault(last, Sample(last)), ending, found)
    if any("cut off" in damage.reason and "inside" in damage.reason for damage in damages):
        samples.pop(last, None)  # some of its files are missing
    return contents_of(samples, fps, damages, stream)


def contents_of(samples: dict[str, Sample], fps: float, damages: list[Damage], stream: TarStream) -> Contents:
    """What all samples of a tar make."""
    pictured = [sample for sample in samples.values() if sample.pictures]
    videos = [sample for sample in samples.values() if any(ending in VIDEOS for ending in sample.others)]
    if videos and not pictured:
        file = next(f"{videos[0].key}.{ending}" for ending in videos[0].others if ending in VIDEOS)
        raise ValueError(
            f"holds whole videos ({file}), and frames cannot be read from those one by one: repack them with "
            "`python -m sharding.build --media-type video --media-root FOLDER_OF_THE_TARS`, which reads clips inside "
            f'tars: in the annotations a path is such as "00000.tar/{file}"'
        )
    is_video = any(sample.is_clip for sample in pictured)
    rows, failures = [], []
    assumed = False
    for sample in samples.values():
        if not (sample.pictures or sample.texts or sample.others):
            continue
        try:
            row, guessed = row_of(sample, is_video, fps)
        except SampleError as error:
            failures.append({"source": sample.key, "rows": 1, "reason": str(error)})
            continue
        rows.append(row)
        assumed = assumed or guessed
    return Contents(rows, failures, damages, stream.sha256.hexdigest(), stream.position, is_video, assumed)


def is_wanted(name: str) -> bool:
    """Whether a file's bytes are needed for the index."""
    return split_name(name)[1].rsplit(".", 1)[-1] in (*PICTURES, *TEXTS)


def split_name(name: str) -> tuple[str, str]:
    """(key, ending) of a member by webdataset's rule: the key ends at the first dot of the file's name."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    key, _, ending = file.partition(".")
    return (f"{folder}/{key}" if folder else key).replace(".", "_"), ending.lower()


def frame_number(ending: str) -> int:
    """7 of `007.jpg`; -1 where a picture has no number."""
    number, _, rest = ending.partition(".")
    return int(number) if rest and number.isdecimal() else -1


def take(sample: Sample, ending: str, member: Member) -> None:
    """Note a member with its sample."""
    kind = ending.rsplit(".", 1)[-1]
    if kind in PICTURES and member.data is not None:
        sample.pictures[ending] = picture_of(member.data, member.offset)
    elif ending in TEXTS and member.data is not None:
        sample.texts[ending] = member.data
    else:
        sample.others.append(ending)


def picture_of(data: bytes, offset: int) -> Picture:
    """Place and size of a picture, as it is shown; only its header is read."""
    try:
        (width, height), broken = picture_size(data), ""
    except MediaError as error:
        reason = str(error).removeprefix("unreadable image: ")
        width, height, broken = 0, 0, f"unreadable picture: {reason}" if data else "empty picture"
    return Picture(offset, len(data), zlib.crc32(data), width, height, broken)


def row_of(sample: Sample, is_video: bool, fps: float) -> tuple[dict[str, Any], bool]:
    """A sample's row of the index, and whether its frame rate was guessed; raises SampleError."""
    frames = sample.frames
    if not frames:
        raise SampleError(f"no picture among its files ({', '.join([*sample.texts, *sample.others])})")
    for number, frame in enumerate(frames):
        if frame.broken:
            raise SampleError(f"frame {number}: {frame.broken}" if is_video else frame.broken)
    said = said_by(sample)
    rate: float | None = None
    if is_video:
        rate = number_of(said.get("fps")) or fps or 1.0
    times = said.get("frame_times")
    if rate is None:
        times = []
    elif not isinstance(times, list) or len(times) != len(frames):
        times = [number / rate for number in range(len(frames))]
    questions = said.get("questions") or ([question_of(said, sample.key)] if "question" in said else [])
    row = {
        "key": sample.key,
        "offsets": [frame.offset for frame in frames],
        "sizes": [frame.size for frame in frames],
        "crc32s": [frame.crc32 for frame in frames],
        "width": frames[0].width,
        "height": frames[0].height,
        "fps": rate,
        "duration": None if rate is None else number_of(said.get("duration")) or len(frames) / rate,
        "frame_times": times,
        "source": str(said.get("source") or said.get("url") or sample.key),
        "captions": captions_of(sample, said),
        "questions": questions,
        "choices": said.get("choices") or [],
    }
    return row, rate is not None and not number_of(said.get("fps")) and not fps


def said_by(sample: Sample) -> dict[str, Any]:
    """What KEY.json says."""
    if "json" not in sample.texts:
        return {}
    try:
        said = json.loads(sample.texts["json"])
    except ValueError as error:
        raise SampleError(f"its JSON cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise SampleError("its JSON is no object")
    return said


def captions_of(sample: Sample, said: dict[str, Any]) -> list[str]:
    """A sample's captions; those in its JSON count before KEY.txt."""
    given = next((said[key] for key in CAPTION_KEYS if said.get(key)), None)
    if given is None and "txt" in sample.texts:
        given = sample.texts["txt"].decode("utf-8", "replace").strip()
    if given is None or given == "":
        return []
    captions = given if isinstance(given, list) else [given]
    if not all(isinstance(caption, str) for caption in captions):
        raise SampleError(f"its caption is no text but {str(given)[:60]!r}")
    return captions


def number_of(value: Any) -> float:
    """A positive number; 0 for anything else."""
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0
