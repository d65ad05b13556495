"""Real photos and clips beside the checkout: stored as an independent decode shows them, or named with their fault."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from ffmpeg_frames import difference, shown_frames, shown_times, step_of
from packed import failures_of, rows_of
from PIL import Image, ImageOps
from places import SHARED

from sharding.build import build_corpus
from sharding.media.frames import MediaError
from sharding.media.video import pack_video
from sharding.shards.verification import verify_corpus

DATA = SHARED / "data"
MEDIA = {"clips": DATA / "clips" / "videos", "videos": DATA / "videos" / "media"}
BROKEN_PICTURES = {"truncated.jpg": "truncated JPEG", "html_error_page.jpg": "unreadable image"}
BROKEN_CLIPS = {
    "audio_only.mp4": "no video stream",
    "audio_only_aac.mp4": "no video stream",
    "empty.mp4": "empty file",
    "truncated_header.mp4": "unreadable video",
    "truncated_middle.mp4": "unreadable video",
}
PICTURES = {".jpg", ".png", ".gif", ".webp"}
CLIPS = {".mp4", ".mkv", ".avi", ".mov", ".webm", ".mpg", ".mpeg", ".wmv", ".gif"}
CLIP_FOLDERS = ["clips/videos", "videos/media", "videos/odd", "odd"]

pytestmark = pytest.mark.shared
present = [name for name in MEDIA if MEDIA[name].is_dir()]
odd = [DATA / "odd"] if (DATA / "odd").is_dir() else []


def pack(tmp_path: Path, files: list[Path], media_type: str, **settings) -> tuple[dict[str, dict], dict[str, str]]:
    """Index rows, and reasons of failures, by path below DATA; every byte of the corpus is verified."""
    records = [{"image": str(path.relative_to(DATA)), "caption": path.name} for path in files]
    (tmp_path / "a.json").write_text(json.dumps(records))
    output = str(tmp_path / "out")
    options = {"size": 96, "workers": 2, "max_failures": 1.0} | settings
    build_corpus([str(tmp_path / "a.json")], str(DATA), media_type, output, **options)
    assert not verify_corpus(output, decode=True)
    rows, failures = {row["source"]: row for row in rows_of(output)}, failures_of(output)
    assert rows.keys() | failures.keys() == {record["image"] for record in records}
    broken = BROKEN_PICTURES if media_type == "image" else BROKEN_CLIPS
    assert {Path(source).name for source in failures} == {path.name for path in files} & broken.keys()
    assert all(re.match(broken[Path(source).name], reason) for source, reason in failures.items()), failures
    return rows, failures


@pytest.mark.parametrize("name", present)
def test_every_real_clip_is_packed_with_as_many_frames_as_it_lasts(tmp_path: Path, name: str) -> None:
    with open(DATA / name / "clips.tsv") as file:
        facts = {MEDIA[name] / fact["file"]: fact for fact in csv.DictReader(file, delimiter="\t")}
    rows, _ = pack(tmp_path, list(facts), "video", fps=2)
    for path, fact in facts.items():
        row, seconds = rows[str(path.relative_to(DATA))], float(fact["seconds"])
        assert row["duration"] == pytest.approx(seconds, abs=0.15, rel=0.02), path
        assert abs(len(row["offsets"]) - seconds * 2) <= 1, path
        assert row["frame_times"] == [number / 2 for number in range(len(row["offsets"]))]
        turned = fact.get("rotation", "0") in ("90", "270", "-90")
        wide = int(fact["width"]) >= int(fact["height"])
        assert (row["width"] >= row["height"]) == (wide != turned), path
        assert min(row["width"], row["height"]) == min(96, int(fact["width"]), int(fact["height"]))


@pytest.mark.parametrize("folder", odd)
def test_odd_clips(tmp_path: Path, folder: Path) -> None:
    paths = [path for path in folder.iterdir() if path.suffix not in PICTURES or path.name == "not_a_video.jpg"]
    paths += [path for path in (DATA / "videos" / "odd").glob("*.*") if path.suffix != ".md"]
    rows, _ = pack(tmp_path, sorted(paths), "video", fps=10)
    for source, row in rows.items():
        times = shown_times(DATA / source)
        assert abs(len(row["offsets"]) - (times[-1] + 0.1) * 10) <= 2, source
    shapes = {Path(source).name: (row["width"], row["height"]) for source, row in rows.items()}
    assert shapes["video_90.mov"] == shapes["video_270.mov"] == shapes["video_0.mov"][::-1]


def check_pictures(tmp_path: Path, files: list[Path]) -> None:
    rows, _ = pack(tmp_path, files, "image")
    for source, row in rows.items():
        with Image.open(DATA / source) as image:
            width, height = ImageOps.exif_transpose(image).size
        scale = min(1, 96 / min(width, height))
        assert (row["width"], row["height"]) == (max(1, round(width * scale)), max(1, round(height * scale))), source
        assert (len(row["offsets"]), row["captions"]) == (1, [Path(source).name])


def pictures_in(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((DATA / folder).rglob("*")) if path.suffix in PICTURES]
    return [path for path in found if path.name != "not_a_video.jpg"]


@pytest.mark.parametrize("folder", odd)
def test_odd_pictures(tmp_path: Path, folder: Path) -> None:
    check_pictures(tmp_path, pictures_in("odd") + pictures_in("photos/images")[:100])


@pytest.mark.slow
def test_every_picture(tmp_path: Path) -> None:
    files = pictures_in("photos/images", "flickr8k/images", "odd")
    assert len(files) >= 343 + 7000
    check_pictures(tmp_path, files)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for folder in CLIP_FOLDERS for path in sorted((DATA / folder).glob("*")) if path.suffix in CLIPS],
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_stored_frames_are_those_of_ffmpeg(path: Path) -> None:
    if path.name in BROKEN_CLIPS:
        with pytest.raises(MediaError):
            pack_video(path.read_bytes(), 64, 95, 4)
        return
    packed = pack_video(path.read_bytes(), 64, 95, 4)
    frames, seconds = shown_frames(path, packed.width, packed.height)
    lasts = seconds[-1] + step_of(seconds)
    assert packed.duration == pytest.approx(lasts, abs=max(step_of(seconds), *np.diff(seconds), 0.04) + 0.03)
    assert packed.times == tuple(number / 4 for number in range(math.ceil(packed.duration * 4 - 1e-5)))
    for time, jpeg in zip(packed.times, packed.jpegs):
        stored = simplejpeg.decode_jpeg(jpeg, "RGB").astype(int)
        last = np.searchsorted(seconds, time + 1e-3, side="right") - 1  # some headers round time stamps
        near = [place for place in (last, np.searchsorted(seconds, time - 1e-3, side="right") - 1) if place >= 0]
        distance = min(difference(stored - frames[place]) for place in near)
        assert distance < 4, f"{distance:.1f} grey levels at {time} s"
