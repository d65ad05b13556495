"""A GPU is used or the error says why not; every process gets its own; collectives outlast the watchdog."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_engine import make, numbers, step
from torch import distributed
from torch.distributed import distributed_c10d

from runtime.ranks import Ranks
from train.config.settings import RunConfig
from train.job import devices, gpus
from train.job.devices import choose_kernels, collective_timeout, describe, device_for, driver_version, start_processes

OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"
OLD_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver."


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Builds a host: GPUs in /dev, those that PyTorch sees, its CUDA version, the driver, the environment."""

    def build(files=0, visible=0, cuda="13.0", driver="", reason=TOO_OLD, **environment):
        for number in range(files):
            (tmp_path / f"nvidia{number}").touch()
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(gpus, "DEVICES", tmp_path)
        monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
        if driver:
            (tmp_path / "version").write_text(driver)
        monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
        chosen = []
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

        def init():
            raise RuntimeError(reason)

        monkeypatch.setattr(torch.cuda, "init", init)
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return chosen

    return build


def test_a_cpu_that_only_emulates_bf16_is_reported(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False, "cpu_name": "Old"})
    assert devices.slow_precision("bf16", cpu).startswith("precision=bf16: this CPU (Old) has no bf16 instructions")
    assert devices.slow_precision("fp32", cpu) == devices.slow_precision("bf16", torch.device("cuda")) == ""
    for name in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert devices.slow_precision("bf16", cpu) == ""


def test_a_process_on_the_cpu_keeps_the_memory_of_freed_tensors():
    code = """
import resource, torch
from train.job.devices import device_for
from runtime.ranks import ranks_from_environment

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(); before = faults(); device_for(ranks_from_environment()); faults(); print(before, faults())
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 20


def test_each_process_takes_its_own_gpu(host):
    chosen = host(files=8, visible=8)
    assert device_for(Ranks(5, 8, 5, 8)) == torch.device("cuda", 5)
    assert chosen == [5]
    assert "DS_ACCELERATOR" not in os.environ


HIDDEN = [{"CUDA_VISIBLE_DEVICES": hidden} for hidden in ("", "-1", "-1,0", "NoDevFiles")]


@pytest.mark.parametrize(
    ("there", "description"),
    [
        *(({"files": 1, **chosen}, "excludes this host's GPU") for chosen in ({"DS_ACCELERATOR": "cpu"}, *HIDDEN)),
        *((chosen, "the CPU; this host has no NVIDIA GPU") for chosen in ({}, {"CUDA_VISIBLE_DEVICES": "0"})),
        ({"driver": OPEN_DRIVER}, "no GPU is passed to this container"),
    ],
)
def test_the_cpu_where_there_is_no_gpu_or_the_user_asks_for_it(host, there, description):
    host(**there)
    assert device_for(Ranks()) == torch.device("cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert description in describe(torch.device("cpu"))


def test_a_driver_too_old_for_pytorch_ends_the_run(host):
    host(files=2, driver=OLD_DRIVER)
    with pytest.raises(ValueError, match="cannot use it") as error:
        device_for(Ranks())
    assert str(error.value) == (
        f"this host has an NVIDIA GPU ({gpus.DEVICES}/nvidia0), but PyTorch {torch.__version__} for CUDA 13.0 "
        "cannot use it (driver 535.104.05): The NVIDIA driver on your system is too old (found version 12020); "
        "CUDA 13 needs driver 580 or newer: update the driver, or install the build for CUDA 12 (`make clean`, "
        "`make install DALI=cuda12`); to compute on the CPU, set DS_ACCELERATOR=cpu"
    )
    assert "DS_ACCELERATOR" not in os.environ


def test_a_gpu_of_windows_counts(host, monkeypatch, tmp_path):
    host()
    (tmp_path / "dxg").touch()
    monkeypatch.setattr(gpus, "WSL_DRIVER", tmp_path / "libcuda.so.1")
    assert device_for(Ranks()) == torch.device("cpu")  # a GPU of another make
    (tmp_path / "libcuda.so.1").touch()
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(ValueError, match=r"dxg.*driver not found"):
        device_for(Ranks())


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"files": 1, "cuda": None}, "is built for the CPU only: install a CUDA build of torch and torchvision"),
        ({"DS_ACCELERATOR": "xpu"}, "DS_ACCELERATOR=xpu: set it to cuda or cpu"),
        ({"DS_ACCELERATOR": "cuda"}, "DS_ACCELERATOR=cuda asks for a GPU, but PyTorch"),
        (
            {"files": 1, "driver": OPEN_DRIVER, "reason": "CUDA unknown error - due to", "CUDA_VISIBLE_DEVICES": "7"},
            r"driver 580\.65\.06, CUDA_VISIBLE_DEVICES=7\): CUDA unknown error.*`nvidia-smi`",
        ),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(host, there, message):
    host(**there)
    with pytest.raises(ValueError, match=message):
        device_for(Ranks())


@pytest.mark.parametrize("bound", ["3", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"])
def test_a_process_that_was_bound_to_one_gpu_takes_it(host, bound):
    """DeepSpeed sets the device by LOCAL_RANK, and compares it with Open MPI's variable."""
    chosen = host(4, 1, CUDA_VISIBLE_DEVICES=bound, LOCAL_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="3")
    assert device_for(Ranks(3, 4, 3, 4)) == torch.device("cuda", 0)
    assert chosen == [0]
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("visible", "environment"), [(1, {}), (1, {"CUDA_VISIBLE_DEVICES": "0,1"}), (2, {"CUDA_VISIBLE_DEVICES": "0,1"})]
)
def test_more_processes_than_gpus_are_refused(host, visible, environment):
    host(2, visible, **environment, LOCAL_RANK="2")
    with pytest.raises(ValueError, match=rf"3 processes on this host, but {visible} visible GPUs \(LOCAL_RANK=2"):
        device_for(Ranks(2, 3, 2, 3))
    assert os.environ["LOCAL_RANK"] == "2"


def test_the_log_names_the_gpu_and_its_versions(host, monkeypatch):
    host(files=1, visible=1, driver=OPEN_DRIVER)
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert describe(torch.device("cuda", 0)) == (
        f"NVIDIA H200, 140 GiB, compute capability 9.0, PyTorch {torch.__version__} for CUDA 13.0, driver 580.65.06"
    )


def test_nvidia_smi_gives_the_driver_where_the_kernel_does_not(host, tmp_path):
    host()
    assert driver_version() == ""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 571.96.03\necho 571.96.03\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert driver_version() == "571.96.03"


@pytest.mark.parametrize("stall_seconds", [1.0, RunConfig().stall_seconds, 1800.0, 7200.0])
def test_collectives_wait_longer_than_the_watchdog(stall_seconds):
    assert collective_timeout(stall_seconds).total_seconds() >= max(3600, 2 * stall_seconds)


def test_every_group_of_a_run_has_that_timeout(one_process):
    """DeepSpeed's own group, in which it reduces gradients, and the one of the votes on stopping among them."""
    from deepspeed.utils import groups

    for group in (distributed.group.WORLD, groups._clone_world_group(), distributed.new_group(backend="gloo")):
        assert group._get_backend(torch.device("cpu")).options._timeout == collective_timeout(0)
    assert distributed_c10d._get_default_timeout(distributed.Backend.NCCL) == collective_timeout(0)


@pytest.mark.parametrize(("given", "expected"), [(None, "6000"), ("240", "240")])
def test_nccl_is_started_with_the_timeout_and_without_probing_operations(monkeypatch, given, expected):
    import deepspeed

    reported = {}
    monkeypatch.setattr(deepspeed, "init_distributed", lambda backend, **words: reported.update(words, backend=backend))
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: pytest.fail("calls the compiler"))
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", given or "")
    if given is None:
        monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    start_processes(torch.device("cuda", 0), 3000.0)
    assert (reported["backend"], reported["timeout"].total_seconds()) == ("nccl", 6000)
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == expected


@pytest.fixture
def kernels(monkeypatch):
    """Puts back what PyTorch may choose from."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_chosen_on_purpose(kernels, deterministic):
    choose_kernels(deterministic)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic


@pytest.mark.usefixtures("one_process", "kernels")
def test_a_deterministic_step_needs_no_operator_without_such_a_kernel():
    choose_kernels(deterministic=True)
    found = []
    for _ in range(2):
        engine, guard = make("zero1", "bf16")
        step(engine, guard, 1)
        found.append(numbers(engine))
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())
