"""Device of each process (an unused GPU is an error unless the user asks for the CPU), kernels, process group."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from runtime.errors import UserError
from runtime.network import choose_interface
from runtime.ranks import Ranks, ranks_from_environment
from runtime.rendezvous import master_port, remove_port_file
from train.job.gpus import OLDEST_DRIVER, driver_loaded, driver_version, gpu_files, gpus_hidden

LEAST_TIMEOUT = 3600.0  # seconds
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def device_for(ranks: Ranks) -> torch.device:
    """The device of this process: its own GPU, or the CPU where there is no GPU or the user asks for the CPU.

    `DS_ACCELERATOR=cpu`, and a CUDA_VISIBLE_DEVICES that names no GPU, ask for the CPU. There freed memory is kept.
    Raises ValueError where a GPU is there that PyTorch cannot use, and where there are more processes than GPUs.
    """
    asked = os.environ.get("DS_ACCELERATOR")
    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"DS_ACCELERATOR={asked}: set it to cuda or cpu, or leave it unset")
    if asked != "cpu" and torch.cuda.is_available():
        number = _gpu_number(ranks)
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    fault = gpu_fault()
    if fault:
        raise UserError(fault)
    os.environ["DS_ACCELERATOR"] = "cpu"
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones of this process.

    By default it returns blocks above 32 MiB to the kernel, which clears every page again when the next step asks for
    them (benchmarks/RESULTS.md). Without effect with other C libraries.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def gpu_fault() -> str:
    """The reason why this host's GPU cannot be used; empty if it can, there is none, or the user asks for the CPU."""
    asked = os.environ.get("DS_ACCELERATOR")
    if asked == "cpu" or torch.cuda.is_available():
        return ""
    return _unusable() if asked == "cuda" or (gpu_files() and not gpus_hidden()) else ""


def _unusable() -> str:
    """Why PyTorch cannot use the GPU of this host, and the remedy, in one line."""
    files, driver = gpu_files(), driver_version()
    found = f"this host has an NVIDIA GPU ({files[0]})" if files else "DS_ACCELERATOR=cuda asks for a GPU"
    on_cpu = "to compute on the CPU, set DS_ACCELERATOR=cpu"
    built = torch.version.cuda
    if built is None:
        remedy = "install a CUDA build of torch and torchvision (those of PyPI for Linux)"
        return f"{found}, but PyTorch {torch.__version__} is built for the CPU only: {remedy}; {on_cpu}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    text = (
        f"{found}, but PyTorch {torch.__version__} for CUDA {built} cannot use it "
        f"(driver {driver or 'not found'}{hint}): {_reason()}"
    )
    return f"{text}; {_remedy(int(built.split('.')[0]), driver)}; {on_cpu}"


def _reason() -> str:
    """The error of PyTorch when it initialises CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].split("\n")[0].rstrip(".")
    return "it sees no GPU"


def _remedy(cuda: int, driver: str) -> str:
    """The remedy for a driver that does not support the CUDA build of PyTorch."""
    needed, branch = OLDEST_DRIVER.get(cuda), int(driver.split(".")[0]) if driver else None
    if needed is None or branch is None or branch >= needed:
        return "see whether `nvidia-smi` works here, and whether this job or container was given the GPU"
    update = f"CUDA {cuda} needs driver {needed} or newer: update the driver"
    older = [major for major, oldest in OLDEST_DRIVER.items() if oldest <= branch]
    if not older:
        return update
    return f"{update}, or install the build for CUDA {max(older)} (`make clean`, `make install DALI=cuda{max(older)}`)"


def _gpu_number(ranks: Ranks) -> int:
    """Number of this process' GPU among the visible ones."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if ranks.local_rank < count:
        return ranks.local_rank
    if count == 1 and visible is not None and "," not in visible:
        # The launcher has bound a GPU to each process (srun --gpus-per-task): each sees its own as number 0. DeepSpeed
        # takes the number from LOCAL_RANK, and requires Open MPI's variable to match.
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
            if name in os.environ:
                os.environ[name] = "0"
        return 0
    hint = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    raise UserError(
        f"{ranks.local_world_size} processes on this host, but {count} visible GPUs "
        f"(LOCAL_RANK={ranks.local_rank}{hint}): "
        "start one process a GPU, or let the launcher show each process one GPU"
    )


def choose_kernels(deterministic: bool) -> None:
    """Select PyTorch's kernels; call it before any has run.

    deterministic: only those that give the same bits every time; an operator without such a kernel raises
    RuntimeError.
    """
    # PyTorch prefers cuDNN's attention on Hopper. It compiles a plan for each shape, of which texts have many, has
    # rounded BERT's dropout of 0.1 to a multiple of 1/16, and given NaN gradients with a mask (pytorch#174245, 196678).
    # What is left: flash where there is no mask, memory-efficient where there is one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it alone
        # Filling what is not yet written costs time, and finds bugs only.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)


def describe(device: torch.device) -> str:
    """The device and the versions of its software, for the log."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}, PyTorch "
            f"{torch.__version__} for CUDA {torch.version.cuda}, driver {driver_version() or 'unknown'}"
        )
    if gpu_files():
        return "the CPU; DS_ACCELERATOR or CUDA_VISIBLE_DEVICES excludes this host's GPU"
    if driver_loaded():
        return "the CPU; this host has an NVIDIA driver, but no GPU is passed to this container or job"
    return "the CPU; this host has no NVIDIA GPU"


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError where the device does not compute in this precision."""
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise UserError(
            "precision=fp16: this CPU has no fp16 instructions (AVX512-FP16 or AMX-FP16): set precision=bf16, or fp32"
        )


def slow_precision(precision: str, device: torch.device) -> str:
    """A warning where the device only emulates this precision; else empty."""
    if precision != "bf16" or device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return ""
    can = torch.cpu.get_capabilities()
    if any(there for name, there in can.items() if "bf16" in name):
        return ""
    return (
        f"precision=bf16: this CPU ({can.get('cpu_name', 'of unknown name')}) has no bf16 instructions (AVX512-BF16 or "
        "AMX-BF16) and emulates them: steps take about 6 times as long as with precision=fp32: set that"
    )


def collective_timeout(stall_seconds: float) -> timedelta:
    """Timeout of collectives: the watchdog, which knows the cause, must end the job before."""
    return timedelta(seconds=max(LEAST_TIMEOUT, 2 * stall_seconds))


def start_processes(device: torch.device, stall_seconds: float) -> None:
    """Join the other processes of the job; must follow everything that can be checked without them.

    stall_seconds: the watchdog's limit, which the timeout of all collectives exceeds. Raises UserError where the port
    to meet at is in use and no other can be taken.
    """
    import deepspeed

    choose_interface()
    timeout = collective_timeout(stall_seconds)
    # DeepSpeed reduces gradients in a separate group, and creates groups without a timeout: PyTorch's default (NCCL
    # 10 minutes, gloo 30) would apply there. PyTorch has no public way to change it.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if device.type == "cuda":
        # NCCL's monitor aborts a process whose CUDA calls hang, after 480 s by default.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout.total_seconds())))
    else:
        # Serves inference only, and would need a compiler at every user's machine. Not touched on a GPU, where it does
        # not exist: the first access probes every operation with the compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks = ranks_from_environment()
    master_port(ranks, timeout.total_seconds())
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, timeout=timeout)
    if ranks.is_first:
        remove_port_file()
