"""Video files to the JPEG frames that are stored: chosen by time stamp, shrunk, encoded."""

from __future__ import annotations

import io
import itertools
import math
import mmap
from collections.abc import Iterator

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from sharding.media.frames import Frames, MediaError, encode, stored_size

SEEK_BEYOND = 5.0  # seconds; to a start that is nearer a clip is decoded from its beginning


def pack_video(
    data: bytes | mmap.mmap,
    size: int,
    quality: int,
    fps: float,
    max_frames: int = 0,
    start: float = 0.0,
    end: float = math.inf,
) -> Frames:
    """A clip's stored form: the frames on screen 0, 1/fps, 2/fps ... seconds after `start`, before `end`.

    Frames are chosen by time stamp, so variable frame rates keep their timing; seconds count from the first frame.
    `max_frames` 0: no limit; what lies behind the last frame wanted is not decoded.

    Raises:
        MediaError: the bytes hold no video, or less than half of what the file promises decodes.
    """
    if not len(data):
        raise MediaError("empty file")
    try:
        source = data if isinstance(data, mmap.mmap) else io.BytesIO(data)
        with av.open(source, mode="r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError("no video stream")
            clip = Clip(container)
            frames = sample_clip(clip, size, quality, fps, max_frames, start, end)
            check_complete(clip, end)
            return frames
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"unreadable video: {getattr(error, 'strerror', None) or error}") from None


def sample_clip(clip: Clip, size: int, quality: int, fps: float, max_frames: int, start: float, end: float) -> Frames:
    """The stored frames of an open clip; raises MediaError when there is none."""
    jpegs: list[bytes] = []
    times: list[float] = []
    shape = (0, 0)
    last = 0.0
    for frame, until in clip.shown(start):
        last = min(until, end) - start
        wanted = 0
        while (len(times) + wanted) / fps < last - 1e-6 and not (max_frames and len(times) + wanted >= max_frames):
            wanted += 1
        if wanted:
            pixels = clip.picture(frame, size)
            if jpegs and pixels.shape[:2] != shape:  # some streams change their size on the way
                pixels = cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA)
            shape = pixels.shape[:2]
            times += [(len(times) + number) / fps for number in range(wanted)]
            jpegs += [encode(pixels, quality)] * wanted
        if until >= end or (max_frames and len(times) >= max_frames):
            last = min(max(clip.promised, until), end) - start
            break
    if not jpegs:
        raise MediaError("no frame decodes" if start <= 0 else f"no frame at {start:g} seconds or later")
    return Frames(jpegs, shape[1], shape[0], fps, last, tuple(times))


def check_complete(clip: Clip, end: float) -> None:
    """Refuse a clip of which damage left less than half."""
    promised = min(clip.promised, end)
    if clip.broken and clip.reached < promised / 2:
        raise MediaError(f"damaged video: only a part decodes ({clip.broken})")


class Clip:
    """An open video: its frames with the seconds they are shown until, past broken packets."""

    def __init__(self, container: av.container.InputContainer) -> None:
        self.container = container
        self.stream = container.streams.video[0]
        self.stream.thread_type = "NONE"  # processes decode side by side, one clip each
        self.unit = float(self.stream.time_base or 0)
        self.step = 1.0 / float(self.stream.average_rate or self.stream.guessed_rate or 25)
        self.reformatter = VideoReformatter()
        self.broken = ""  # the decoder's complaint about the first broken packet
        self.reached = 0.0  # seconds decoded

    @property
    def promised(self) -> float:
        """Seconds that the header says the clip lasts; 0 when it says nothing."""
        if self.stream.duration and self.unit:
            return float(self.stream.duration * self.unit)
        return (self.container.duration or 0) / av.time_base

    def shown(self, start: float = 0.0) -> Iterator[tuple[av.VideoFrame, float]]:
        """(frame, second until it is shown) in order of time, of frames shown later than `start`."""
        frames = self.decoded()
        held = next(frames, None)
        if held is None:
            return
        origin = self.time_of(held, 0.0)
        begin = 0.0
        if start > SEEK_BEYOND:
            frames = self.decoded_from(origin + start)
        for frame in frames:
            now = self.time_of(frame, origin + begin + self.step) - origin
            if now > begin:
                begin, held, before = now, frame, held
                if begin > start:
                    yield before, begin
            self.reached = begin
        self.reached = begin + self.step
        if self.reached > start:
            yield held, self.reached

    def time_of(self, frame: av.VideoFrame, otherwise: float) -> float:
        """A frame's time stamp in seconds."""
        return frame.pts * self.unit if frame.pts is not None and self.unit else otherwise

    def decoded_from(self, seconds: float) -> Iterator[av.VideoFrame]:
        """Frames from a key frame before a time stamp on; all of them where the container cannot seek well."""
        self.container.seek(int(seconds / self.unit), stream=self.stream)
        frames = (frame for frame in self.decoded() if frame.pts is not None)
        first = next(frames, None)
        if first is None or self.time_of(first, math.inf) > seconds:
            self.container.seek(0, stream=self.stream)
            return self.decoded()
        return itertools.chain([first], frames)

    def picture(self, frame: av.VideoFrame, size: int) -> np.ndarray:
        """RGB pixels (H, W, 3) of a frame, upright, its shorter side at most `size`: colours and scale in one go."""
        width, height = stored_size(frame.width, frame.height, size)
        converted = self.reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
        return np.ascontiguousarray(np.rot90(converted.to_ndarray(), round(frame.rotation / 90) % 4))

    def decoded(self) -> Iterator[av.VideoFrame]:
        """Frames in the order of the decoder; broken packets are passed over."""
        for packet in self.container.demux(self.stream):
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                self.broken = self.broken or str(error.strerror)
