"""What a logged step is told with: speed, waiting, memory, and how much of the device's arithmetic is used."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import torch

from loaders.batch import Batch
from model.config import ModelConfig
from model.flops import step_flops

# Dense bf16 FLOP/s by the device's name, as published.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "V100": 125e12}
FORWARD_AND_BACKWARD = 3  # times the forward's arithmetic


class Clock:
    """Times the steps between two logged ones: samples and arithmetic a second, and the share of waiting for data."""

    def __init__(self, config: ModelConfig, batch_size: dict[str, int], num_frames: int) -> None:
        """batch_size: of all ranks together; num_frames: of a clip in training."""
        self._config, self._sizes = config, batch_size
        self._frames = {"image": 1, "video": num_frames}
        self.waited = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._began, self._samples, self._done, self.waited = time.perf_counter(), 0, 0.0, 0.0

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on something else."""
        self._began += seconds

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, the waiting for each noted."""
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
        """Of a step of all ranks, whose texts are taken to be as long as this rank's; 0 where they are not counted."""
        if self._config.answer_decoder.enable:
            return 0
        kind = batch.media_type
        forward = step_flops(self._config, self._sizes[kind], self._frames[kind], batch.input_ids.shape[1])
        return FORWARD_AND_BACKWARD * forward["total"]

    def figures(self, device: torch.device, world_size: int) -> dict[str, float | None]:
        """The interval's figures; samples are those of all ranks, memory (GB) and MFU this device's."""
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
    """Bytes: the most that tensors took on a GPU so far; what the process takes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_flops(device: torch.device) -> float | None:
    """The device's published FLOP/s, where it is a GPU we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)
