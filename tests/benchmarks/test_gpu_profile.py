"""`benchmarks/gpu_profile.py`: the summary of a trace and the counting of waits, without a GPU."""

import threading
import warnings

import torch

from benchmarks.gpu_profile import counted_waits, covered, kind_of, summary


def kernel(name, begin, duration):
    return {"cat": "kernel", "name": name, "ts": begin, "dur": duration}


def test_overlapping_spans_count_once():
    assert covered([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


def test_the_summary_of_a_trace_has_busy_time_kinds_and_waits():
    calls = [{"cat": "cuda_runtime", "name": name} for name in ("cudaLaunchKernel",) * 4 + ("cudaStreamSynchronize",)]
    found = summary([kernel("sm90_xmma_gemm_bf16", 0, 600), kernel("fmha_cutlassF", 800, 200), *calls], steps=2)
    assert found["busy_share"] == 0.8
    assert (found["ms_a_step"], found["gpu_ms"]) == (0.5, 0.4)
    assert (found["launches_a_step"], found["kernels_a_step"]) == (2, 1)
    assert found["waits_a_step"] == {"cudaStreamSynchronize": 0.5}
    assert found["share_of_kinds"] == {"matrix products": 0.75, "attention": 0.25}
    assert found["longest"][0] == "75.0% 1x sm90_xmma_gemm_bf16"


def test_a_trace_without_a_gpu_has_the_slowest_operators():
    found = summary([{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 3}], steps=1)
    assert found == {"gpu": "none in the trace", "longest": ["100.0% 1x aten::mm"]}


KINDS = {
    "fmha_cutlassB_bf16_aligned_64x64_k64_sm80": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
    "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "matrix products",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::vectorized_layer_norm_kernel": "normalisation",
    "void at::native::vectorized_elementwise_kernel<4, GeluCUDA>": "elementwise",
}


def test_kernels_are_classified_by_name():
    assert {name: kind_of(name) for name in KINDS} == KINDS


def test_waits_are_counted_by_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    with counted_waits() as found:
        torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("the mode does not yet detect all synchronizing operations", stacklevel=1)
    assert modes == ["warn", "default"]
    assert found.total() == 2
    assert all("tests/benchmarks/test_gpu_profile.py:" in where for where in found)


def test_waits_of_other_threads_are_not_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def copies():
        torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with counted_waits() as found:
        thread = threading.Thread(target=copies)
        thread.start()
        thread.join()
    assert not found


def test_a_call_that_also_causes_a_warning_counts_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    warn = lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "synchronize", warn)
    with counted_waits() as found:
        torch.cuda.synchronize()
    assert found.total() == 1
