"""Everything beside the checkout packed at once: each file is stored as another decode shows it, or its fault named."""

import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ffmpeg_frames import shown_times, step_of
from PIL import Image, ImageOps
from test_real_media import BROKEN_CLIPS, BROKEN_PICTURES, DATA, PICTURES

from sharding.build import main
from sharding.shards.schema import read_corpus, read_index
from sharding.shards.verification import verify_corpus

FPS, SIZE = 4, 96
FOLDERS = {
    "image": ["photos/images", "flickr8k/images", "odd"],
    "video": ["videos/media", "clips/videos", "videos/odd", "odd"],
}

pytestmark = [pytest.mark.shared, pytest.mark.slow]


def files(media_type: str) -> list[str]:
    """Every file of the folders, relative to DATA; a video named .jpg is a clip."""
    found = [path for folder in FOLDERS[media_type] for path in sorted((DATA / folder).rglob("*")) if path.is_file()]
    pictures = media_type == "image"
    kept = [path for path in found if (path.suffix in PICTURES and path.name != "not_a_video.jpg") == pictures]
    # A .gif is a picture in odd/ and a clip among the videos.
    gifs = [path for path in found if path.suffix == ".gif" and path.parent.name == "media"]
    return [str(path.relative_to(DATA)) for path in (kept if pictures else [*kept, *gifs]) if path.suffix != ".md"]


def packed(tmp_path: Path, media_type: str, sources: list[str]) -> tuple[dict[str, dict], dict[str, str]]:
    """Index rows and reasons of failures by source, of a build by the command line, every byte verified."""
    (tmp_path / "a.json").write_text(json.dumps([{media_type: source, "caption": source} for source in sources]))
    words = ["--annotations", str(tmp_path / "a.json"), "--media-root", str(DATA), "--media-type", media_type]
    words += ["--size", str(SIZE), "--fps", str(FPS), "--output", str(tmp_path / "out"), "--max-failures", "0.2"]
    assert main([*words, "--workers", "2"]) == 0
    assert not verify_corpus(str(tmp_path / "out"), decode=True)
    corpus = read_corpus(str(tmp_path / "out"))
    rows = {row["source"]: row for shard in range(len(corpus.shards)) for row in read_index(corpus, shard).to_pylist()}
    failures = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    return rows, {row["source"]: row["reason"] for row in failures}


def named(sources: list[str], broken: dict[str, str]) -> dict[str, str]:
    """The broken ones of some files, with the reasons that they must have."""
    return {source: broken[Path(source).name] for source in sources if Path(source).name in broken}


def check_failures(failures: dict[str, str], expected: dict[str, str]) -> None:
    assert set(failures) == set(expected)
    assert all(re.match(expected[source], reason) for source, reason in failures.items()), failures


def test_every_picture(tmp_path: Path) -> None:
    sources = files("image")
    assert len(sources) >= 343 + 7000
    rows, failures = packed(tmp_path, "image", sources)
    check_failures(failures, named(sources, BROKEN_PICTURES))
    assert set(rows) | set(failures) == set(sources)
    for source, row in rows.items():
        with Image.open(DATA / source) as image:
            width, height = ImageOps.exif_transpose(image).size
        scale = min(1, SIZE / min(width, height))
        assert (row["width"], row["height"]) == (max(1, round(width * scale)), max(1, round(height * scale))), source
        assert len(row["offsets"]) == 1
        assert row["captions"] == [source]


def test_every_clip(tmp_path: Path) -> None:
    sources = files("video")
    assert len(sources) >= 59 + 18 + 5
    rows, failures = packed(tmp_path, "video", sources)
    check_failures(failures, named(sources, BROKEN_CLIPS))
    assert set(rows) | set(failures) == set(sources)
    for source, row in rows.items():
        seconds = shown_times(DATA / source)
        lasts = seconds[-1] + step_of(seconds)
        slack = max(step_of(seconds), float(max(seconds[1:] - seconds[:-1], default=0.04))) + 0.02
        assert row["duration"] == pytest.approx(lasts, abs=slack), source
        assert len(row["offsets"]) == math.ceil(row["duration"] * FPS - 1e-5), source
        assert row["frame_times"] == [number / FPS for number in range(len(row["offsets"]))], source
