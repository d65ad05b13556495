"""DALI: its output is copied before its release, failures of images and of the device are distinguished."""

import gc
import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_decoder import SIZE, clips, picture

from loaders.config import LoaderConfig, PerMedia
from loaders.decode import dali, dali_graph
from loaders.decode.auto import AutoDecoder
from loaders.decode.choice import make_decoder
from loaders.decode.cpu import CpuDecoder
from loaders.decode.dali import INTACT, DaliDecoder, DaliWorker, is_device_failure, reason
from loaders.decode.dali_graph import GraphSettings, build_pipeline, feed
from loaders.samples import Clip
from loaders.train import TrainLoader

IMAGE_FAILS = "Error in MIXED operator `nvidia.dali.fn.decoders.image`,\nencountered:\n\nFailed to decode sample #1 : "
OUT_OF_MEMORY = (
    "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`,\n"
    "which was used in the pipeline definition with the following traceback:\n\nencountered:\n\n"
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory\n"
)


def headless() -> bytes:
    """A header and no picture."""
    whole = picture(1)
    return whole[: whole.index(b"\xff\xda") + 16]


class FakeGPU:
    """What torch.cuda and DALI do to an output, written down in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.stream = "default"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
        monkeypatch.setattr(torch, "from_dlpack", lambda tensor: FakeView(self, tensor))
        monkeypatch.setattr(dali, "build_pipeline", lambda settings, capacity: self)
        monkeypatch.setattr(dali, "feed", lambda pipeline, clips: setattr(self, "frames", len(clips)))

    @contextmanager
    def _within(self, stream: object) -> Iterator[None]:
        assert stream is self
        self.stream = "copies"
        yield
        self.stream = "default"

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def run(self) -> tuple[object]:
        self.log.append("run")
        return (FakeOutput(self, self.frames),)


class FakeOutput:
    """A DALI output whose memory is used again once nobody refers to it."""

    def __init__(self, gpu: FakeGPU, frames: int) -> None:
        self.gpu, self.frames = gpu, frames

    def as_tensor(self) -> "FakeOutput":
        return self

    def __del__(self) -> None:
        self.gpu.log.append("release")


class FakeView:
    """A tensor of DALI's memory, and what becomes of it."""

    def __init__(self, gpu: FakeGPU, output: FakeOutput) -> None:
        self.gpu, self.output = gpu, output

    def clone(self) -> torch.Tensor:
        self.gpu.log.append(f"clone on {self.gpu.stream}")
        if self.output.frames == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        frames = torch.zeros((self.output.frames, SIZE, SIZE, 3), dtype=torch.uint8)
        frames.record_stream = lambda stream: self.gpu.log.append(f"used on {stream}")  # type: ignore[method-assign]
        return frames


COPIED = ["run", "clone on copies", "synchronize", "used on default", "release"]


def test_dali_output_is_copied_on_its_own_stream_before_its_release(monkeypatch) -> None:
    gpu = FakeGPU(monkeypatch)
    worker = DaliWorker(GraphSettings(SIZE, 1, False, 0, 0.65))
    assert not worker.decode([INTACT, INTACT])[1]
    with pytest.raises(torch.OutOfMemoryError):  # a copy that fails is waited for too, and is no bad sample
        worker.decode([INTACT] * 3)
    gc.collect()
    assert not worker.decode([INTACT])[1]
    worker.close()
    assert gpu.log == [*COPIED, "run", "clone on copies", "synchronize", "release", *COPIED]


def test_an_assembled_batch_is_synchronised(monkeypatch) -> None:
    gpu = FakeGPU(monkeypatch)
    made = []
    monkeypatch.setattr(dali_graph.CopyStream, "_finished", lambda self, make: made.append(make) or torch.zeros(1))
    worker = DaliWorker(GraphSettings(SIZE, 1, False, 0, 0.65))
    _, bad = worker.decode([INTACT, INTACT._replace(jpegs=[b"nothing"])])
    worker.close()
    assert set(bad) == {1}
    assert len(made) == 2  # the copy of what was decoded, and the batch with a gap
    assert gpu.log[0] == "run"


class Failing:
    """A pipeline whose run fails as long as its batch holds more frames than `least`, or always."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, worker: DaliWorker, message: str, sticky: bool = False) -> None:
        self.message, self.sticky, self.runs, self.frames = message, sticky, 0, 0
        self.real = build_pipeline(worker.settings, 16)
        monkeypatch.setattr(dali, "build_pipeline", lambda settings, capacity: self)
        monkeypatch.setattr(dali, "feed", self._feed)

    def _feed(self, pipeline: object, fed: list[Clip]) -> None:
        self.frames = sum(len(clip.jpegs) for clip in fed)
        self.probe = fed == [INTACT]
        feed(self.real, fed)

    def run(self) -> object:
        self.runs += 1
        if self.sticky or not self.probe:
            self.real.run()
            raise RuntimeError(self.message)
        return self.real.run()


@pytest.fixture
def worker():
    worker = DaliWorker(GraphSettings(SIZE, 1, False, None, 0.65))
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("message", "sticky", "error", "runs"),
    [
        (OUT_OF_MEMORY, False, "not caused by an image: CUDA runtime API error cudaErrorMemoryAlloc", 1),  # no search
        # Whatever its words are: the batch, and the sound image on this pipeline and on a new one.
        (IMAGE_FAILS + "unspecified launch failure", True, "DALI fails on the CPU, .* image: Failed to decode", 3),
    ],
)
def test_a_failure_of_the_device_ends_the_run(monkeypatch, worker: DaliWorker, message, sticky, error, runs) -> None:
    pipeline = Failing(monkeypatch, worker, message, sticky)
    with pytest.raises(RuntimeError, match=error):
        worker.decode(clips())
    assert pipeline.runs == runs


def test_an_image_that_libjpeg_decodes_is_never_a_bad_sample(monkeypatch, worker: DaliWorker, caplog) -> None:
    Failing(monkeypatch, worker, IMAGE_FAILS + "words nobody has seen")
    with caplog.at_level(logging.WARNING, "loaders"):
        frames, bad = worker.decode(clips())
    assert not bad
    cpu = CpuDecoder(SIZE, 1)
    assert torch.equal(frames, cpu.decode(clips())[0])
    cpu.close()
    assert caplog.text.count("words nobody has seen") == 1


def test_a_bad_image_is_found_by_halving_and_the_pipeline_survives(monkeypatch, worker: DaliWorker) -> None:
    monkeypatch.setattr(dali, "header_faults", lambda clips: {})  # leave it to DALI
    good, _ = worker.decode(clips())
    pipeline = worker.pipeline
    for place in range(6):
        batch = clips()
        batch[place] = batch[place]._replace(jpegs=[headless()] * 2)
        frames, bad = worker.decode(batch)
        assert set(bad) == {place}
        assert "broken image: Premature end of JPEG file" in bad[place]
        others = [number for number in range(6) if number != place]
        assert torch.equal(frames[others], good[others])
        assert worker.pipeline is pipeline
    assert torch.equal(worker.decode(clips())[0], good)


def test_concurrent_batches_do_not_affect_each_other(monkeypatch) -> None:
    """Three threads and two pipelines; of every three batches one holds an image that fails in DALI."""
    monkeypatch.setattr(dali, "header_faults", lambda clips: {})
    decoder = DaliDecoder(SIZE, 1, antialias=False, device=None)
    good, _ = decoder.decode(clips())
    faults: list[object] = []

    def work() -> None:
        for number in range(12):
            batch = clips()
            if number % 3 == 0:
                batch[4] = batch[4]._replace(jpegs=[headless()] * 2)
            frames, bad = decoder.decode(batch)
            if set(bad) != ({4} if number % 3 == 0 else set()):
                faults.append((number, bad))
            if not torch.equal(frames[:4], good[:4]) or not torch.equal(frames[5], good[5]):
                faults.append((number, "another picture"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoder.close()
    assert not faults


@pytest.mark.parametrize(
    ("encountered", "device"),
    [
        ("nvImageCodec failure: '#3'", False),
        ("nvImageCodec failure: '#4'", False),
        ("nvImageCodec failure: '#5'", True),  # its allocator
        ("nvImageCodec failure: '#8'", True),  # internal
        ("Failed to decode sample #1 : ", False),
        ("NVJPEG error \"2\" : NVJPEG_STATUS_BAD_JPEG", False),
        ("NVJPEG error \"6\" : NVJPEG_STATUS_EXECUTION_FAILED", True),
        ("CUDA driver API error CUDA_ERROR_ILLEGAL_ADDRESS (700):", True),
        ("Can't allocate 4096 bytes on device 0.", True),
        ("std::bad_alloc", True),
        ("Failed to decode sample #1 : \nStacktrace (2 entries):\n[frame 0]: /usr/lib/libcuda.so", False),
    ],
)  # fmt: skip
def test_device_failures_are_recognised_by_their_message(encountered: str, device: bool) -> None:
    path = '  File "/home/me/cuda/loaders/decode/dali_graph.py", line 1\n'
    error = RuntimeError(f"Critical error in pipeline:\n{path}encountered:\n\n{encountered}\n")
    assert is_device_failure(error) is device
    assert reason(error) == encountered.splitlines()[0].strip(" :")


GPU = torch.device("cuda", 0)


def assert_unusable(caplog, reason: str) -> None:
    """decode=dali is an error on a GPU, decode=auto takes the CPU path; both give the reason."""
    with pytest.raises(ValueError, match=f"decode=dali, but {reason}, or set decode=cpu"):
        make_decoder("dali", SIZE, 1, antialias=False, device=GPU)
    decoder = make_decoder("auto", SIZE, 1, antialias=False, device=GPU)
    decoder.close()
    assert isinstance(decoder, CpuDecoder)
    assert re.search(f"decode=auto: using the CPU decoder, because {reason}", caplog.text)


def test_dali_that_is_not_installed_is_not_used(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "loaders.decode.dali", None)
    assert_unusable(caplog, "NVIDIA DALI cannot be imported .*")


def test_dali_and_pytorch_of_other_cuda_majors_are_refused(monkeypatch, caplog) -> None:
    names = [SimpleNamespace(metadata={"Name": name}) for name in ("numpy", "nvidia_dali_cuda120")]
    monkeypatch.setattr("loaders.decode.choice.distributions", lambda: names)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert_unusable(
        caplog, r"NVIDIA DALI is installed for CUDA 12 and PyTorch for CUDA 13: install DALI with `pip .*\[cuda13\]`"
    )
    make_decoder("dali", SIZE, 1, antialias=False, device=torch.device("cpu")).close()  # its CPU graph needs no CUDA


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said where DALI finds no GPU")
def test_dali_that_cannot_use_the_gpu_is_an_error_at_the_start(monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    assert_unusable(caplog, "NVIDIA DALI cannot decode on cuda:0 .*launch.doctor`")


def test_a_cpu_run_does_not_touch_the_gpu(monkeypatch, shapes, tokenizer) -> None:
    """DS_ACCELERATOR=cpu beside a GPU: nothing of the loader looks whether there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("pinned for a GPU that is not used"))
    for decode in ("auto", "dali", "cpu"):
        settings = LoaderConfig(batch_size=PerMedia(6), image_res=SIZE, decode=decode, threads=1)
        loader = TrainLoader([shapes.url("images_train")], tokenizer, settings, device="cpu")
        assert next(iter(loader)).frames.device.type == "cpu"
        loader.close()


def test_memory_is_pinned_for_a_gpu_only(monkeypatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self)
    for device in ("cpu", "cuda"):
        decoder = make_decoder("cpu", SIZE, 1, antialias=False, device=torch.device(device))
        decoder.decode(clips())
        decoder.close()
    assert pinned == [1]


@pytest.mark.parametrize(
    ("decode", "deterministic"), [("auto", False), ("auto", True), ("dali", False), ("dali", True)]
)
def test_deterministic_decoding_measures_nothing_and_uses_no_jpeg_engine(
    monkeypatch, decode: str, deterministic: bool
) -> None:
    made = []

    class Made:
        name = "dali"

        def __init__(self, size, threads, antialias, device, hw_decoder_load=0.65) -> None:
            made.append(hw_decoder_load)

        def close(self) -> None:
            pass

    monkeypatch.setattr(dali, "DaliDecoder", Made)
    monkeypatch.setattr(torch.version, "cuda", None)
    decoder = make_decoder(decode, SIZE, 1, False, GPU, deterministic)
    decoder.close()
    if decode == "auto":
        assert isinstance(decoder, CpuDecoder if deterministic else AutoDecoder)
    else:
        assert made == [0.0 if deterministic else 0.65]
