"""Stored frames of every real clip are those that the ffmpeg program shows at the same seconds."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from ffmpeg_frames import difference, shown_frames, step_of
from places import SHARED

from sharding.media.frames import MediaError
from sharding.media.video import pack_video

DATA = SHARED / "data"
FOLDERS = ["clips/videos", "videos/media", "videos/odd", "odd"]
CLIPS = {".mp4", ".mkv", ".avi", ".mov", ".webm", ".mpg", ".mpeg", ".wmv", ".gif"}
FPS, SIZE = 4, 64
BROKEN = {"audio_only.mp4", "audio_only_aac.mp4", "empty.mp4", "truncated_header.mp4", "truncated_middle.mp4"}

pytestmark = [pytest.mark.shared, pytest.mark.slow]
PATHS = [path for folder in FOLDERS for path in sorted((DATA / folder).glob("*")) if path.suffix in CLIPS]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_frame_on_screen_is_stored(path: Path) -> None:
    if path.name in BROKEN:
        with pytest.raises(MediaError):
            pack_video(path.read_bytes(), SIZE, 95, FPS)
        return
    packed = pack_video(path.read_bytes(), SIZE, 95, FPS)
    frames, seconds = shown_frames(path, packed.width, packed.height)
    assert abs(len(packed.times) - (seconds[-1] + step_of(seconds)) * FPS) <= 1.5
    for time, jpeg in zip(packed.times, packed.jpegs):
        stored = simplejpeg.decode_jpeg(jpeg, "RGB").astype(int)
        last = np.searchsorted(seconds, time + 1e-3, side="right") - 1  # some headers round time stamps
        near = [place for place in (last, np.searchsorted(seconds, time - 1e-3, side="right") - 1) if place >= 0]
        distance = min(difference(stored - frames[place]) for place in near)
        assert distance < 4, f"{distance:.1f} grey levels at {time} s"
