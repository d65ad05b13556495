"""decode=cpu: libjpeg-turbo and OpenCV in processes, and the memory that they share with this one.

Threads decode slower, because of Python's global lock: a thread takes it some five times a picture, each hand-over
wakes a sleeping core, and decoding stops while specs or a step are prepared (measured: benchmarks/RESULTS.md).
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

QUEUE_DEPTH = 2  # batches sent to a process at a time: when it has done its part of one, that of the next is there
SECONDS_TO_END = 5.0  # for a process that has closed its sockets
# A run that must stop needs batches until it has saved. The decoding processes end when it does.
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class SharedMemory:
    """Memory that is shared by its file descriptor, without a name in any file system; lives while referred to."""

    numbers = count()

    def __init__(self, size: int) -> None:
        self.number, self.size = next(SharedMemory.numbers), size
        self.descriptor = os.memfd_create("frames", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.map = mmap.mmap(self.descriptor, size)

    def __del__(self) -> None:
        """Close the descriptor; arrays of this memory stay valid."""
        os.close(self.descriptor)


class MemoryPool:
    """Reuses a memory for a later batch once nothing refers to its array: fresh pages cost time.

    It has no locks, because an array may be freed, and its memory come back, at any point of any thread.
    """

    KEPT = 16  # free memories
    SPARE = 1.25  # size over what is asked for; the bytes of batches differ a little
    LARGEST = 2.0  # size over what is asked for, up to which a memory is reused

    def __init__(self) -> None:
        self._free: deque[SharedMemory] = deque(maxlen=self.KEPT)

    def array(self, shape: tuple[int, ...], more: int) -> tuple[SharedMemory, np.ndarray]:
        """A memory that begins with an array of bytes of that shape and has `more` bytes; contents undefined."""
        size = math.prod(shape)
        memory = self._take(size + more)
        array = np.frombuffer(memory.map, np.uint8, size).reshape(shape)
        weakref.finalize(array, self._take_back, memory).atexit = False
        return memory, array

    def _take_back(self, memory: SharedMemory) -> None:
        self._free.append(memory)

    def close(self) -> None:
        """Free the memories that are not in use; the others end with their arrays."""
        self._free = deque(maxlen=0)

    def _take(self, size: int) -> SharedMemory:
        unfit: list[SharedMemory] = []
        try:
            while True:
                memory = self._free.pop()
                if size <= memory.size <= self.LARGEST * size:
                    return memory
                unfit.append(memory)
        except IndexError:
            return SharedMemory(int(size * self.SPARE))
        finally:
            self._free.extend(reversed(unfit))


class Slot:
    """One of QUEUE_DEPTH sockets to a process, and the memories that were sent over it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.process, self.connection = process, connection
        self._sent: dict[int, weakref.ref[SharedMemory]] = {}

    def begin(self, memory: SharedMemory, shape: tuple[int, ...], rows: range, clips: np.ndarray) -> None:
        """Ask for some rows of a batch to be decoded into its memory; RuntimeError when the process has ended."""
        freed = [number for number, sent in self._sent.items() if sent() is None]
        for number in freed:
            del self._sent[number]
        is_new = memory.number not in self._sent
        try:
            self.connection.send(Work(memory.number, is_new, freed, shape, rows, clips))
            if is_new:
                self._sent[memory.number] = weakref.ref(memory)
                send_handle(self.connection, memory.descriptor, self.process.pid)
        except ConnectionError:
            raise self._ended() from None

    def finish(self) -> dict[int, str]:
        """Wait until the rows are decoded; {row: reason} of the bad ones. RuntimeError when the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None

    def _ended(self) -> RuntimeError:
        try:
            code = self.process.wait(SECONDS_TO_END)
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}, see its message above"
            cause += ", possibly out of memory" if code == -signal.SIGKILL else ""
        except subprocess.TimeoutExpired:
            cause = "it closed its socket"
        return RuntimeError(f"decoding process {self.process.pid} exited: {cause}")


class CpuDecoder:
    """See loaders.decode.decoder.Decoder; the rows of a batch are shared out among the processes.

    pin: frames come in pinned memory, for a copy to a GPU that does not block.
    Raises OSError: a process cannot be started.
    """

    name = "cpu"

    def __init__(self, size: int, processes: int, antialias: bool = False, pin: bool = False) -> None:
        self.size, self.pin = size, pin
        self._memories = MemoryPool()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failed = ""  # why nothing is decoded any more
        self._free: SimpleQueue[tuple[Slot, ...]] = SimpleQueue()  # a slot of each process, for one batch
        try:
            started = [self._start(antialias) for _ in range(processes)]
        except OSError:
            self._end_processes()
            raise
        for slots in zip(*started, strict=True):
            self._free.put(slots)

    def _start(self, antialias: bool) -> list[Slot]:
        ends = [Pipe() for _ in range(QUEUE_DEPTH)]
        root = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        theirs = [their.fileno() for _, their in ends]
        command = [sys.executable, "-P", "-m", "loaders.decode.worker", str(int(antialias)), *map(str, theirs)]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)  # which they inherit
        try:
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=theirs, env=environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for _, their in ends:
            their.close()
        self._processes.append(process)
        return [Slot(process, our) for our, _ in ends]

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder.

        Raises RuntimeError: a decoding process has ended, with its signal.
        """
        shape = (len(clips), len(clips[0].jpegs), self.size, self.size, 3)
        memory, out = self._memories.array(shape, sum(len(data) for clip in clips for data in clip.jpegs))
        data, rows = packed(clips, out.size)
        memory.map[out.size : out.size + len(data)] = data
        bad = self._decode_into(memory, shape, rows)
        frames = torch.from_numpy(out)
        # `pin_memory` has copied when it returns, so that the shared memory can serve the next batch.
        return frames.pin_memory() if self.pin else frames, bad

    def _decode_into(self, memory: SharedMemory, shape: tuple[int, ...], clips: np.ndarray) -> dict[int, str]:
        """Decode clips (B, 7 + 2 T), see `Work`, into shared memory (B, T, S, S, 3); returns {bad row: reason}."""
        slots = self._free.get()
        try:
            if self._failed:
                raise RuntimeError(self._failed)
            busy = slots[: len(clips)]
            for first, slot in enumerate(busy):
                slot.begin(memory, shape, range(first, len(clips), len(slots)), clips[first :: len(slots)])
            return dict(bad for slot in busy for bad in slot.finish().items())
        except BaseException as error:
            # Answers may be left in the sockets.
            self._failed = self._failed or str(error) or "decoding was interrupted"
            raise
        finally:
            self._free.put(slots)

    def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """Kill the processes; a thread that waits for one gets a RuntimeError."""
        self._failed = self._failed or "the decoder is closed"
        self._end_processes()
        rows = [self._free.get() for _ in range(QUEUE_DEPTH)]  # no caller waits for an answer any more
        for slots in rows:
            for slot in slots:
                slot.connection.close()
            self._free.put(slots)
        self._memories.close()
