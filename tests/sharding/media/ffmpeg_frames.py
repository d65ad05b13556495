"""The frames that the ffmpeg program shows of a clip: a decoder independent of the code under test."""

import re
import subprocess
from pathlib import Path

import numpy as np
from needs import module

SHOWN = re.compile(rb" pts_time:(-?[\d.]+)")
GREY = np.array([0.299, 0.587, 0.114])


def ffmpeg(*words: object) -> subprocess.CompletedProcess[bytes]:
    """Run the program to its end."""
    start = [module("imageio_ffmpeg", "imageio-ffmpeg").get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-y"]
    return subprocess.run([*start, *map(str, words)], capture_output=True, check=True)


def shown_times(path: Path) -> np.ndarray:
    """Seconds (N,) from which on each frame is shown, in order, the first at 0."""
    done = ffmpeg("-i", path, "-an", "-sn", "-vf", "showinfo", "-fps_mode", "passthrough", "-f", "null", "-")
    seconds = np.sort(times_in(done.stderr))
    return seconds - seconds[0]


def shown_frames(path: Path, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """All frames (N, H, W, 3), and the seconds (N,) from which on they are shown, in order, the first at 0."""
    words = ["-i", path, "-an", "-sn", "-vf", f"showinfo,scale={width}:{height}:flags=area"]
    done = ffmpeg(*words, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    seconds = times_in(done.stderr)[: len(frames)]
    order = np.argsort(seconds, kind="stable")
    return frames[order], seconds[order] - seconds.min()


def times_in(text: bytes) -> np.ndarray:
    return np.array([float(value) for value in SHOWN.findall(text)])


def step_of(seconds: np.ndarray) -> float:
    """Seconds that a clip's last frame is shown: as long as most of the others."""
    return float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.04


def difference(pixels: np.ndarray) -> float:
    """Grey levels between two pictures: of brightness at each place, of each colour on average."""
    return max(np.abs(pixels @ GREY).mean(), np.abs(pixels.mean((0, 1))).max())
