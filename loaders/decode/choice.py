"""Which decoder a run uses: `decode=auto|dali|cpu`."""

from __future__ import annotations

import logging
import os
from importlib.metadata import distributions

import torch

from loaders.decode.auto import AutoDecoder
from loaders.decode.cpu import CpuDecoder
from loaders.decode.decoder import Decoder
from runtime.errors import UserError

log = logging.getLogger("loaders")

DALI_PACKAGE = "nvidia-dali-cuda"  # and CUDA's version: 120, 130


def make_decoder(
    backend: str, size: int, threads: int, antialias: bool, device: torch.device, deterministic: bool = False
) -> Decoder:
    """The decoder of `decode=auto|dali|cpu` for a run that computes on `device`.

    auto: without a GPU the CPU path; on a GPU both decoders, until it is measured which makes training wait less.
    deterministic: nothing is measured, auto is the CPU path; DALI does not use the GPU's JPEG engines.
    Raises UserError: decode=dali where DALI cannot be used.
    """
    on_gpu = device.type == "cuda"
    if backend == "cpu" or (backend == "auto" and (deterministic or not on_gpu)):
        return CpuDecoder(size, threads, antialias, pin=on_gpu)
    try:
        dali = _dali(size, threads, antialias, device, deterministic)
    except _UnusableError as error:
        if backend == "dali":
            raise UserError(f"decode=dali, but {error}, or set decode=cpu") from None
        log.warning("decode=auto: using the CPU decoder, because %s", error)
        return CpuDecoder(size, threads, antialias, pin=on_gpu)
    return dali if backend == "dali" else AutoDecoder(CpuDecoder(size, threads, antialias, pin=on_gpu), dali)


class _UnusableError(Exception):
    """Why DALI cannot be used here, and the remedy."""


def _dali(size: int, threads: int, antialias: bool, device: torch.device, deterministic: bool) -> Decoder:
    """DALI's decoder; raises _UnusableError where it is not installed, of another CUDA, or fails on this device."""
    number = None
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        _check_cuda_majors()
    try:
        from loaders.decode.dali import DaliDecoder
    except (ImportError, OSError) as error:
        raise _UnusableError(
            f"NVIDIA DALI cannot be imported ({error}): install it with `pip install .[cuda13]` (or cuda12)"
        ) from None
    try:
        return DaliDecoder(size, threads, antialias, number, **({"hw_decoder_load": 0.0} if deterministic else {}))
    except RuntimeError as error:
        raise _UnusableError(
            f"NVIDIA DALI cannot decode on {device} ({str(error).strip().splitlines()[0]}): check the GPU's driver, "
            "its free memory and DALI's version with `python -m launch.doctor`"
        ) from error


def _check_cuda_majors() -> None:
    """Raise _UnusableError where DALI's package and PyTorch are made for different CUDA majors."""
    names = [(found.metadata["Name"] or "").lower().replace("_", "-") for found in distributions()]
    majors = {name.removeprefix(DALI_PACKAGE)[:2] for name in names if name.startswith(DALI_PACKAGE)}
    ours = (torch.version.cuda or "").partition(".")[0]
    if majors and ours and ours not in majors:
        raise _UnusableError(
            f"NVIDIA DALI is installed for CUDA {', '.join(sorted(majors))} and PyTorch for CUDA {ours}: install DALI "
            f"with `pip install .[cuda{ours}]`"
        )


def usual_device() -> str:
    """The device of a program outside a job: the GPU if PyTorch finds one and DS_ACCELERATOR is not cpu."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
