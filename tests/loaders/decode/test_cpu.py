"""Decoding processes: shared memory, blocked signals, and their end with the loader."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from loaders.decode.cpu import BLOCKED_SIGNALS, CpuDecoder, MemoryPool
from loaders.decode.pixels import Scratch
from loaders.decode.worker import packed, unpacked
from loaders.samples import Clip, Window

SIZE = 32


def clips(count: int = 8) -> list[Clip]:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 40, 50, 3), np.uint8)
    jpegs = [simplejpeg.encode_jpeg(np.ascontiguousarray(frame), colorspace="RGB") for frame in pixels]
    return [Clip([data, data], 40, 50, Window(2, 3, 30, 40, bool(number % 2))) for number, data in enumerate(jpegs)]


def decoding_processes(of: int | None = None) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(of).children():
        with suppress(psutil.Error):  # a child of another test that has just ended
            if "loaders.decode.worker" in process.cmdline():
                found.append(process)
    return found


@pytest.fixture
def decoder():
    before = decoding_processes()
    decoder = CpuDecoder(SIZE, 2)
    yield decoder
    decoder.close()
    assert decoding_processes() == before


@given(
    st.lists(
        st.tuples(
            st.lists(st.binary(min_size=1, max_size=9), min_size=3, max_size=3),
            st.lists(st.booleans(), min_size=2, max_size=2),
            st.tuples(*[st.integers(0, 5000)] * 6),
            st.booleans(),
        ),
        max_size=5,
    ),
    st.integers(0, 9),
)
def test_packed_clips_are_unpacked_unchanged(drawn, begin: int) -> None:
    sent = []
    for frames, repeats, (height, width, *window), flip in drawn:
        jpegs = list(frames)
        for number, repeated in enumerate(repeats, 1):
            jpegs[number] = jpegs[number - 1] if repeated else jpegs[number]
        sent.append(Clip(jpegs, height, width, Window(*window, flip)))
    data, rows = packed(sent, begin)
    memory = bytes(begin) + data
    found = [unpacked(row, memory) for row in rows.tolist()]  # type: ignore[arg-type]
    assert found == sent
    for clip, (_, repeats, _, _) in zip(found, drawn, strict=True):  # so that they are decoded once
        for number, repeated in enumerate(repeats, 1):
            assert not repeated or clip.jpegs[number] is clip.jpegs[number - 1]


def test_the_number_of_processes_does_not_change_the_frames(decoder: CpuDecoder) -> None:
    batch = clips(9)
    expected, bad = decoder.decode(batch)
    assert not bad
    assert expected.float().std() > 20
    for processes in (1, 3):
        other = CpuDecoder(SIZE, processes)
        assert torch.equal(other.decode(batch)[0], expected)
        assert torch.equal(other.decode(batch[:1])[0], expected[:1])  # fewer than there are places
        other.close()


@pytest.mark.parametrize("number", BLOCKED_SIGNALS)
def test_signals_that_stop_a_run_do_not_stop_its_decoding(number: int) -> None:
    """They reach a whole process group or job step; the run still needs batches until it has saved."""
    decoder = CpuDecoder(SIZE, 1)
    (process,) = decoding_processes()
    process.send_signal(number)  # before it has even begun
    expected = decoder.decode(clips())[0].clone()
    process.send_signal(number)
    assert torch.equal(decoder.decode(clips())[0], expected)
    decoder.close()
    assert not process.is_running()
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "SIGKILL, possibly out of memory"), (signal.SIGSEGV, "SIGSEGV")]
)
def test_a_dead_process_is_an_error_with_its_signal(decoder: CpuDecoder, number: int, message: str) -> None:
    decoder.decode(clips())
    process = decoding_processes()[-1]
    process.send_signal(number)
    for _ in range(3):  # an answer of the other process may be left in its socket
        with pytest.raises(RuntimeError, match=f"decoding process {process.pid} exited: {message}"):
            decoder.decode(clips())


def test_an_interrupted_batch_leaves_no_answers_in_the_sockets(decoder: CpuDecoder) -> None:
    decoder.decode(clips())
    for process in decoding_processes():
        process.suspend()
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(clips())
    for process in decoding_processes():
        process.resume()
    time.sleep(0.3)  # the answers come now
    for _ in range(3):
        with pytest.raises(RuntimeError, match="decoding was interrupted"):
            decoder.decode(clips()[::-1])


@pytest.mark.parametrize("side", [(224, 224), (224, 299), (336, 224), (97, 31)])
def test_pictures_are_decoded_to_odd_addresses(side: tuple[int, int]) -> None:
    """Rows that begin at a multiple of 32 are written past the caches."""
    scratch = Scratch()
    for number in (0, 1):
        buffer = scratch.buffer(number, 3 * side[0] * side[1])
        assert buffer.size == 3 * side[0] * side[1]
        assert buffer.ctypes.data % 32 == 1


def test_a_suspended_process_does_not_block_closing() -> None:
    """As a loader closes that has stood still for longer than its stall_timeout."""
    decoder = CpuDecoder(SIZE, 1)
    decoder.decode(clips())
    (process,) = decoding_processes()
    process.suspend()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            decoder.decode(clips())
        except BaseException as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.5)
    decoder.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert not process.is_running()
    assert [type(error) for error in errors] == [RuntimeError]
    decoder.close()
    with pytest.raises(RuntimeError, match="the decoder is closed"):
        decoder.decode(clips())


def test_decoding_processes_end_with_their_parent(tmp_path: Path) -> None:
    """Also when it is killed, and wherever it was started."""
    (tmp_path / "loaders.py").write_text("raise SystemExit('not this one')")
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "loaders" / "decode")!r}]
from test_cpu import CpuDecoder, SIZE, clips
decoder = CpuDecoder(SIZE, 2)
decoder.decode(clips())
print("decoded", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "decoded\n"
    decoding = decoding_processes(process.pid)
    assert len(decoding) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    psutil.wait_procs(decoding, timeout=10)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in decoding)


def test_memory_is_reused_only_when_it_is_free(decoder: CpuDecoder) -> None:
    held = [decoder.decode(clips())[0] for _ in range(3)]
    assert len({frames.data_ptr() for frames in held}) == 3
    places = {frames.data_ptr() for frames in held}
    view = held[0][1]
    kept = view.clone()
    del held
    gc.collect()  # what tests before left behind
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        frames = decoder.decode(clips()[::-1])[0]
        assert frames.data_ptr() in places - {view.data_ptr() - frames[0].numel()}
    assert torch.equal(view, kept)
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_memory_pool_limits_number_and_size_of_free_memories() -> None:
    pool = MemoryPool()
    held = [pool.array((1000, 10), 100) for _ in range(MemoryPool.KEPT + 5)]
    numbers = {memory.number for memory, _ in held}
    assert len(numbers) == MemoryPool.KEPT + 5
    del held
    small, _ = pool.array((10, 10), 1)
    assert small.number not in numbers
    again = [pool.array((1000, 9), 5) for _ in range(MemoryPool.KEPT + 1)]
    assert sum(memory.number in numbers for memory, _ in again) == MemoryPool.KEPT
    memory, array = again[0]
    assert array.shape == (1000, 9)
    memory.map[9000:9005] = b"bytes"  # behind the array
    files = len(os.listdir("/proc/self/fd"))
    pool.close()
    del again, memory
    assert array.sum() >= 0
    assert len(os.listdir("/proc/self/fd")) < files - MemoryPool.KEPT
