"""Where the time of a training step goes on a GPU, and what in it waits for the device.

    python benchmarks/gpu_profile.py --corpus data/photos --tokenizer vocab.txt --size base --batch 128 --precision bf16

Takes the options of benchmarks/training.py, and steps as its way `path` does. Printed, as one line of JSON:
    waits     places that waited for the device in one step: what `torch.cuda.set_sync_debug_mode("warn")` names, and
              calls of synchronize()
    step_ms   a step without the profiler, which slows the host down; compare `gpu_ms` with it
    trace     milliseconds and share of the time in which the GPU computed, number of its gaps, kernels a step, the
              share of each kind of kernel and the longest ones, calls of the driver that wait: of some profiled steps
    cudnn     milliseconds a step with cuDNN's attention allowed and forbidden, in blocks that alternate
Without a GPU: the operators that take the longest; the rest says so. The trace itself is written to `--trace`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
TOLD = 6  # longest kernels, and places that wait
# Kind of a kernel: parts of names, the first kind that fits counts.
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
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def covered(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans (begin, end) joined where they touch or overlap, in order."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def summary(events: list[Event], steps: int) -> dict[str, Any]:
    """What a trace of that many steps tells of the GPU; times in the trace are microseconds."""
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
    """The names that take the most time, with their share of all and how often they ran."""
    times: Counter[str] = Counter()
    for event in events:
        times[event["name"]] += event["dur"]
    counts, total = Counter(event["name"] for event in events), sum(times.values())
    return [f"{time / total:.1%} {counts[name]}x {name[:60]}" for name, time in times.most_common(TOLD)]


def traced(ways: training.Ways, steps: int, path: Path) -> list[Event]:
    """The events of some steps; the trace is written to `path` (.json.gz)."""
    on_gpu = ways.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        ways.block("path", steps)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def place() -> str:
    """Who called what is being replaced: the innermost lines outside torch, as file:line."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-2]
    return " < ".join(f"{shortened(frame.filename)}:{frame.lineno}" for frame in frames[:-4:-1])


def shortened(path: str) -> str:
    """A path from the repository or the package's folder on."""
    return path.split("site-packages/")[-1].removeprefix(f"{ROOT}/")


@contextmanager
def noted_waits() -> Iterator[Counter[str]]:
    """Counts, by place, what waits for the device inside."""
    found: Counter[str] = Counter()

    def noting(plain: Any) -> Any:
        def synchronize(*arguments: Any, **keywords: Any) -> Any:
            found[f"{plain.__qualname__} at {place()}"] += 1
            return plain(*arguments, **keywords)

        return synchronize

    targets = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))
    patches = [mock.patch.object(owner, name, noting(getattr(owner, name))) for owner, name in targets]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for patch in patches:
            patch.start()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for patch in patches:
                patch.stop()
    for warning in told:
        if "called a synchronizing CUDA operation" in str(warning.message):
            found[f"{shortened(warning.filename)}:{warning.lineno}"] += 1


def waits(ways: training.Ways) -> dict[str, int] | str:
    """Places that waited in one step, and how often."""
    if ways.device.type != "cuda":
        ways.path()
        return "not counted: no GPU"
    with noted_waits() as found:
        ways.path()
    return {"a step": found.total(), **dict(found.most_common(TOLD))}


def cudnn_attention(ways: training.Ways, options: argparse.Namespace) -> dict[str, float] | str:
    """Milliseconds a step with cuDNN's attention and without."""
    if ways.device.type != "cuda":
        return "not measured: no GPU"
    before, taken = torch.backends.cuda.cudnn_sdp_enabled(), {True: [], False: []}
    for _ in range(options.blocks):
        for allowed, each in taken.items():
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            ways.block("path", 2)
            each.append(ways.block("path", options.steps).clock / options.steps * 1000)
    torch.backends.cuda.enable_cudnn_sdp(before)
    on, off = (round(statistics.median(each), 2) for each in taken.values())
    return {"allowed": on, "forbidden": off, "as in a run": "allowed" if before else "forbidden"}


def main() -> None:
    parser = training.parser()
    parser.description = __doc__
    parser.add_argument("--trace", type=Path, metavar="FILE.json.gz", help="where to write the profiler's trace")
    parser.set_defaults(ways=["path"], steps=10, blocks=2)
    options = parser.parse_args()
    ways, _ = training.start(options)
    ways.block("path", WARM_UP)
    step_ms = ways.block("path", options.steps).clock / options.steps * 1000
    result: dict[str, Any] = {"step_ms": round(step_ms, 2), "waits": waits(ways)}
    with tempfile.TemporaryDirectory() as folder:
        events = traced(ways, STEPS, options.trace or Path(folder) / "trace.json.gz")
    result |= {"trace": summary(events, STEPS), "cudnn": cudnn_attention(ways, options)}
    print(json.dumps(result))
    training.end(ways)


if __name__ == "__main__":
    main()
