"""What the operating system knows of this host's NVIDIA GPUs, read without PyTorch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/version")
WSL_DRIVER = Path("/usr/lib/wsl/lib/libcuda.so.1")
HIDDEN = ("", "-1", "NoDevFiles")  # first entries of CUDA_VISIBLE_DEVICES that hide all GPUs; the last is Slurm's
# The oldest driver branch that serves a CUDA major version (NVIDIA's table of minor version compatibility).
OLDEST_DRIVER = {12: 525, 13: 580}


def gpu_files() -> list[str]:
    """The device files of this host's NVIDIA GPUs; they exist even if PyTorch cannot use the GPUs."""
    found = sorted(str(path) for path in DEVICES.glob("nvidia[0-9]*"))
    wsl = DEVICES / "dxg"  # of any GPU; only NVIDIA's driver contains libcuda
    return found or ([str(wsl)] if wsl.exists() and WSL_DRIVER.exists() else [])


def gpus_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in HIDDEN


def driver_loaded() -> bool:
    """Whether the kernel has NVIDIA's driver."""
    return DRIVER.exists()


def driver_version() -> str:
    """Version of the NVIDIA driver, such as 580.65.06; empty where there is none."""
    try:
        text = DRIVER.read_text().split("\n")[0]
    except OSError:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(words, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            return ""
    found = re.search(r"\b\d{3,}(\.\d+)+\b", text)
    return found.group() if found else ""
