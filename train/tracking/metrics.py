"""Speed, waiting for data, memory and MFU of the logged steps."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import psutil
import torch

from loaders.batch import Batch
from model.building import Model
from model.flops import step_flops

# Dense bf16 FLOP/s as NVIDIA publishes them (fp16 for the V100 and T4, which have no bf16), by words of the device's
# name. All words of a key must be in the name; the key with the most words counts.
PEAKS = {
    "GB200": 2500e12, "B200": 2250e12,
    "GH200": 989e12, "H200": 989e12, "H200 NVL": 835e12,
    "H100": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H20": 148e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "RTX 4090": 165e12,
    "A100": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12, "A10G": 70e12, "RTX A6000": 155e12, "RTX 3090": 71e12,
    "V100": 125e12, "V100 PCIe": 112e12, "V100S": 130e12, "T4": 65e12,
}  # fmt: skip
PARTIAL = {"mig", "laptop", "ti", "d"}  # words of a name that mark a part of a GPU, or a smaller model
FORWARD_AND_BACKWARD = 3  # times the forward's arithmetic


class Clock:
    """Times the steps between two logged ones: samples and FLOP a second, and the share of waiting for data."""

    def __init__(self, model: Model, batch_size: dict[str, int], num_frames: int) -> None:
        """batch_size: of all ranks together; num_frames: of a clip in training."""
        self._model, self._sizes = model, batch_size
        self._frames = {"image": 1, "video": num_frames}
        self.waited = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._began, self._samples, self._done, self.waited = time.perf_counter(), 0, 0.0, 0.0

    def pause(self, seconds: float) -> None:
        """Do not count time that was spent on something else."""
        self._began += seconds

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; the time that each takes counts as waiting."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._samples += self._sizes[batch.media_type]
            self._done += self._flops(batch)
            self.waited += time.perf_counter() - began
            yield batch

    def _flops(self, batch: Batch) -> int:
        """FLOP of a step of all ranks, assuming texts as long as this rank's; 0 if they are not counted."""
        if self._model.config.answer_decoder.enable:
            return 0
        kind = batch.media_type
        forward = step_flops(self._model, self._sizes[kind], self._frames[kind], batch.input_ids.shape[1])
        return FORWARD_AND_BACKWARD * forward["total"]

    def metrics(self, device: torch.device, world_size: int) -> dict[str, float | None]:
        """The interval's metrics; samples are those of all ranks, memory (GB) and MFU this device's."""
        seconds = max(1e-9, time.perf_counter() - self._began)
        peak = peak_flops(device)
        used = self._done / seconds / world_size / peak if peak and self._done else None
        return {
            "samples_per_second": round(self._samples / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
            "memory_gb": round(memory(device) / 1e9, 3),
            "mfu": None if used is None else round(used, 4),
        }


def memory(device: torch.device) -> int:
    """Bytes: the peak of tensors on a GPU; the resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_flops(device: torch.device) -> float | None:
    """The device's published FLOP/s; None for an unlisted GPU or a CPU."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """The published FLOP/s of a GPU by its name, such as `NVIDIA H100 80GB HBM3`; None for one that is not listed."""
    words = set(re.split(r"[ -]", name.lower()))
    known = [key for key in PEAKS if set(key.lower().split()) <= words]
    return PEAKS[max(known, key=lambda key: len(key.split()))] if known and not words & PARTIAL else None
