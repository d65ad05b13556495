"""Shapes: the same seed gives the same bytes, and motion cannot be read from one frame."""

import hashlib
import json
from pathlib import Path

import av
import pytest

from runtime.errors import UserError
from sharding.shapes import write_shapes
from sharding.shapes.scenes import MOTIONS, Clip, clip_of, image_scene
from sharding.shapes.texts import appearance_caption, motion_caption


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    one = write_shapes(tmp_path / "one", images=70, clips=3, test_items=3, size=32, seed=5, workers=1)
    two = write_shapes(tmp_path / "two", images=70, clips=3, test_items=3, size=32, seed=5, workers=2)
    other = write_shapes(tmp_path / "other", images=70, clips=3, test_items=3, size=32, seed=6)
    assert digest(one) == digest(two)
    assert digest(one) != digest(other)


def test_a_larger_corpus_begins_with_the_smaller_one(tmp_path: Path) -> None:
    small = write_shapes(tmp_path / "small", images=5, clips=2, test_items=0, size=32)
    large = write_shapes(tmp_path / "large", images=9, clips=3, test_items=0, size=32)
    media = {name: value for name, value in digest(small).items() if name.startswith("media")}
    assert media.items() <= digest(large).items()


@pytest.mark.parametrize("motion", MOTIONS, ids=lambda motion: f"{motion.kind}-{motion.direction}")
def test_a_motion_and_its_reverse_show_the_same_frames(motion) -> None:
    scene = clip_of(0, 0, 7, groups=False).scene
    forward, backward = Clip(scene, motion, 0.3), Clip(scene, motion.reverse, 0.3)
    shares = [(number + 0.25) / 40 for number in range(40)]
    there = sorted(repr(rounded(forward.at(share))) for share in shares)
    back = sorted(repr(rounded(backward.at(1 - share))) for share in shares)
    assert there == back
    assert motion_caption(forward) != motion_caption(backward)
    assert appearance_caption(forward) == appearance_caption(backward)
    assert motion.reverse.reverse == motion


def rounded(scene) -> list[tuple]:
    return [(t.shape, t.colour, t.size, round(t.x, 6), round(t.y, 6)) for t in scene.things]


def test_test_clips_come_in_groups_that_differ_in_motion_only() -> None:
    for first in range(0, 32, 4):
        clips = [clip_of(0, 1, first + number, groups=True) for number in range(4)]
        movers = {(t.shape, t.colour, t.size) for t in (clip.scene.things[0] for clip in clips)}
        assert len(movers) == 1
        assert len({clip.motion for clip in clips}) == 4


def test_splits_differ() -> None:
    train = {repr(image_scene(0, 0, number)) for number in range(200)}
    assert not train & {repr(image_scene(0, 1, number)) for number in range(200)}


def test_files_have_the_official_forms_and_clips_are_h264(shapes) -> None:
    for file in shapes.folder.glob("*.json"):
        records = json.loads(file.read_text())
        if file.name == "answer_list.json":
            answers = set(records)
            continue
        assert all((shapes.folder / "media" / (record.get("image") or record["video"])).exists() for record in records)
    for name in ("qa_train", "qa_test"):
        assert {record["answer"] for record in json.loads((shapes.folder / f"{name}.json").read_text())} <= answers
    for record in json.loads((shapes.folder / "mc_test.json").read_text()):
        assert len(set(record["caption"])) == 5
        assert 0 <= record["answer"] < 5
    with av.open(str(next((shapes.folder / "media" / "clips").rglob("*.mp4")))) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 12


@pytest.mark.parametrize("name", ["images_test", "clips_test_appearance", "clips_test_motion"])
def test_test_captions_are_nearly_unique(name: str) -> None:
    clips = [clip_of(0, 1, number, groups=True) for number in range(256)]
    texts = {
        "images_test": lambda: [repr(image_scene(0, 1, number)) for number in range(256)],
        "clips_test_appearance": lambda: [appearance_caption(clip) for clip in clips],
        "clips_test_motion": lambda: [motion_caption(clip) for clip in clips],
    }[name]()
    assert len(set(texts)) >= 0.95 * 256


def test_impossible_sizes_and_used_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--size must be even"):
        write_shapes(tmp_path / "odd", size=33)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        write_shapes(tmp_path / "used")
