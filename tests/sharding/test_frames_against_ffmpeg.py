"""Stored frames of every real clip are those that the ffmpeg program shows at the same seconds."""

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import simplejpeg

from sharding.media import MediaError, pack_video

DATA = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data"
FOLDERS = ["clips/videos", "videos/media", "videos/odd", "odd"]
CLIPS = {".mp4", ".mkv", ".avi", ".mov", ".webm", ".mpg", ".mpeg", ".wmv", ".gif"}
FPS, SIZE = 4, 64
SHOWN = re.compile(rb" pts_time:(-?[\d.]+)")
GREY = np.array([0.299, 0.587, 0.114])
BROKEN = {"audio_only.mp4", "audio_only_aac.mp4", "empty.mp4", "truncated_header.mp4", "truncated_middle.mp4"}
DAMAGED = {"corrupted.mp4"}  # what a decoder makes of broken packets is its own affair

pytestmark = [pytest.mark.shared, pytest.mark.slow]
PATHS = [path for folder in FOLDERS for path in sorted((DATA / folder).glob("*")) if path.suffix in CLIPS]


def shown_by_ffmpeg(path: Path, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """All frames (N, H, W, 3) of a clip, and the seconds (N,) from which on they are shown, the first at 0."""
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-i", str(path), "-map", "0:v:0"]
    words += ["-vf", f"showinfo,scale={width}:{height}:flags=area", "-fps_mode", "passthrough"]
    done = subprocess.run([*words, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"], capture_output=True, check=True)
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    seconds = np.array([float(value) for value in SHOWN.findall(done.stderr)])[: len(frames)]
    return frames, seconds - seconds.min()


def difference(pixels: np.ndarray) -> float:
    """Grey levels between two pictures: of brightness at each place, of each colour on average."""
    return max(np.abs(pixels @ GREY).mean(), np.abs(pixels.mean((0, 1))).max())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_frame_on_screen_is_stored(path: Path) -> None:
    if path.name in BROKEN:
        with pytest.raises(MediaError):
            pack_video(path.read_bytes(), SIZE, 95, FPS)
        return
    packed = pack_video(path.read_bytes(), SIZE, 95, FPS)
    if path.name in DAMAGED:
        return
    frames, seconds = shown_by_ffmpeg(path, packed.width, packed.height)
    order = np.argsort(seconds, kind="stable")
    frames, seconds = frames[order], seconds[order]
    step = np.median(np.diff(seconds)) if len(seconds) > 1 else 0.04
    assert abs(len(packed.times) - (seconds[-1] + step) * FPS) <= 1.5
    for time, jpeg in zip(packed.times, packed.jpegs):
        stored = simplejpeg.decode_jpeg(jpeg, "RGB").astype(int)
        last = np.searchsorted(seconds, time + 1e-3, side="right") - 1  # some headers round time stamps
        near = [place for place in (last, np.searchsorted(seconds, time - 1e-3, side="right") - 1) if place >= 0]
        distance = min(difference(stored - frames[place]) for place in near)
        assert distance < 4, f"{distance:.1f} grey levels at {time} s"
