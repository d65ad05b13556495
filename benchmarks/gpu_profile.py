"""Profiles a training step on a GPU: kernel time by kind, and synchronisations with the device.

    python benchmarks/gpu_profile.py --corpus data/photos --tokenizer vocab.txt --size base --batch 128 --precision bf16

Takes the options of benchmarks/training.py and runs its variant `path`. Prints one line of JSON for each result as soon
as it is known:
    step_ms   a step without the profiler, which slows the host down; compare `gpu_ms` with it
    waits     places where the thread of the step waited for the device in one step, found by
              `torch.cuda.set_sync_debug_mode("warn")` and calls of synchronize()
    trace     milliseconds and share of time in which the GPU computed, number of gaps, kernels a step, share of each
              kind of kernel, the longest kernels, blocking driver calls: over some profiled steps
    cudnn     milliseconds a step with cuDNN attention allowed and forbidden, in alternating blocks
Without a GPU it prints only the slowest operators. The trace itself is written to `--trace`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import training

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3  # in the trace
WARM_UP = 5
SHOWN = 6  # longest kernels, and places that wait
# Kind of a kernel: parts of its name; the first match counts.
KINDS = {
    "attention": ("fmha", "flash", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "splitk"),
    "optimiser": ("adam", "multi_tensor", "foreach"),
    "copies": ("memcpy", "memset", "copy"),
    "normalisation": ("layer_norm", "layernorm", "batch_norm"),
    "indexing": ("index", "gather", "scatter", "embedding", "sort"),
    "reductions": ("reduce", "softmax", "norm"),
    "elementwise": ("elementwise", "vectorized", "dropout"),
}
WAITING_CALLS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHING_CALLS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

Event = dict[str, Any]


def kind_of(kernel: str) -> str:
    """Kind of a kernel, by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def covered(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans (begin, end), merged where they touch or overlap, in order."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def summary(events: list[Event], steps: int) -> dict[str, Any]:
    """Summary of a trace of that many steps; times in the trace are microseconds."""
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    if not kernels:
        return {"gpu": "none in the trace", "longest": longest([e for e in events if e.get("cat") == "cpu_op"])}
    joined = covered([(event["ts"], event["ts"] + event["dur"]) for event in kernels])
    whole, busy = joined[-1][1] - joined[0][0], sum(end - begin for begin, end in joined)
    total = sum(event["dur"] for event in kernels)
    kinds: Counter[str] = Counter()
    for event in kernels:
        kinds[kind_of(event["name"])] += event["dur"]
    calls = Counter(event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {
        "ms_a_step": round(whole / steps / 1000, 2),
        "gpu_ms": round(busy / steps / 1000, 2),
        "busy_share": round(busy / whole, 3),
        "gaps_a_step": round((len(joined) - 1) / steps),
        "kernels_a_step": round(len(kernels) / steps),
        "launches_a_step": round(sum(calls[name] for name in LAUNCHING_CALLS) / steps),
        "waits_a_step": {name: round(calls[name] / steps, 1) for name in WAITING_CALLS if calls[name]},
        "share_of_kinds": {kind: round(duration / total, 3) for kind, duration in kinds.most_common()},
        "longest": longest(kernels),
    }


def longest(events: list[Event]) -> list[str]:
    """The names with the most time, their share and their number of calls."""
    times: Counter[str] = Counter()
    for event in events:
        times[event["name"]] += event["dur"]
    counts, total = Counter(event["name"] for event in events), sum(times.values())
    return [f"{time / total:.1%} {counts[name]}x {name[:60]}" for name, time in times.most_common(SHOWN)]


def traced(ways: training.Ways, steps: int, path: Path) -> list[Event]:
    """The events of some steps; the trace is written to `path` (.json.gz)."""
    on_gpu = ways.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        ways.block("path", steps)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def caller() -> str:
    """Caller of a replaced function: the innermost lines outside torch, as file:line."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-2]
    return " < ".join(f"{shortened(frame.filename)}:{frame.lineno}" for frame in frames[:-4:-1])


def shortened(path: str) -> str:
    """A path relative to the repository or the package folder."""
    return path.split("site-packages/")[-1].removeprefix(f"{ROOT}/")


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Counts, by place, the synchronisations of this thread; other threads, such as DALI's, may wait."""
    found: Counter[str] = Counter()
    thread, inside = threading.get_ident(), False  # inside a counted call, which may also cause a warning

    def counting(plain: Any) -> Any:
        def synchronize(*arguments: Any, **keywords: Any) -> Any:
            nonlocal inside
            if inside or threading.get_ident() != thread:
                return plain(*arguments, **keywords)
            found[f"{plain.__qualname__} at {caller()}"] += 1
            inside = True
            try:
                return plain(*arguments, **keywords)
            finally:
                inside = False

        return synchronize

    def warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        matches = "called a synchronizing CUDA operation" in str(message)
        if matches and not inside and threading.get_ident() == thread:
            found[f"{shortened(filename)}:{lineno}"] += 1

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        stack.enter_context(mock.patch.object(warnings, "showwarning", warned))
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(owner, "synchronize", counting(owner.synchronize)))
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("warn")
        yield found


def waits(ways: training.Ways) -> dict[str, int] | str:
    """Places that waited in one step, and how often."""
    if ways.device.type != "cuda":
        ways.path()
        return "not counted: no GPU"
    with counted_waits() as found:
        ways.path()
    return {"a step": found.total(), **dict(found.most_common(SHOWN))}


def cudnn_attention(ways: training.Ways, options: argparse.Namespace) -> dict[str, float | str] | str:
    """Milliseconds a step with and without cuDNN attention."""
    if ways.device.type != "cuda":
        return "not measured: no GPU"
    before = torch.backends.cuda.cudnn_sdp_enabled()
    taken: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.blocks):
        for allowed, each in taken.items():
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            ways.block("path", 2)
            each.append(ways.block("path", options.steps).clock / options.steps * 1000)
    torch.backends.cuda.enable_cudnn_sdp(before)
    on, off = (round(statistics.median(each), 2) for each in taken.values())
    return {"allowed": on, "forbidden": off, "as in a run": "allowed" if before else "forbidden"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser()
    result.description = __doc__
    result.add_argument("--trace", type=Path, metavar="FILE.json.gz", help="where to write the profiler's trace")
    result.set_defaults(ways=["path"], steps=10, blocks=2)
    return result


def report(name: str, found: Any) -> None:
    """Print a result at once, because a time limit may end the process."""
    print(json.dumps({name: found}), flush=True)


def main() -> None:
    options = parser().parse_args()
    ways, _ = training.start(options)
    ways.block("path", WARM_UP)
    report("step_ms", round(ways.block("path", options.steps).clock / options.steps * 1000, 2))
    report("waits", waits(ways))
    with tempfile.TemporaryDirectory() as folder:
        report("trace", summary(traced(ways, STEPS, options.trace or Path(folder) / "trace.json.gz"), STEPS))
    report("cudnn", cudnn_attention(ways, options))
    training.end(ways)


if __name__ == "__main__":
    main()
