"""Processes that decode, and the memory that they share with this one.

Threads would do it but for Python's lock: a thread needs it some five times a picture, a lock that is handed on wakes a
sleeping core, and while a batch is drawn or a step is prepared nobody decodes (measured: benchmarks/RESULTS.md).
"""

from __future__ import annotations

import math
import mmap
import os
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from loaders.decode.worker import Work, packed
from loaders.samples import Clip

PLACES = 2  # of each process: when it has done its part of a batch, that of the next one is there
SECONDS_TO_END = 5.0  # for a process that has closed its sockets
# A run that is told to stop goes on until it has saved, and needs batches; what ends its processes is its own end.
NOT_FOR_THEM = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Memory:
    """Memory that the processes can have as well, without a name in any file system; lives while it is referred to."""

    numbers = count()

    def __init__(self, size: int) -> None:
        self.number, self.size = next(Memory.numbers), size
        self.descriptor = os.memfd_create("frames", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.map = mmap.mmap(self.descriptor, size)

    def __del__(self) -> None:
        """Close it; arrays of its memory stay what they are."""
        os.close(self.descriptor)


class MemoryPool:
    """Memories that serve the next batches once nobody refers to their arrays: fresh pages cost time.

    No locks: an array may end, and its memory come back, in the midst of anything.
    """

    KEPT = 16  # that are free
    ROOM = 1.25  # of what is asked for; batches' bytes differ a little
    LARGEST = 2.0  # of what is asked for, that a memory may be

    def __init__(self) -> None:
        self._free: deque[Memory] = deque(maxlen=self.KEPT)

    def array(self, shape: tuple[int, ...], more: int) -> tuple[Memory, np.ndarray]:
        """A memory that begins with an array of bytes of that shape and has `more` bytes; contents undefined."""
        count = math.prod(shape)
        memory = self._take(count + more)
        array = np.frombuffer(memory.map, np.uint8, count).reshape(shape)
        weakref.finalize(array, self._take_back, memory).atexit = False
        return memory, array

    def _take_back(self, memory: Memory) -> None:
        self._free.append(memory)

    def close(self) -> None:
        """Keep none any more; arrays that somebody has stay what they are."""
        self._free = deque(maxlen=0)

    def _take(self, size: int) -> Memory:
        unfit: list[Memory] = []
        try:
            while True:
                memory = self._free.pop()
                if size <= memory.size <= self.LARGEST * size:
                    return memory
                unfit.append(memory)
        except IndexError:
            return Memory(int(size * self.ROOM))
        finally:
            self._free.extend(reversed(unfit))


class Place:
    """One place in a process' queue: a socket, and the memories that went over it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.process, self.connection = process, connection
        self._sent: dict[int, weakref.ref[Memory]] = {}

    def begin(self, memory: Memory, shape: tuple[int, ...], rows: range, clips: np.ndarray) -> None:
        """Ask for a part of a batch to be decoded into its memory; raises RuntimeError when the process has ended."""
        gone = [number for number, sent in self._sent.items() if sent() is None]
        for number in gone:
            del self._sent[number]
        is_new = memory.number not in self._sent
        try:
            self.connection.send(Work(memory.number, is_new, gone, shape, rows, clips))
            if is_new:
                self._sent[memory.number] = weakref.ref(memory)
                send_handle(self.connection, memory.descriptor, self.process.pid)
        except ConnectionError:
            raise self._ended() from None

    def finish(self) -> dict[int, str]:
        """Wait until it is decoded; {row: reason} of the bad ones. Raises RuntimeError when the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"decoding process {self.process.pid} has ended: {self._cause()}")

    def _cause(self) -> str:
        try:
            code = self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        if code >= 0:
            return f"exit code {code}, see its message above"
        return f"{signal.Signals(-code).name}" + (", perhaps for want of memory" if -code == signal.SIGKILL else "")


class Workers:
    """As many processes that decode; a batch is dealt out among them. Safe to use from several threads.

    Raises:
        OSError: a process cannot be started.
    """

    def __init__(self, processes: int, antialias: bool) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failed = ""  # why nothing is decoded any more
        self._free: SimpleQueue[tuple[Place, ...]] = SimpleQueue()  # of each process one, for one batch
        try:
            started = [self._start(antialias) for _ in range(processes)]
        except OSError:
            self._end()
            raise
        for places in zip(*started, strict=True):
            self._free.put(places)

    def _start(self, antialias: bool) -> list[Place]:
        ends = [Pipe() for _ in range(PLACES)]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        theirs = [their.fileno() for _, their in ends]
        words = [sys.executable, "-P", "-m", "loaders.decode.worker", str(int(antialias)), *map(str, theirs)]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THEM)  # which they inherit
        try:
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=theirs, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for _, their in ends:
            their.close()
        self._processes.append(process)
        return [Place(process, our) for our, _ in ends]

    def decode(self, memory: Memory, shape: tuple[int, ...], clips: np.ndarray) -> dict[int, str]:
        """Have a batch decoded into its memory; {row: reason} of the bad ones.

        shape: (B, T, S, S, 3). clips: (B, 7 + 2 T), see `Work`.

        Raises:
            RuntimeError: a process has ended.
        """
        places = self._free.get()
        try:
            if self._failed:
                raise RuntimeError(self._failed)
            busy = places[: len(clips)]
            for first, place in enumerate(busy):
                place.begin(memory, shape, range(first, len(clips), len(places)), clips[first :: len(places)])
            return dict(bad for place in busy for bad in place.finish().items())
        except BaseException as error:
            self._failed = self._failed or str(error) or "decoding was interrupted"  # answers may be left in sockets
            raise
        finally:
            self._free.put(places)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """End the processes, whatever they are at; who still waits for one gets its RuntimeError."""
        self._failed = self._failed or "the decoder is closed"
        self._end()
        rows = [self._free.get() for _ in range(PLACES)]  # nobody waits for an answer any more
        for places in rows:
            for place in places:
                place.connection.close()
            self._free.put(places)


class CpuDecoder:
    """libjpeg-turbo and OpenCV's bicubic in as many processes.

    pin: frames come in pinned memory, for a copy to a GPU that does not block.

    Raises:
        OSError: a process cannot be started.
    """

    name = "cpu"

    def __init__(self, size: int, processes: int, antialias: bool = False, pin: bool = False) -> None:
        self.size, self.pin = size, pin
        self._workers = Workers(processes, antialias)
        self._memories = MemoryPool()

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder.

        Raises:
            RuntimeError: a decoding process has ended, with its signal.
        """
        shape = (len(clips), len(clips[0].jpegs), self.size, self.size, 3)
        memory, out = self._memories.array(shape, sum(len(data) for clip in clips for data in clip.jpegs))
        data, numbers = packed(clips, out.size)
        memory.map[out.size : out.size + len(data)] = data
        bad = self._workers.decode(memory, shape, numbers)
        frames = torch.from_numpy(out)
        # `pin_memory` has copied when it returns, so that the shared memory can serve the next batch.
        return frames.pin_memory() if self.pin else frames, bad

    def close(self) -> None:
        """See Decoder."""
        self._workers.close()
        self._memories.close()
