"""Real photos and clips beside the checkout: frame counts against an independent decode, broken ones named."""

import csv
import json
from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest
from places import SHARED

from sharding.build import build_corpus
from sharding.shards.schema import Corpus, read_index
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

pytestmark = pytest.mark.shared
present = [name for name in MEDIA if MEDIA[name].is_dir()]
odd = [DATA / "odd"] if (DATA / "odd").is_dir() else []


def pack(tmp_path: Path, root: Path, records: list[dict], media_type: str, **settings) -> tuple[Corpus, dict, dict]:
    """The corpus, its index rows by source, and the reasons of failures by source."""
    (tmp_path / "a.json").write_text(json.dumps(records))
    output = str(tmp_path / "out")
    options = {"size": 96, "workers": 1, "max_failures": 1.0} | settings
    corpus = build_corpus([str(tmp_path / "a.json")], str(root), media_type, output, **options)
    assert not verify_corpus(output, decode=True)
    rows = {row["source"]: row for shard in range(len(corpus.shards)) for row in read_index(corpus, shard).to_pylist()}
    failures = {row["source"]: row["reason"] for row in pq.read_table(f"{output}/failures.parquet").to_pylist()}
    return corpus, rows, failures


def shown_times(path: Path) -> list[float]:
    """Seconds of a clip's frames from its first on, by a decode of its own."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = sorted(
            float(frame.pts * stream.time_base) for frame in container.decode(stream) if frame.pts is not None
        )
    return [time - times[0] for time in times]


@pytest.mark.parametrize("name", present)
def test_every_real_clip_is_packed_with_as_many_frames_as_it_lasts(tmp_path: Path, name: str) -> None:
    with open(DATA / name / "clips.tsv") as file:
        facts = list(csv.DictReader(file, delimiter="\t"))
    records = [{"image": fact["file"], "caption": "x"} for fact in facts]
    _, rows, failures = pack(tmp_path, MEDIA[name], records, "video", fps=2)
    assert not failures
    for fact in facts:
        row = rows[fact["file"]]
        seconds = float(fact["seconds"])
        assert row["duration"] == pytest.approx(seconds, abs=0.15, rel=0.02), fact["file"]
        assert abs(len(row["offsets"]) - seconds * 2) <= 1, fact["file"]
        assert row["frame_times"] == [number / 2 for number in range(len(row["offsets"]))]
        turned = fact.get("rotation", "0") in ("90", "270", "-90")
        wide = int(fact["width"]) >= int(fact["height"])
        assert (row["width"] >= row["height"]) == (wide != turned), fact["file"]
        assert min(row["width"], row["height"]) == min(96, int(fact["width"]), int(fact["height"]))


@pytest.mark.parametrize("name", present)
def test_a_frame_cap_keeps_the_first_frames_and_the_duration(tmp_path: Path, name: str) -> None:
    files = sorted(path.name for path in MEDIA[name].iterdir())[:6]
    records = [{"video": file, "caption": "x"} for file in files]
    (tmp_path / "all").mkdir()
    (tmp_path / "capped").mkdir()
    _, whole, _ = pack(tmp_path / "all", MEDIA[name], records, "video", fps=2)
    _, capped, _ = pack(tmp_path / "capped", MEDIA[name], records, "video", fps=2, max_frames=3)
    for file in files:
        assert capped[file]["crc32s"] == whole[file]["crc32s"][:3]
        assert capped[file]["duration"] == pytest.approx(whole[file]["duration"], abs=0.15, rel=0.02)


@pytest.mark.parametrize("name", present)
def test_parts_of_clips(tmp_path: Path, name: str) -> None:
    facts = csv.DictReader((DATA / name / "clips.tsv").read_text().splitlines(), delimiter="\t")
    long = [MEDIA[name] / fact["file"] for fact in facts if 9 < float(fact["seconds"]) < 20][:4]
    records = [{"video": path.name, "caption": "x"} for path in long]
    records += [{"video": path.name, "start": 6, "end": 8, "caption": "y"} for path in long]
    _, rows, failures = pack(tmp_path, MEDIA[name], records, "video", fps=4, quality=95)
    assert not failures
    for path in long:
        part, whole = rows[f"{path.name}#t=6,8"], rows[path.name]
        assert part["crc32s"] == whole["crc32s"][24:32], path.name
        assert part["duration"] == pytest.approx(2)


@pytest.mark.parametrize("folder", odd)
def test_odd_pictures(tmp_path: Path, folder: Path) -> None:
    files = sorted(path.name for path in folder.iterdir() if path.suffix in PICTURES and path.name != "not_a_video.jpg")
    _, rows, failures = pack(tmp_path, folder, [{"image": file, "caption": "x"} for file in files], "image", size=80)
    assert set(failures) == set(BROKEN_PICTURES)
    assert all(failures[file].startswith(reason) for file, reason in BROKEN_PICTURES.items())
    assert len(rows) + len(failures) == len(files)
    assert rows["exif_rotated.jpg"]["height"] > rows["exif_rotated.jpg"]["width"]
    assert rows["one_pixel.png"]["width"] == 1


@pytest.mark.parametrize("folder", odd)
def test_odd_clips(tmp_path: Path, folder: Path) -> None:
    paths = [path for path in folder.iterdir() if path.suffix not in PICTURES or path.name == "not_a_video.jpg"]
    paths += [path for path in (DATA / "videos" / "odd").glob("*.*") if path.suffix != ".md"]
    records = [{"image": str(path.relative_to(DATA)), "caption": "x"} for path in sorted(paths)]
    _, rows, failures = pack(tmp_path, DATA, records, "video", fps=10)
    assert {Path(source).name for source in failures} == {path.name for path in paths} & set(BROKEN_CLIPS)
    assert all(reason.startswith(BROKEN_CLIPS[Path(source).name]) for source, reason in failures.items())
    assert len(rows) + len(failures) == len(paths)
    for source, row in rows.items():
        times = shown_times(DATA / source) if Path(source).name != "corrupted.mp4" else [4.9]
        assert abs(len(row["offsets"]) - (times[-1] + 0.1) * 10) <= 2, source
    shapes = {Path(source).name: (row["width"], row["height"]) for source, row in rows.items()}
    assert shapes["video_90.mov"] == shapes["video_270.mov"] == shapes["video_0.mov"][::-1]


@pytest.mark.parametrize("name", [name for name in ("photos", "flickr8k") if (DATA / name).is_dir()])
def test_real_photos(tmp_path: Path, name: str) -> None:
    file = DATA / name / ("photos_val.json" if name == "photos" else "val.json")
    records = json.loads(file.read_text())[:100]
    corpus, rows, failures = pack(tmp_path, DATA / name / "images", records, "image", size=224)
    assert not failures
    assert corpus.samples == len({record["image"] for record in records})
    assert sum(corpus.counts("captions")) == sum(len(record["caption"]) for record in records)
    assert all(row["captions"] for row in rows.values())
