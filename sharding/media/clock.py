"""Time stamps of packets and frames as the ffmpeg program corrects them."""

from __future__ import annotations

import math

import av

# The ffmpeg program's dts_delta_threshold and dts_error_threshold in seconds, and its slack for a clock that runs back.
JUMP, NONSENSE, BACK = 10, 30 * 3600, 0.1


class Clock:
    """Makes the time stamps of a stream's packets continuous by the rules of the ffmpeg program.

    In containers whose clock may restart (MPEG-TS, MPEG-PS) a jump of more than 10 seconds, or back, goes on where
    the packet before ended. A frame that was read before and is shown after it shows a real pause: where frames are
    reordered, the ffmpeg program tears that one from the others. In all other containers a pause is real, and only a
    time stamp 30 hours off is dropped.
    """

    def __init__(self, stream: av.VideoStream, restarts: bool) -> None:
        self.restarts = restarts
        self.second = float(1 / stream.time_base) if stream.time_base else 1.0  # in units of the time base
        rate = stream.average_rate or stream.guessed_rate or 25
        self.step = max(1, round(self.second / rate))
        self.offset = 0
        self.started = False
        self.last = self.due = 0  # decoding time of the packet before, and when the next is due
        self.end = 0  # when the last of the packets so far is no longer shown

    def correct(self, packet: av.Packet) -> None:
        """Change a packet's time stamps; packets come in the order of the file."""
        self.shift(packet, self.offset)
        if self.started:
            if self.restarts:
                self.follow(packet)
            else:
                self.drop(packet)
        stamp = packet.pts if packet.dts is None and not self.started else packet.dts
        self.last = self.due if stamp is None else stamp
        lasts = packet.duration or self.step
        end = (self.last if packet.pts is None else packet.pts) + lasts
        self.due, self.end = self.last + lasts, max(self.end, end) if self.started else end
        self.started = True

    def shift(self, packet: av.Packet, units: int) -> None:
        """Move a packet in time."""
        if units and packet.dts is not None:
            packet.dts += units
        if units and packet.pts is not None:
            packet.pts += units

    def follow(self, packet: av.Packet) -> None:
        """Let a packet after a jump of the clock follow the one before, and all later ones with it."""
        if packet.dts is None:
            return
        jump = packet.dts - self.due
        foretold = self.due < packet.dts < self.end  # by a frame that was read before
        if (abs(jump) > JUMP * self.second and not foretold) or packet.dts + BACK * self.second < self.last:
            self.offset -= jump
            self.shift(packet, -jump)

    def drop(self, packet: av.Packet) -> None:
        """Take away time stamps that cannot be."""
        if packet.dts is not None and abs(packet.dts - self.due) > NONSENSE * self.second:
            packet.dts = None
        if packet.pts is not None and abs(packet.pts - self.due) > NONSENSE * self.second:
            packet.pts = None


class FrameTimes:
    """The time stamps of decoded frames: their own, or the decoder's where those are more consistent (H.264 in AVI)."""

    def __init__(self) -> None:
        self.own = self.decoding = -math.inf  # of the frame before
        self.faulty_own = self.faulty_decoding = 0

    def best(self, frame: av.VideoFrame) -> int | None:
        """FFmpeg's best effort: of both time stamps the one that ran backwards less often."""
        own, decoding = frame.pts, frame.dts
        if decoding is not None:
            self.faulty_decoding += decoding <= self.decoding
            self.decoding = decoding
        elif own is not None:
            self.decoding = own
        if own is not None:
            self.faulty_own += own <= self.own
            self.own = own
        elif decoding is not None:
            self.own = decoding
        return own if own is not None and (decoding is None or self.faulty_own <= self.faulty_decoding) else decoding
