"""Measures what the loader and DeepSpeed add to a training step: shards to optimiser step, against the model alone.

    python benchmarks/training.py --size tiny --corpus data/images           on a CPU
    torchrun --nproc_per_node N benchmarks/training.py --size base --corpus data/photos --batch 128 --precision bf16
    python benchmarks/training.py --size base --corpus data/clips --frames 4 ...      with the temporal encoder
    python benchmarks/training.py --size base --corpus data/photos --decode dali --passes 20 --ways path ...

Three variants of the same steps, in alternating blocks, in one process (or one for each rank):
    path    batches of the loader, DeepSpeed engine: as launch/pretrain.py
    engine  the same engine on the batches of the last block of `path`, kept on the device
    plain   a PyTorch loop without DeepSpeed on those: forward, backward, clipping, AdamW (one process)
Prints median samples/s of each, the share of `path` spent waiting for data, memory, MFU (on a GPU), and the medians of
the blocks' ratios, on a CPU also by CPU time, which other programs disturb less.

An epoch starts with an empty queue. With a small corpus many epochs would start within a block and overstate the time
waiting for data; `--passes` joins that many traversals of it into one epoch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from loaders.batch import Batch
from loaders.config import BACKENDS, LoaderConfig, PerMedia, VideoInput
from loaders.shards import CorpusReader
from loaders.train import TrainLoader
from model.building import build_model
from model.config import ModelConfig, TextConfig, VisionConfig, with_changes
from model.flops import step_flops
from model.singularity import Singularity
from preprocessing.normalization import normalize
from preprocessing.text import Tokenizer
from runtime.ranks import Ranks, ranks_from_environment
from train.config.settings import OptimizerConfig, RunConfig
from train.deepspeed.engine import DTYPES, deepspeed_config, start_engine
from train.guard import StepGuard
from train.job.devices import choose_kernels, device_for, start_processes
from train.optimizer import Schedule, parameter_groups
from train.step import TEXT_LENGTHS, Stepper, without_padding
from train.tracking.metrics import FORWARD_AND_BACKWARD, memory, peak_flops

SIZES = {
    "least": ModelConfig(  # a layer of each kind, soon compiled
        vision_encoder=VisionConfig(width=64, depth=1, heads=1),
        text_encoder=TextConfig(width=64, layers=2, fusion_layer=1, heads=1, intermediate=64, max_positions=64),
        image_res=32,
    ),
    "tiny": ModelConfig(
        vision_encoder=VisionConfig(width=192, depth=4, heads=3),
        text_encoder=TextConfig(width=192, layers=4, fusion_layer=2, heads=3, intermediate=768, max_positions=64),
        image_res=96,
    ),
    "base": ModelConfig(),
}
WAYS = ("path", "engine", "plain")


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """Batches of the loader, epoch after epoch, with padded texts."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def of_each_length(batch: Batch) -> list[Batch]:
    """A padded batch truncated to every length (in tokens) that `without_padding` leaves."""
    lengths = range(TEXT_LENGTHS, batch.input_ids.shape[1] + TEXT_LENGTHS, TEXT_LENGTHS)
    return [
        replace(batch, input_ids=batch.input_ids[:, :length], attention_mask=batch.attention_mask[:, :length])
        for length in lengths
    ]


def model_size(options: argparse.Namespace, tokenizer: Tokenizer) -> ModelConfig:
    """The model of `--size`, temporal if clips have several frames; base keeps BERT's vocabulary size."""
    size = SIZES[options.size]
    words = size.text_encoder.vocab_size if options.size == "base" else tokenizer.vocab_size
    size.text_encoder.vocab_size = max(words, tokenizer.vocab_size)
    if options.frames == 1:
        return size
    temporal = {"num_frames": options.frames, "add_temporal_embed": True, "temporal_vision_encoder.enable": True}
    return with_changes(size, temporal)


def plain_step(model: Singularity, optimizer: torch.optim.Optimizer, batch: Batch, run: RunConfig) -> None:
    """A step without DeepSpeed."""
    dtype = DTYPES[run.precision]
    with torch.autocast(batch.frames.device.type, dtype, enabled=dtype != torch.float32):
        frames = normalize(batch.frames, model.mean, model.std)
        losses = model(frames, batch.input_ids, batch.attention_mask, batch.idx)
        torch.stack(list(losses.values())).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


class Seconds(NamedTuple):
    """Duration of a block: wall and CPU time."""

    clock: float
    cpu: float


def timed(steps: Sequence[Callable[[], None]], device: torch.device) -> Seconds:
    """Duration of these steps."""
    began, cpu = time.perf_counter(), time.process_time()
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - began, time.process_time() - cpu)


class Ways:
    """The three variants of a step."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.run = RunConfig(
            precision=options.precision, deepspeed=options.deepspeed, compile=options.compile,
            optimizer=OptimizerConfig(max_grad_norm=1.0),
        )  # fmt: skip
        tokenizer = Tokenizer.load(options.tokenizer)
        self.config = model_size(options, tokenizer)
        config = LoaderConfig(
            batch_size=PerMedia(options.batch * ranks.world_size, options.batch * ranks.world_size),
            image_res=self.config.image_res, threads=options.threads, video_input=VideoInput(options.frames),
            decode=options.decode, corpus_weights={CorpusReader(options.corpus, {}).corpus.name: options.passes},
        )  # fmt: skip
        self.loader = TrainLoader(
            [options.corpus], tokenizer, config, ranks.rank, ranks.world_size, ranks.local_world_size, device
        )
        self.batches = endless(self.loader)
        self.waited, self.flops, self.taken, self.warmed_up = 0.0, 0, 0, 0.0
        self.device, self._keeps = device, len(options.ways) > 1
        self.kept: list[Batch] = []
        self.model = model = build_model(self.config, tokenizer.special_ids)
        engine, groups = start_engine(model, self.run, deepspeed_config(self.run, ranks), device)
        engine.train()
        guard = StepGuard(engine, ranks, 10, 1.0)
        schedule = Schedule(0, 10**6, 0.1)
        self.stepper = Stepper(engine, groups, model, schedule, guard, device, self.run, ranks.rank)
        if "plain" in options.ways:
            self.alone = build_model(self.config, tokenizer.special_ids).to(device)
            self.optimizer = adamw(self.alone, self.run)

    def block(self, way: str, count: int) -> Seconds:
        """`count` steps of a variant."""
        if way == "path":
            self.kept = []
            return timed([self.path] * count, self.device)
        step = self.engine if way == "engine" else self.plain
        return timed([partial(step, batch.to(self.device)) for batch in self.kept], self.device)

    def every_length(self) -> Seconds:
        """A step of the engine at each text length, so that torch.compile does not compile later."""
        batch = next(self.batches)
        return timed([partial(self.engine, each.to(self.device)) for each in of_each_length(batch)], self.device)

    def path(self) -> None:
        """The loader's next batch, through the engine."""
        began = time.perf_counter()
        batch = without_padding(next(self.batches))
        self.waited += time.perf_counter() - began
        pairs, frames = batch.frames.shape[:2]
        self.flops += FORWARD_AND_BACKWARD * step_flops(self.model, pairs, frames, batch.input_ids.shape[1])["total"]
        self.taken += 1
        self.kept += [batch] if self._keeps else []
        self.stepper(batch, self.taken)

    def engine(self, batch: Batch) -> None:
        """A batch kept on the device, through the engine."""
        self.stepper(batch, 1)

    def plain(self, batch: Batch) -> None:
        """A batch kept on the device, without DeepSpeed."""
        plain_step(self.alone, self.optimizer, batch, self.run)  # type: ignore[arg-type]


def adamw(model: torch.nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """PyTorch's own optimiser with the groups of a run."""
    named = dict(model.named_parameters())
    wanted = parameter_groups({name: parameter.ndim for name, parameter in named.items()}, run.optimizer)
    groups = [{"params": [named[name] for name in g.names], "weight_decay": g.weight_decay} for g in wanted]
    return torch.optim.AdamW(groups, lr=1e-5, fused=True)


def figures(options: argparse.Namespace, ways: Ways, taken: dict[str, list[Seconds]], ranks: Ranks) -> dict[str, Any]:
    """The results; rates in samples/s over all ranks."""
    pairs = options.batch * ranks.world_size * options.steps
    total = sum(block.clock for block in taken["path"])
    peak, rate = peak_flops(ways.device), ways.flops / total
    result: dict[str, Any] = {
        name: getattr(options, name) for name in ("size", "batch", "frames", "precision", "decode", "compile")
    }
    result["samples_per_second"] = {
        name: round(pairs / statistics.median(block.clock for block in blocks), 1) for name, blocks in taken.items()
    }
    result["blocks"] = {name: [round(pairs / block.clock, 1) for block in blocks] for name, blocks in taken.items()}
    result["warm_up_seconds"] = round(ways.warmed_up, 1)
    result["data_wait_percent"] = round(100 * ways.waited / total, 2)
    result["memory_gb"] = round(memory(ways.device) / 1e9, 2)
    result["tflops"] = round(rate / 1e12, 3)
    result["mfu"] = round(rate / peak, 3) if peak else None
    for name, other in (("path", "engine"), ("engine", "plain")):
        if name in taken and other in taken:
            both = list(zip(taken[name], taken[other], strict=True))
            ratio = statistics.median(theirs.clock / own.clock for own, theirs in both)
            cpu = statistics.median(theirs.cpu / own.cpu for own, theirs in both)
            result[f"{name}_against_{other}"] = {"clock": round(ratio, 3), "cpu_time": round(cpu, 3)}
    return result


def report(options: argparse.Namespace, found: dict[str, Any], on_gpu: bool) -> None:
    """Print the results for people."""
    for name, rate in found["samples_per_second"].items():
        print(f"{name:7} {rate:8.1f} samples/s (median of {options.blocks} blocks of {options.steps} steps)")
    print(f"waiting for data: {found['data_wait_percent']:.2f} % of the path's time")
    print(f"memory: {found['memory_gb']:.2f} GB {'at most' if on_gpu else 'now'}")
    mfu = f", MFU {found['mfu']:.3f}" if found["mfu"] else ""
    print(f"compute: {found['tflops']:.3f} TFLOP/s{mfu}")
    for name, other in (("path", "engine"), ("engine", "plain")):
        ratio = found.get(f"{name}_against_{other}")
        if ratio:
            cpu_time = "" if on_gpu else f", {ratio['cpu_time']:.3f} by CPU time"
            print(f"{name} / {other} (higher is better): {ratio['clock']:.3f}{cpu_time}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--corpus", required=True, help="a packed corpus with captions")
    result.add_argument("--tokenizer", required=True, help="a vocab.txt")
    result.add_argument("--size", choices=SIZES, default="tiny")
    result.add_argument("--batch", type=int, default=32, help="pairs a rank (default: %(default)s)")
    result.add_argument("--precision", choices=DTYPES, default="fp32")
    result.add_argument("--deepspeed", default="deepspeed_configs/zero1.json")
    result.add_argument(
        "--compile", action="store_true", help="path and engine with torch.compile; first a step at each text length"
    )
    result.add_argument("--decode", choices=BACKENDS, default="auto", help="(default: %(default)s)")
    result.add_argument("--threads", type=int, default=1, help="decoding threads, 0: the cores (default: %(default)s)")
    result.add_argument("--passes", type=float, default=1, help="traversals in an epoch (default: %(default)s)")
    result.add_argument("--warm-up", type=int, default=2, help="steps that are not counted (default: %(default)s)")
    result.add_argument("--steps", type=int, default=8, help="steps of a block (default: %(default)s)")
    result.add_argument("--blocks", type=int, default=7, help="blocks of each variant (default: %(default)s)")
    result.add_argument("--frames", type=int, default=1, help="frames per clip (default: %(default)s)")
    result.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="variants to measure")
    result.add_argument("--json", action="store_true", help="print the results as JSON")
    return result


def start(options: argparse.Namespace) -> tuple[Ways, Ranks]:
    """Join the other ranks and prepare `options.ways`; `path` is always one of them."""
    ranks = ranks_from_environment()
    device = device_for(ranks)
    choose_kernels(deterministic=False)
    start_processes(device, 0.0)
    asked = {"path", *options.ways} - ({"plain"} if ranks.world_size > 1 else set())
    options.ways = [way for way in WAYS if way in asked]
    return Ways(options, ranks, device), ranks


def end(ways: Ways) -> NoReturn:
    """Exit without waiting for threads of the communication library."""
    ways.loader.close()
    sys.stdout.flush()
    os._exit(0)


def measure(options: argparse.Namespace, ways: Ways) -> dict[str, list[Seconds]]:
    """Seconds of each block of each variant; the first steps of each are not counted."""
    ways.warmed_up = ways.every_length().clock if options.compile else 0.0
    ways.warmed_up += sum(ways.block(way, options.warm_up).clock for way in options.ways)
    taken: dict[str, list[Seconds]] = {way: [] for way in options.ways}
    ways.waited, ways.flops = 0.0, 0
    for block in range(options.blocks):
        first, *others = options.ways
        for way in (first, *others[:: -1 if block % 2 else 1]):
            taken[way].append(ways.block(way, options.steps))
    ways.stepper.guard.inspect()
    return taken


def main() -> NoReturn:
    options = parser().parse_args()
    ways, ranks = start(options)
    found = figures(options, ways, measure(options, ways), ranks)
    if ranks.is_first and options.json:
        print(json.dumps(found))
    elif ranks.is_first:
        report(options, found, ways.device.type == "cuda")
    end(ways)


if __name__ == "__main__":
    main()
