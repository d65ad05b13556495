"""MP4 files whose edit list hides their beginning, or shows it later: what a player shows is stored."""

from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
from ffmpeg_frames import difference, ffmpeg, shown_frames, step_of

from sharding.media.video import pack_video

RATE, SECONDS = 10, 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip that brightens by 2 grey levels a frame; a key frame every 4 seconds, the others need two neighbours."""
    path = tmp_path_factory.mktemp("edit") / "whole.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": "40", "bf": "2", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(RATE * SECONDS):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), brightness(number), np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def brightness(number: float) -> float:
    """Of a frame of the whole clip."""
    return 8 + 2 * number


def edited(whole: Path, folder: Path, *words: str) -> Path:
    """The clip's packets copied as they are; the edit list alone says what is shown."""
    ffmpeg(*words, "-i", whole, "-c", "copy", folder / "edited.mp4")
    assert b"elst" in (folder / "edited.mp4").read_bytes()
    return folder / "edited.mp4"


def stored_brightness(path: Path, fps: float, start: float = 0.0, end: float = float("inf")) -> list[float]:
    packed = pack_video(path.read_bytes(), 48, 95, fps, 0, start, end)
    assert list(packed.times) == [number / fps for number in range(len(packed.jpegs))]
    return [float(simplejpeg.decode_jpeg(jpeg, "RGB").mean()) for jpeg in packed.jpegs]


@pytest.mark.parametrize("cut", ["1.3", "5.0", "7.9"])
def test_a_beginning_that_is_cut_off_without_decoding_is_not_stored(whole: Path, tmp_path: Path, cut: str) -> None:
    path = edited(whole, tmp_path, "-ss", cut)
    with av.open(str(path)) as container:
        hidden = sum(1 for packet in container.demux(video=0) if packet.is_discard)
    assert hidden > 5  # they are in the file
    first = round(float(cut) * RATE)
    expected = [brightness(number) for number in range(first, RATE * SECONDS, 5)]
    assert stored_brightness(path, fps=2) == pytest.approx(expected, abs=2)


def test_a_part_of_a_clip_counts_from_what_is_shown_first(whole: Path, tmp_path: Path) -> None:
    path = edited(whole, tmp_path, "-ss", "1.3")
    expected = [brightness(number) for number in range(13 + 70, 13 + 90, 5)]
    assert stored_brightness(path, fps=2, start=7.0, end=9.0) == pytest.approx(expected, abs=2)


def test_a_beginning_that_is_put_off_does_not_shift_the_frames(whole: Path, tmp_path: Path) -> None:
    path = edited(whole, tmp_path, "-itsoffset", "2.5")
    assert stored_brightness(path, fps=2) == stored_brightness(whole, fps=2)


@pytest.mark.parametrize("words", [("-ss", "1.3"), ("-ss", "6.2", "-t", "3"), ("-itsoffset", "2.5")])
def test_frames_and_duration_are_those_of_ffmpeg(whole: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    path = edited(whole, tmp_path, *words)
    packed = pack_video(path.read_bytes(), 48, 95, 5)
    frames, seconds = shown_frames(path, packed.width, packed.height)
    assert packed.duration == pytest.approx(seconds[-1] + step_of(seconds), abs=0.051)
    for time, jpeg in zip(packed.times, packed.jpegs, strict=True):
        shown = frames[np.searchsorted(seconds, time + 1e-3, side="right") - 1].astype(int)
        assert difference(simplejpeg.decode_jpeg(jpeg, "RGB") - shown) < 2
