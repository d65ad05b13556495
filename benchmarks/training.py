"""What the loader and DeepSpeed cost a training step: shards to optimiser step, against the model alone.

    python benchmarks/training.py --size tiny --corpus data/images           on a CPU
    torchrun --nproc_per_node N benchmarks/training.py --size base --corpus data/photos --batch 128 --precision bf16
    python benchmarks/training.py --size base --corpus data/clips --frames 4 ...      with the temporal encoder

Three ways to take the same steps, in blocks that alternate, one process (or one a rank):
    path    batches of the loader, DeepSpeed's engine: what launch/pretrain.py does
    engine  the same engine on the batches of the last block of `path`, which lie on the device
    plain   a PyTorch loop without DeepSpeed on those: forward, backward, clipping, AdamW (one process)
Printed: median samples/s of each, the share of `path` spent waiting for data, memory, MFU (on a GPU), and the medians
of the blocks' ratios, on a CPU also in the process' own seconds, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from loaders.batch import Batch, normalize
from loaders.config import LoaderConfig, PerMedia, VideoInput
from loaders.text import Tokenizer
from loaders.train import TrainLoader
from model.building import build_model
from model.config import ModelConfig, TextConfig, VisionConfig, with_changes
from model.flops import step_flops
from model.singularity import Singularity
from train.checkpoints import special_ids
from train.config import OptimizerConfig, RunConfig
from train.devices import choose_kernels, device_for, start_processes
from train.engine import DTYPES, deepspeed_config, start_engine
from train.figures import FORWARD_AND_BACKWARD, memory, peak_flops
from train.groups import parameter_groups
from train.guard import StepGuard
from train.ranks import Ranks, ranks_from_environment
from train.schedule import Schedule
from train.step import Stepper, without_padding

SIZES = {
    "tiny": ModelConfig(
        vision_encoder=VisionConfig(width=192, depth=4, heads=3),
        text_encoder=TextConfig(width=192, layers=4, fusion_layer=2, heads=3, intermediate=768, max_positions=64),
        image_res=96,
    ),
    "base": ModelConfig(),
}
WAYS = ("path", "engine", "plain")


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """Batches as a run has them, epoch after epoch."""
    epoch = 0
    while True:
        yield from map(without_padding, loader.epoch(epoch))
        epoch += 1


def model_size(options: argparse.Namespace, tokenizer: Tokenizer) -> ModelConfig:
    """The model of `--size`, temporal where clips have several frames; base keeps BERT's number of words."""
    size = SIZES[options.size]
    words = tokenizer.vocab_size if options.size == "tiny" else size.text_encoder.vocab_size
    size.text_encoder.vocab_size = max(words, tokenizer.vocab_size)
    if options.frames == 1:
        return size
    temporal = {"num_frames": options.frames, "add_temporal_embed": True, "temporal_vision_encoder.enable": True}
    return with_changes(size, temporal)


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


class Seconds(NamedTuple):
    """What a block took: by the clock, and the process' own."""

    clock: float
    cpu: float


def timed(steps: Sequence[Callable[[], None]], device: torch.device) -> Seconds:
    """How long these steps take."""
    began, cpu = time.perf_counter(), time.process_time()
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - began, time.process_time() - cpu)


class Ways:
    """The three ways to take a step."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.run = RunConfig(
            precision=options.precision, deepspeed=options.deepspeed, optimizer=OptimizerConfig(max_grad_norm=1.0)
        )
        tokenizer = Tokenizer.load(options.tokenizer)
        self.config = model_size(options, tokenizer)
        config = LoaderConfig(
            batch_size=PerMedia(options.batch * ranks.world_size, options.batch * ranks.world_size),
            image_res=self.config.image_res, threads=options.threads, video_input=VideoInput(options.frames),
        )  # fmt: skip
        self.loader = TrainLoader(
            [options.corpus], tokenizer, config, ranks.rank, ranks.world_size, ranks.ranks_here, device
        )
        self.batches = endless(self.loader)
        self.waited, self.flops, self.taken = 0.0, 0, 0
        self.device, self._keeps = device, len(options.ways) > 1
        self.kept: list[Batch] = []
        model = build_model(self.config, special_ids(tokenizer))
        engine, groups = start_engine(model, self.run, deepspeed_config(self.run, ranks), device)
        engine.train()
        guard = StepGuard(engine, ranks, 10, 1.0)
        schedule = Schedule(0, 10**6, 0.1)
        self.stepper = Stepper(engine, groups, model, schedule, guard, device, options.precision, 0, ranks.rank)
        if "plain" in options.ways:
            self.alone = build_model(self.config, special_ids(tokenizer)).to(device)
            self.optimizer = adamw(self.alone, self.run)

    def block(self, way: str, count: int) -> Seconds:
        """`count` steps of a way."""
        if way == "path":
            self.kept = []
            return timed([self.path] * count, self.device)
        step = self.engine if way == "engine" else self.plain
        return timed([partial(step, batch.to(self.device)) for batch in self.kept], self.device)

    def path(self) -> None:
        """The loader's next batch, through the engine."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        pairs, frames = batch.frames.shape[:2]
        self.flops += FORWARD_AND_BACKWARD * step_flops(self.config, pairs, frames, batch.input_ids.shape[1])["total"]
        self.taken += 1
        self.kept += [batch] if self._keeps else []
        self.stepper(batch, self.taken)

    def engine(self, batch: Batch) -> None:
        """A batch that lies there, through the engine."""
        self.stepper(batch, 1)

    def plain(self, batch: Batch) -> None:
        """A batch that lies there, without DeepSpeed."""
        plain_step(self.alone, self.optimizer, batch, self.run)  # type: ignore[arg-type]


def adamw(model: torch.nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """PyTorch's own optimiser with the groups of a run."""
    named = dict(model.named_parameters())
    wanted = parameter_groups({name: parameter.ndim for name, parameter in named.items()}, run.optimizer)
    groups = [{"params": [named[name] for name in g.names], "weight_decay": g.weight_decay} for g in wanted]
    return torch.optim.AdamW(groups, lr=1e-5, fused=True)


def report(options: argparse.Namespace, ways: Ways, taken: dict[str, list[Seconds]], ranks: Ranks) -> None:
    """Print what was measured."""
    pairs = options.batch * ranks.world_size * options.steps
    for name, blocks in taken.items():
        rate = pairs / statistics.median(block.clock for block in blocks)
        print(f"{name:7} {rate:8.1f} samples/s (median of {options.blocks} blocks of {options.steps} steps)")
    total = sum(block.clock for block in taken["path"])
    print(f"waiting for data: {100 * ways.waited / total:.2f} % of the path's time")
    print(f"memory: {memory(ways.device) / 1e9:.2f} GB {'at most' if ways.device.type == 'cuda' else 'now'}")
    rate, peak = ways.flops / total, peak_flops(ways.device)
    print(f"arithmetic: {rate / 1e12:.3f} TFLOP/s{f', MFU {rate / peak:.3f}' if peak else ''}")
    for name, other in (("path", "engine"), ("engine", "plain")):
        if name in taken and other in taken:
            both = list(zip(taken[name], taken[other], strict=True))
            ratio = statistics.median(theirs.clock / own.clock for own, theirs in both)
            cpu = statistics.median(theirs.cpu / own.cpu for own, theirs in both)
            print(
                f"{name} against {other}: {ratio:.3f}{'' if ways.device.type == 'cuda' else f', {cpu:.3f} by CPU time'}"
            )


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
    parser.add_argument("--frames", type=int, default=1, help="of a clip (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="with path alone, memory is a run's")
    options = parser.parse_args()
    ranks = ranks_from_environment()
    device = device_for(ranks)
    choose_kernels(deterministic=False)
    start_processes(device)
    asked = {"path", *options.ways} - ({"plain"} if ranks.world_size > 1 else set())
    options.ways = [way for way in WAYS if way in asked]
    ways = Ways(options, ranks, device)
    for way in options.ways:
        ways.block(way, 2)
    taken: dict[str, list[Seconds]] = {way: [] for way in options.ways}
    ways.waited, ways.flops = 0.0, 0
    for block in range(options.blocks):
        first, *others = options.ways
        for way in (first, *others[:: -1 if block % 2 else 1]):
            taken[way].append(ways.block(way, options.steps))
    ways.stepper.guard.inspect()
    if ranks.is_first:
        report(options, ways, taken, ranks)
    ways.loader.close()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
