"""A decoding process of decode=cpu: receives work over sockets; bytes and pixels are in shared memory.

loaders.decode.cpu starts it as `python -m loaders.decode.worker ANTIALIAS SOCKET...`; it needs neither torch nor the
loader, so it starts within 0.1 s and is small.
"""

from __future__ import annotations

import math
import mmap
import os
import selectors
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import NamedTuple

import numpy as np

from loaders.decode.pixels import Scratch, decode_clip
from loaders.samples import BadSampleError, Clip, Window


class Work(NamedTuple):
    """A part of a batch that is to be decoded."""

    memory: int  # number of the batch's memory: its pixels, then the bytes to decode
    is_new: bool  # its file descriptor comes after this
    freed: list[int]  # memories that are no longer used
    shape: tuple[int, ...]  # (B, T, S, S, 3) of the whole batch
    rows: range  # of the batch, R of them
    clips: np.ndarray  # (R, 7 + 2 T) int64: height, width, window, and first and end byte of each frame


class Slot:
    """A socket and the shared memory received over it; work is done in the order of arrival."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._memories: dict[int, mmap.mmap] = {}

    def take(self) -> Work:
        """The next work item; raises EOFError at the end."""
        work: Work = self.connection.recv()
        for number in work.freed:
            del self._memories[number]
        if work.is_new:
            descriptor = recv_handle(self.connection)
            self._memories[work.memory] = mmap.mmap(descriptor, 0)
            os.close(descriptor)
        return work

    def decode(self, work: Work, antialias: bool, scratch: Scratch) -> dict[int, str]:
        """Write the frames of some clips of a batch; the reasons of those that do not decode."""
        memory, bad = self._memories[work.memory], {}
        frames = np.frombuffer(memory, np.uint8, math.prod(work.shape)).reshape(work.shape)
        for row, numbers in zip(work.rows, work.clips.tolist(), strict=True):
            try:
                decode_clip(unpacked(numbers, memory), frames[row], antialias, scratch)
            except BadSampleError as error:
                bad[row] = str(error)
        return bad


def packed(clips: Sequence[Clip], begin: int) -> tuple[bytes, np.ndarray]:
    """The bytes of the frames of B clips, to be put at byte `begin` of a memory, and their `Work.clips`."""
    found, rows, end = [], [], begin
    for clip in clips:
        row = [clip.height, clip.width, *clip.window]
        first, last = end, None
        for data in clip.jpegs:
            if data is not last:  # a repeated frame is there once
                first, end, last = end, end + len(data), data
                found.append(data)
            row += (first, end)
        rows.append(row)
    return b"".join(found), np.array(rows, np.int64)


def unpacked(numbers: Sequence[int], memory: mmap.mmap) -> Clip:
    """The clip of a row of `Work.clips`."""
    height, width, top, left, window_height, window_width, flip, *ends = numbers
    jpegs: list[bytes] = []
    for number in range(0, len(ends), 2):
        repeated = number and ends[number] == ends[number - 2]
        jpegs.append(jpegs[-1] if repeated else memory[ends[number] : ends[number + 1]])
    return Clip(jpegs, height, width, Window(top, left, window_height, window_width, bool(flip)))


def serve(slots: Sequence[Slot], antialias: bool) -> None:
    """Serve decoding requests until a socket is closed."""
    scratch, selector = Scratch(), selectors.PollSelector()
    for slot in slots:
        selector.register(slot.connection, selectors.EVENT_READ, slot)
    while True:
        for key, _ in selector.select():
            try:
                key.data.connection.send(key.data.decode(key.data.take(), antialias, scratch))
            except (EOFError, ConnectionError):
                return


if __name__ == "__main__":
    wants_antialias, *sockets = map(int, sys.argv[1:])
    serve([Slot(Connection(number)) for number in sockets], bool(wants_antialias))
