"""What the loader and DeepSpeed cost a training step: shards to optimiser step, against the model alone.

    python benchmarks/training.py --size tiny --corpus data/images           on a CPU
    torchrun --nproc_per_node N benchmarks/training.py --size base --corpus data/photos --batch 128 --precision bf16

Three ways to take the same steps, in blocks that alternate, one process (or one a rank):
    path    batches of the loader, DeepSpeed's engine: what launch/pretrain.py does
    engine  the same engine on one random batch that lies on the device
    plain   a PyTorch loop without DeepSpeed on that batch: forward, backward, clipping, AdamW (one process)
Printed: median samples/s of each, the share of `path` spent waiting for data, and the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from loaders.batch import Batch, normalize
from loaders.config import LoaderConfig, PerMedia
from loaders.text import Tokenizer
from loaders.train import TrainLoader
from model.building import build_model
from model.config import ModelConfig, TextConfig, VisionConfig
from model.singularity import Singularity
from train.checkpoints import special_ids
from train.config import OptimizerConfig, RunConfig
from train.engine import DTYPES, deepspeed_config, device_for, start_engine, start_processes
from train.groups import parameter_groups
from train.guard import StepGuard
from train.ranks import Ranks, ranks_from_environment
from train.schedule import Schedule
from train.step import Stepper

SIZES = {
    "tiny": ModelConfig(
        vision_encoder=VisionConfig(width=192, depth=4, heads=3),
        text_encoder=TextConfig(width=192, layers=4, fusion_layer=2, heads=3, intermediate=768, max_positions=64),
        image_res=96,
    ),
    "base": ModelConfig(),
}


def endless(loader: TrainLoader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def plain_step(model: Singularity, optimizer: torch.optim.Optimizer, batch: Batch, run: RunConfig) -> None:
    """A step as one writes it without DeepSpeed."""
    dtype = DTYPES[run.precision]
    with torch.autocast(batch.frames.device.type, dtype, enabled=dtype != torch.float32):
        frames = normalize(batch.frames, model.mean, model.std)
        losses = model(frames, batch.input_ids, batch.attention_mask, batch.idx)
        torch.stack(list(losses.values())).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds of `count` steps."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Ways:
    """The three ways to take a step."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.run = RunConfig(
            precision=options.precision, deepspeed=options.deepspeed, optimizer=OptimizerConfig(max_grad_norm=1.0)
        )
        size, config = SIZES[options.size], LoaderConfig(
            batch_size=PerMedia(options.batch * ranks.world_size, options.batch * ranks.world_size),
            image_res=SIZES[options.size].image_res, threads=options.threads,
        )  # fmt: skip
        tokenizer = Tokenizer.load(options.tokenizer)
        size.text_encoder.vocab_size = tokenizer.vocab_size
        self.loader = TrainLoader([options.corpus], tokenizer, config, ranks.rank, ranks.world_size, ranks.ranks_here)
        self.batches = endless(self.loader)
        self.waited, self.taken = 0.0, 0
        model = build_model(size, special_ids(tokenizer))
        self.alone = build_model(size, special_ids(tokenizer)).to(device)
        engine, groups = start_engine(model, self.run, deepspeed_config(self.run, ranks), device)
        engine.train()
        guard = StepGuard(engine, ranks, options.precision, 10, 1.0)
        schedule = Schedule(0, 10**6, 0.1)
        self.stepper = Stepper(engine, groups, model, schedule, guard, device, options.precision, 0, ranks.rank)
        self.batch = next(self.batches).to(device)
        wanted = parameter_groups({n: p.ndim for n, p in self.alone.named_parameters()}, self.run.optimizer)
        named = dict(self.alone.named_parameters())
        self.optimizer = torch.optim.AdamW(
            [{"params": [named[n] for n in g.names], "weight_decay": g.weight_decay} for g in wanted],
            lr=1e-5,
            fused=True,
        )

    def path(self) -> None:
        """The loader's next batch, through the engine."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        self.taken += 1
        self.stepper(batch, self.taken)

    def engine(self) -> None:
        """The batch that lies there, through the engine."""
        self.stepper(self.batch, 1)

    def plain(self) -> None:
        """The batch that lies there, without DeepSpeed."""
        plain_step(self.alone, self.optimizer, self.batch, self.run)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a packed corpus with captions")
    parser.add_argument("--tokenizer", required=True, help="a vocab.txt")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=32, help="pairs a rank (default: %(default)s)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--deepspeed", default="deepspeed_configs/zero1.json")
    parser.add_argument("--threads", type=int, default=1, help="decoding threads (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of a block (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=7, help="of each way (default: %(default)s)")
    options = parser.parse_args()
    ranks = ranks_from_environment()
    device = device_for(ranks)
    start_processes(device)
    ways = Ways(options, ranks, device)
    steps: dict[str, Callable[[], None]] = {"path": ways.path, "engine": ways.engine}
    if ranks.world_size == 1:
        steps["plain"] = ways.plain
    for step in steps.values():
        timed(step, 2, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    ways.waited = 0.0
    for block in range(options.blocks):
        for name in sorted(steps, reverse=bool(block % 2)):
            seconds[name].append(timed(steps[name], options.steps, device))
    ways.stepper.guard.inspect()
    pairs = options.batch * ranks.world_size * options.steps
    median = {name: statistics.median(each) for name, each in seconds.items()}
    if ranks.is_first:
        for name, each in median.items():
            print(
                f"{name:7} {pairs / each:8.1f} samples/s (median of {options.blocks} blocks of {options.steps} steps)"
            )
        print(f"waiting for data: {100 * ways.waited / sum(seconds['path']):.2f} % of the path's time")
        print(f"path against engine: {median['engine'] / median['path']:.3f}")
        if "plain" in median:
            print(f"engine against plain: {median['plain'] / median['engine']:.3f}")
    ways.loader.close()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
