"""Measures the host time of a training step: launching kernels and DeepSpeed's Python code, whatever the device does.

    python benchmarks/host_time.py                      the published model's 439 parameters, with tiny widths, on a CPU

On a GPU a step takes the longer of this and the kernel time; at batches of 128 samples they are close. Two engines take
steps in turn: ours (`start_engine` and `StepGuard`), and the same with DeepSpeed's own gradient norm and throughput
timer (`compute_grad_norm`, `timers.throughput`). Prints the median CPU milliseconds of each part, and ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model.config import ModelConfig, TextConfig, VisionConfig
from model.singularity import Singularity
from runtime.ranks import ranks_from_environment
from train.config.settings import OptimizerConfig, RunConfig
from train.deepspeed.engine import DTYPES, deepspeed_config, start_engine
from train.guard import StepGuard
from train.job.devices import choose_kernels, device_for, start_processes

NARROW = ModelConfig(
    vision_encoder=VisionConfig(width=24, heads=12, mlp_ratio=1.0),
    text_encoder=TextConfig(vocab_size=128, width=24, heads=12, intermediate=24),
    image_res=32,
    embed_dim=8,
)
OTHERS = {"zero_optimization": {"compute_grad_norm": True}, "timers": {"throughput": {"enabled": True}}}
PARTS = ("forward", "backward", "step")


class Engine:
    """A model in a DeepSpeed engine, and the time of its steps by parts."""

    def __init__(self, options: argparse.Namespace, changes: dict[str, dict]) -> None:
        ranks = ranks_from_environment()
        run = RunConfig(
            precision=options.precision, deepspeed=options.deepspeed, optimizer=OptimizerConfig(max_grad_norm=1.0)
        )
        config = deepspeed_config(run, ranks)
        config = {**config, **{key: {**config.get(key, {}), **value} for key, value in changes.items()}}
        torch.manual_seed(0)
        model = Singularity(NARROW)
        self.parameters = len(list(model.parameters()))
        self.device = device_for(ranks)
        self.engine, _ = start_engine(model, run, config, self.device)
        self.engine.train()
        self.guard = StepGuard(self.engine, ranks, 10, 1.0)
        self.seconds: list[tuple[float, ...]] = []
        self.number = 0

    def take_step(self) -> None:
        """One step on two pairs, to keep the arithmetic minimal."""
        self.number += 1
        frames = torch.randn(2, 1, 3, 32, 32).to(self.device, next(self.engine.module.parameters()).dtype)
        ids = torch.randint(5, 60, (2, 8)).to(self.device)
        stamps = [time.process_time()]
        losses = self.engine(frames, ids, torch.ones_like(ids), torch.arange(2).to(self.device))
        stamps.append(time.process_time())
        self.engine.backward(torch.stack(list(losses.values())).sum())
        stamps.append(time.process_time())
        self.guard.step()
        self.guard.record(self.number, ("a", "b"), losses)
        stamps.append(time.process_time())
        self.seconds.append(tuple(after - before for before, after in pairwise(stamps)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--steps", type=int, default=60, help="of each engine (default: %(default)s)")
    result.add_argument("--precision", choices=DTYPES, default="bf16")
    result.add_argument("--deepspeed", default="deepspeed_configs/zero1.json")
    return result


def main() -> int:
    options = parser().parse_args()
    torch.set_num_threads(1)
    choose_kernels(deterministic=False)
    start_processes(device_for(ranks_from_environment()))
    engines = {"ours": Engine(options, {}), "DeepSpeed's norm": Engine(options, OTHERS)}
    for number in range(options.steps + 5):
        if number == 5:
            for engine in engines.values():
                engine.seconds.clear()
        for engine in list(engines.values())[:: -1 if number % 2 else 1]:
            engine.take_step()
    print(f"{engines['ours'].parameters} parameters, {options.precision}, {Path(options.deepspeed).stem}")
    for name, engine in engines.items():
        medians = [1e3 * statistics.median(each[part] for each in engine.seconds) for part in range(len(PARTS))]
        told = ", ".join(f"{part} {value:.1f}" for part, value in zip(PARTS, medians))
        print(f"{name:17} {told}, sum {sum(medians):.1f} ms (median of {options.steps} steps)")
    own, theirs = (engine.seconds for engine in engines.values())
    for name, pick in (("step", itemgetter(2)), ("all three", sum)):
        ratio = statistics.median(pick(other) / pick(ours) for ours, other in zip(own, theirs))
        print(f"{name}: DeepSpeed's norm / ours {ratio:.2f}")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
