"""One process of the doctor's all-reduce; started by launch/doctor/probe.py with a launcher's variables."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

if not __package__:  # started by its path, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import distributed

from runtime.network import choose_interface
from runtime.ranks import ranks_from_environment
from train.job.devices import device_for

MEGABYTES = 16
ROUNDS = 5
TIMEOUT = timedelta(seconds=60)
LARGEST_ERROR = 0.01  # of the largest element; bf16 rounds by 0.4 %
SIDE = 4096  # of the matrices that a GPU multiplies


def main() -> None:
    """Print {"backend", "gbit", "tflops"}: the bus bandwidth as NCCL's tests count it, and bf16 of this GPU.

    Raises RuntimeError where a sum or a product is wrong.
    """
    ranks = ranks_from_environment()
    device = device_for(ranks)
    choose_interface()
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    data = torch.ones(MEGABYTES * 2**18, device=device)
    distributed.all_reduce(data)  # connects
    if not bool((data == ranks.world_size).all()):
        raise RuntimeError(f"rank {ranks.rank}: an all-reduce over {backend} gives wrong sums")
    check_product(device)
    _wait(device)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        distributed.all_reduce(data)
    _wait(device)
    seconds = (time.perf_counter() - began) / ROUNDS
    moved = data.numel() * 4 * 2 * (ranks.world_size - 1) / ranks.world_size
    gbit, tflops = moved * 8e-9 / seconds, _tflops(device)
    sys.stdout.write(json.dumps({"backend": backend, "gbit": gbit, "tflops": tflops}) + "\n")
    sys.stdout.flush()
    distributed.barrier()
    os._exit(0)


def check_product(device: torch.device) -> None:
    """Raise RuntimeError unless the device multiplies bf16 matrices as double precision does, within their rounding."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))
    exact = one.double() @ other.double()
    found = (one.to(device) @ other.to(device)).cpu().double()
    error = float((found - exact).abs().max() / exact.abs().max())
    if not error < LARGEST_ERROR:  # nor a number at all
        raise RuntimeError(f"{device} on {socket.gethostname()}: bf16 matrix product deviates by {error:.2%}")


def _tflops(device: torch.device) -> float:
    """TFLOP/s of a product of bf16 matrices; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    matrix = torch.ones(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    matrix @ matrix
    _wait(device)
    began = time.perf_counter()
    for _ in range(10):
        matrix @ matrix
    _wait(device)
    return 10 * 2 * SIDE**3 / (time.perf_counter() - began) * 1e-12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
