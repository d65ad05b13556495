"""Video files to the JPEG frames that are stored: one stream, as a player shows it, chosen by time stamp."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterator, Mapping
from typing import cast

import av
import cv2
import numpy as np
from av.buffer import Buffer
from av.container import Flags as ContainerFlags
from av.format import Flags
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from sharding.media.clock import Clock, FrameTimes
from sharding.media.frames import Frames, MediaError, encode, stored_size

LONGEST_STILL = 24 * 3600  # seconds that a frame may stay on screen; beyond that a time stamp is damaged
SEEK_BEYOND = 5.0  # seconds; to a start that is nearer a clip is decoded from its beginning
# Containers with an index and with time stamps that do not depend on what was read before. In all others a seek fails
# (raw streams), or lands by a clock that may wrap or restart (MPEG-TS, MPEG-PS).
SEEKABLE = {"mov", "matroska"}
GENERATE_TIMES = cast(int, ContainerFlags.gen_pts.value)
WIDEST_PIXEL = 10  # a sample aspect ratio beyond 1:10 or 10:1 is damage


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

    Raises MediaError: the bytes have no video, or less than half of what the file promises decodes.
    """
    if not len(data):
        raise MediaError("empty file")
    try:
        with open_container(data) as container:
            clip = Clip(container)
            frames = sample_clip(clip, size, quality, fps, max_frames, start, end)
            check_complete(clip, end)
            return frames
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
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
            if wanted > 1 + LONGEST_STILL * fps:
                raise MediaError("unreadable video: by its time stamps one frame is shown for more than a day")
        if wanted:
            pixels = clip.picture(frame, size)
            if jpegs and pixels.shape[:2] != shape:  # some streams change their size on the way
                pixels = cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA)
            shape = pixels.shape[:2]
            times += [(len(times) + number) / fps for number in range(wanted)]
            jpegs += [encode(pixels, quality)] * wanted
        if until >= end or (max_frames and len(times) >= max_frames):
            last = (end if until >= end else min(max(clip.length(end), until), end)) - start
            break
    if not jpegs:
        raise MediaError("no frame can be decoded" if start <= 0 else f"no frame at {start:g} seconds or later")
    return Frames(jpegs, shape[1], shape[0], fps, last, tuple(times))


def check_complete(clip: Clip, end: float) -> None:
    """Refuse a clip of which damage left less than half."""
    promised = min(clip.promised, end)
    if clip.broken and clip.reached < promised / 2:
        raise MediaError(f"damaged video: only a part decodes ({clip.broken})")


class Reader:
    """A file object over bytes or a mapped file, with its own position; nothing is copied as a whole."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def read(self, count: int) -> bytes:
        """The next bytes; none at the end and beyond it."""
        piece = self.data[self.position : self.position + count]
        self.position += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        """The new position, which may lie beyond the end as in any file; -1 where it would lie before the beginning."""
        position = offset + (0, self.position, len(self.data))[whence]
        if position < 0:
            return -1  # FFmpeg takes it for an error of this seek; an exception would end the decoding
        self.position = position
        return position

    def tell(self) -> int:
        """The position."""
        return self.position


def open_container(data: bytes | mmap.mmap) -> av.container.InputContainer:
    """Open a video file's bytes. Nothing else is opened, whatever they name: a playlist is not a video.

    Raises MediaError: FFmpeg knows no such container.
    """
    closed = {"protocol_whitelist": "none"}  # playlists, SDP, references to other files: no protocol that reads them
    try:
        return av.open(Reader(data), mode="r", metadata_errors="replace", container_options=closed)
    except (av.ArgumentError, PermissionError):
        raise MediaError("unreadable video: damaged, or it names other files, which are not opened") from None


def choose_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The stream that the ffmpeg program takes: the default one, then the largest; covers and thumbnails are none.

    Raises MediaError: there is no video, or no decoder for it.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError("no video stream")
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise MediaError("unreadable video: no decoder for its codec")
    return max(decodable, key=stream_rank)


def stream_rank(stream: av.VideoStream) -> float:
    """The rank of a video stream as in the ffmpeg program; the first of equal ones is used."""
    default = bool(stream.disposition & Disposition.default)
    return stream.width * stream.height + 5_000_000 * default + 100_000_000 * bool(stream.frames)


class Clip:
    """An open video: its frames with the seconds they are shown until, past broken packets."""

    def __init__(self, container: av.container.InputContainer) -> None:
        self.container = container
        self.stream = choose_stream(container)
        self.stream.thread_type = "NONE"  # processes decode side by side, one clip each
        self.unit = float(self.stream.time_base or 0)
        container.flags &= ~GENERATE_TIMES  # PyAV's default; invents wrong ones for H.264 in AVI
        flags = Flags(container.format.flags)
        self.restarts = Flags.ts_discont in flags
        self.stamped = Flags.no_timestamps not in flags
        self.clock, self.times = Clock(self.stream, self.restarts), FrameTimes()
        self.coded_pixel = self.stream.codec_context.sample_aspect_ratio
        self.reformatter = VideoReformatter()
        self.broken = ""  # the decoder's complaint about the first broken packet
        self.reached = 0.0  # seconds decoded
        self.origin = 0.0  # time stamp of the first frame in seconds

    @property
    def promised(self) -> float:
        """The clip's duration in seconds by its header; 0 if it has none, or if time stamps jump."""
        if self.restarts:
            return 0.0
        if self.stream.duration and self.unit:
            return float(self.stream.duration * self.unit)
        return (self.container.duration or 0) / av.time_base

    def length(self, end: float) -> float:
        """Seconds that the clip lasts, of which not all is decoded: by the stream's header, else by its packets.

        Packets are read no further than to `end`.
        """
        if self.stream.duration and not self.restarts:
            return self.promised
        for _ in self.packets():
            if self.lasts >= end:
                break
        return self.lasts

    @property
    def lasts(self) -> float:
        """Seconds from the first frame to the end of the last packet that was read."""
        return self.clock.end / self.clock.second - self.origin

    def shown(self, start: float = 0.0) -> Iterator[tuple[av.VideoFrame, float]]:
        """(frame, second until it is shown) in order of time, of frames shown later than `start`."""
        frames = self.decoded()
        held = next(frames, None)
        if held is None:
            return
        self.origin = self.time_of(held, 0.0)
        begin, lasts = 0.0, self.duration_of(held, 0.0)
        if start > SEEK_BEYOND and SEEKABLE & set(self.container.format.name.split(",")):
            frames = self.decoded_from(self.origin + start)
        for frame in frames:
            now = self.time_of(frame, self.origin + begin + lasts) - self.origin
            if now > begin:
                before, lasts = held, self.duration_of(frame, now - begin)
                begin, held = now, frame
                if begin > start:
                    yield before, begin
            self.reached = begin
        self.reached = begin + lasts
        if self.reached > start:
            yield held, self.reached

    def time_of(self, frame: av.VideoFrame, otherwise: float) -> float:
        """A frame's time stamp in seconds; once for each frame, in order."""
        stamp = self.times.best(frame)
        return stamp * self.unit if stamp is not None and self.unit else otherwise

    def duration_of(self, frame: av.VideoFrame, after: float) -> float:
        """Seconds that the last frame is shown, estimated as by the ffmpeg program; `after`: the one before was."""
        own = frame.duration * self.unit
        guessed = frame.duration == 1 and after > 2 * own
        if own > 0 and self.stamped and not guessed:
            return own
        rate = self.stream.codec_context.framerate
        coded = float(1 / rate) if rate else 0.0
        if coded and not self.stamped:
            return coded
        average = self.stream.average_rate or self.stream.guessed_rate or 25
        return after if after > 0 else own or coded or float(1 / average)

    def decoded_from(self, seconds: float) -> Iterator[av.VideoFrame]:
        """Frames from a key frame before a time stamp on; all of them where the container cannot seek well."""
        if self.seek(int(seconds / self.unit)):
            frames = self.decoded()
            first = next(frames, None)
            if first and first.pts is not None and first.pts * self.unit <= seconds and complete(first):
                return itertools.chain([first], frames)
        if not self.seek(0):
            raise MediaError("unreadable video: it cannot be read a second time")
        return self.decoded()

    def seek(self, stamp: int) -> bool:
        """Go to a time stamp; whether that was possible."""
        try:
            self.container.seek(stamp, stream=self.stream)
        except (av.FFmpegError, OverflowError):
            return False
        self.clock, self.times = Clock(self.stream, self.restarts), FrameTimes()
        return True

    def picture(self, frame: av.VideoFrame, size: int) -> np.ndarray:
        """RGB pixels (H, W, 3) of a frame as shown, its shorter side at most `size`: colours and scale in one go."""
        width, height = stored_size(max(1, round(frame.width * self.pixel_shape())), frame.height, size)
        converted = self.reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
        return np.ascontiguousarray(upright(converted.to_ndarray(), frame))

    def pixel_shape(self) -> float:
        """The pixel aspect ratio: of the container, else of the codec of the current frame."""
        shape, now = self.stream.sample_aspect_ratio, self.stream.codec_context.sample_aspect_ratio
        if now and shape == self.coded_pixel:
            shape = now
        return float(shape) if shape and 1 / WIDEST_PIXEL <= shape <= WIDEST_PIXEL else 1.0

    def packets(self) -> Iterator[av.Packet]:
        """Packets with time stamps that do not jump; where the file cannot be read on, it ends."""
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:  # an empty one would end the decoding
                    self.clock.correct(packet)
                    yield packet
        except av.FFmpegError as error:
            self.broken = self.broken or str(error.strerror)
        except IndexError:  # PyAV, at the end of a damaged file in which a stream appeared on the way
            self.broken = self.broken or "the stream starts in the middle"

    def decoded(self) -> Iterator[av.VideoFrame]:
        """Frames in the order of the decoder; broken packets are skipped."""
        decode = self.stream.codec_context.decode
        for packet in itertools.chain(self.packets(), [None]):  # None: what the decoder still holds
            try:
                yield from decode(packet)
            except av.FFmpegError as error:
                self.broken = self.broken or str(error.strerror)


def complete(frame: av.VideoFrame) -> bool:
    """Whether a frame depends on no earlier one; streams with gradual refresh have stretches without such frames."""
    return frame.key_frame or frame.pict_type not in (PictureType.P, PictureType.B)


def upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Pixels (H, W, 3) turned and mirrored as a frame's display matrix says, to the nearest quarter turn."""
    try:
        found = cast(Mapping[str, Buffer], frame.side_data).get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists no side data of a frame that has a kind unknown to it, such as a photo's EXIF
        return np.rot90(pixels, round(frame.rotation / 90) % 4)
    if found is None:
        return pixels
    # A pixel of column p and row q is shown in column a p + c q, row b p + d q.
    (a, b, _), (c, d, _) = np.frombuffer(bytes(found), np.int32).reshape(3, 3)[:2].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
