"""`python -m launch.plan`: an epoch's time, egress, requests and cost on N nodes, from given or measured numbers."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace

from loaders.config import LoaderConfig, PerMedia
from runtime.errors import UserError, command
from runtime.flags import add_flags, flag
from runtime.program import as_started, command_line
from runtime.units import data_size, duration

NODES = (1, 2, 4, 8, 16, 32, 64)
MONTH = 30 * 86400.0
STEP_PARTS = ("GPU", "all-reduce")


@dataclass(frozen=True)
class Medium:
    """The photos or the clips of a training set."""

    samples: int
    bytes_shown: float  # fetched for one sample an epoch: its frames that are shown, its part of the index
    requests: float  # for one sample an epoch
    bytes_stored: float  # of one sample, all its frames

    def __add__(self, other: Medium) -> Medium:
        """Both together, means weighted by samples."""
        total = self.samples + other.samples
        share = self.samples / max(1, total)
        pairs = zip(astuple(self)[1:], astuple(other)[1:])
        return Medium(total, *(share * one + (1 - share) * another for one, another in pairs))


# Bytes: photos and frames of 224 pixels as `sharding.build` writes them, measured (docs/scaling.md). Samples: Table 15
# of the paper. A clip of WebVid is 18 s long, 36 frames at 2 a second, of which an epoch shows one. A request for each,
# and some for indices: in a large corpus the samples of a batch are too far apart for one request.
PHOTO = Medium(0, 7_500, 1.1, 9_200)
CLIP = Medium(0, 18_000, 1.1, 36 * 15_500)
SETS = {
    "webvid_cc3m": (replace(PHOTO, samples=2_950_000), replace(CLIP, samples=2_490_000)),
    "webvid_14m": (replace(PHOTO, samples=14_790_000), replace(CLIP, samples=2_490_000)),
}
# Samples per second of single-frame pre-training, loader and DeepSpeed included, as measured: benchmarks/RESULTS.md.
MEASURED_CARD, MEASURED_RATE = "H200", 874.0
TEXT_TOKENS = 32  # max_txt_l of pre-training


@dataclass(frozen=True)
class Cluster:
    """The cluster that a plan is for."""

    gpus: int = flag(8, "GPUs of a node (default: %(default)s)")
    gpu_rate: float = flag(200.0, "samples per second that one GPU trains on (default: %(default)s)")
    efficiency: float = flag(
        1.0, "share of that rate that each of several GPUs keeps, besides the all-reduce (default: %(default)s)"
    )
    batch: int = flag(128, "batch size of one GPU (default: %(default)s)")
    parameters: float = flag(202e6, "parameters of the model (default: %(default)s)")
    decode_rate: float = flag(16_000.0, "samples per second that one node decodes (default: %(default)s)")
    node_gbit: float = flag(25.0, "Gbit/s of a node's network (default: %(default)s)")
    overlap: bool = flag(False, "the DeepSpeed JSON sets overlap_comm")
    store_requests: float = flag(5_500.0, "requests per second for each prefix of the store (default: %(default)s)")
    node_requests: float = flag(
        3_000.0, "requests per second of one node, remote.requests_per_second (default: %(default)s)"
    )
    prefixes: int = flag(1, "prefixes of the store that the corpora are spread over (default: %(default)s)")
    store_gbit: float = flag(0.0, "Gbit/s of the store altogether, 0 for no limit (default: %(default)s)")
    epochs: int = flag(10, "epochs of the run (default: %(default)s)")
    gpu_hour: float = flag(2.0, "dollars per GPU-hour (default: %(default)s)")
    egress_gb: float = flag(0.0, "dollars per GB read from the store (default: %(default)s)")
    requests_1000: float = flag(0.0004, "dollars per 1,000 requests (default: %(default)s)")
    storage_gb_month: float = flag(0.023, "dollars per GB stored for a month (default: %(default)s)")


@dataclass(frozen=True)
class Plan:
    """An epoch at the full image size on `nodes` nodes. `times`: seconds that each part would need alone."""

    nodes: int
    gpus: int
    samples: int
    times: dict[str, float]
    training: float  # seconds of the GPU and the all-reduce together
    egress_bytes: float  # of an epoch
    requests: float  # of an epoch
    stored_bytes: float
    run_seconds: float  # of all epochs
    cost: dict[str, float]  # dollars, of all epochs

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all epochs."""
        return self.gpus * self.run_seconds / 3600

    @property
    def bottleneck(self) -> str:
        """The part that decides the time; of GPU and all-reduce, which make up a step, the longer one."""
        others = max((part for part in self.times if part not in STEP_PARTS), key=lambda part: self.times[part])
        return others if self.times[others] > self.training else max(STEP_PARTS, key=lambda part: self.times[part])

    @property
    def seconds(self) -> float:
        """Seconds of an epoch: reading and decoding overlap with training."""
        return max(self.training, *self.times.values())


def training_seconds(gpu: float, all_reduce: float, overlap: bool) -> float:
    """Time of steps whose arithmetic and all-reduce would take these times alone.

    ZeRO 1 communicates after the backward pass. With overlap_comm the gradients, two thirds of the bytes, are reduced
    during the backward pass, two thirds of the arithmetic; the weights follow the optimizer step.
    """
    return (gpu + all_reduce) / 3 + max(gpu, all_reduce) * 2 / 3 if overlap else gpu + all_reduce


def make_plan(medium: Medium, cluster: Cluster, nodes: int, smaller: Sequence[tuple[float, int]] = ()) -> Plan:
    """The plan for a training set on `nodes` nodes.

    smaller: (share of the arithmetic of the full image size, epochs) of the epochs at smaller sizes.
    """
    gpus = nodes * cluster.gpus
    rate = gpus * cluster.gpu_rate * (cluster.efficiency if gpus > 1 else 1.0)
    egress = medium.samples * medium.bytes_shown
    requests = medium.samples * medium.requests
    # Gradients in bf16 go twice around the ring of nodes (ZeRO 1 and 2 all-reduce them by default), updated weights
    # once; within a node over faster links.
    reduced = 3 * 2 * cluster.parameters * (nodes - 1) / nodes
    times = {
        "GPU": medium.samples / rate,
        "all-reduce": medium.samples / (gpus * cluster.batch) * reduced * 8e-9 / cluster.node_gbit,
        "decode": medium.samples / (nodes * cluster.decode_rate),
        "network": egress * 8e-9 / (nodes * cluster.node_gbit),
        "node's requests": requests / (nodes * cluster.node_requests),
        "store's requests": requests / (cluster.store_requests * cluster.prefixes),
    }
    if cluster.store_gbit:
        times["store's bytes"] = egress * 8e-9 / cluster.store_gbit
    stored = medium.samples * medium.bytes_stored

    def epoch_seconds(share: float) -> float:
        step = training_seconds(share * times["GPU"], times["all-reduce"], cluster.overlap)
        return max(step, *(seconds for part, seconds in times.items() if part not in STEP_PARTS))

    full = cluster.epochs - sum(epochs for _, epochs in smaller)
    run = full * epoch_seconds(1.0) + sum(epochs * epoch_seconds(share) for share, epochs in smaller)
    training = training_seconds(times["GPU"], times["all-reduce"], cluster.overlap)
    cost = {
        "GPUs": gpus * run / 3600 * cluster.gpu_hour,
        "egress": egress * cluster.epochs * 1e-9 * cluster.egress_gb,
        "requests": requests * cluster.epochs / 1000 * cluster.requests_1000,
        "storage": stored * 1e-9 * cluster.storage_gb_month * max(1.0, run / MONTH),
    }
    return Plan(nodes, gpus, medium.samples, times, training, egress, requests, stored, run, cost)


def card_rate(card: str) -> float:
    """Samples per second of one GPU at the MFU of the measured one; raises UserError for an unknown card."""
    from train.tracking.metrics import PEAKS, named_peak

    peak, measured = named_peak(card), named_peak(MEASURED_CARD)
    if peak is None or measured is None:
        raise UserError(f"--card {card} is not known: give --gpu-rate, or one of {', '.join(PEAKS)}")
    return MEASURED_RATE * peak / measured


def relative_flops(sizes: Sequence[int], full: int = 224) -> list[float]:
    """Arithmetic of a step of the published model with images of these sizes, relative to that with `full`."""
    import torch

    from model.building import build_model
    from model.config import ModelConfig
    from model.flops import step_flops

    flops = {}
    for size in {*sizes, full}:
        with torch.device("meta"):  # no memory
            model = build_model(ModelConfig(image_res=size))
        flops[size] = step_flops(model, Cluster.batch, 1, TEXT_TOKENS)["total"]
    return [flops[size] / flops[full] for size in sizes]


def smaller_epochs(pairs: Sequence[str], epochs: int) -> list[tuple[float, int]]:
    """(share of the arithmetic, epochs) of `--image-res SIZE:EPOCHS ...`; raises UserError where that cannot be."""
    found = [re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pair) for pair in pairs]
    schedule = [(int(each[1]), int(each[2])) for each in found if each]
    if len(schedule) < len(pairs) or sum(count for _, count in schedule) > epochs:
        raise UserError(
            f"--image-res {' '.join(pairs)}: must be SIZE:EPOCHS ..., such as 112:8, of not more than {epochs} epochs"
        )
    return list(zip(relative_flops([size for size, _ in schedule]), [count for _, count in schedule]))


def measure(corpora: Sequence[str], config: LoaderConfig) -> tuple[Medium, float]:
    """Read one epoch of corpora and count: what a sample takes, and the seconds of the epoch; raises as TrainLoader."""
    from loaders.train import TrainLoader

    loader = TrainLoader(corpora, None, config)  # frames only: texts are read with the indices
    try:
        before = loader.counters()
        began = time.perf_counter()
        samples = sum(len(batch.keys) for batch in loader)
        seconds = time.perf_counter() - began
        counts = {name: count - before.get(name, 0.0) for name, count in loader.counters().items()}
        shards = [shard for reader in loader.readers for shard in reader.corpus.shards]
    finally:
        loader.close()
    stored = sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)
    fetched = counts.get("bytes_fetched", 0.0) or counts.get("bytes_read", 0.0)
    return Medium(samples, fetched / samples, counts.get("requests", 0.0) / samples, stored), seconds


ADVICE = {
    "GPU": "The GPUs are the bottleneck, as intended: more nodes shorten the epoch.",
    "all-reduce": "The network between nodes is the bottleneck: a larger batch per GPU, faster links, fewer nodes, or "
    "overlap_comm in the DeepSpeed JSON (deepspeed_configs/zero2.json has it; --overlap).",
    "decode": "Decoding is the bottleneck: decode on the GPU (decode=dali), add cores, or pack smaller frames.",
    "network": "The network of the nodes is the bottleneck: a cache (cache.folder), or smaller frames (--size).",
    "node's requests": "The request rate of a node is the bottleneck: raise remote.requests_per_second "
    "(--node-requests) where the store allows it, or read photos in blocks (cache.folder, --cached).",
    "store's requests": "The request rate of the store is the bottleneck: spread the corpora over several prefixes or "
    "buckets (--prefixes), or read photos in blocks (cache.folder, --cached).",
    "store's bytes": "The bandwidth of the store is the bottleneck: a cache (cache.folder), or a store nearer by.",
}


def table(plans: Sequence[Plan], cluster: Cluster) -> str:
    """The plans as text."""
    first = plans[0]
    lines = [
        f"{first.samples:,} samples: {data_size(first.stored_bytes)} stored; an epoch takes "
        f"{data_size(first.egress_bytes)} in {first.requests:,.4g} requests.",
        "",
        f"{'nodes':>5} {'GPUs':>5} {'epoch':>9} {f'{cluster.epochs} epochs':>10}  {'bottleneck':<17}{'next':<27}"
        f"{'GB/s':>6} {'req/s':>7} {'GPU hours':>9} {'$ GPUs':>9} {'$ store':>8}",
    ]
    for plan in plans:
        others = {part: seconds / plan.seconds for part, seconds in plan.times.items() if part != plan.bottleneck}
        part, share = max(others.items(), key=lambda item: item[1])
        second = f"{part} ({share:.0%})"
        store = sum(value for part, value in plan.cost.items() if part != "GPUs")
        lines.append(
            f"{plan.nodes:>5} {plan.gpus:>5} {duration(plan.seconds):>9} "
            f"{duration(plan.run_seconds):>10}  {plan.bottleneck:<17}{second:<27}"
            f"{plan.egress_bytes / plan.seconds / 1e9:>6.2g} {plan.requests / plan.seconds:>7,.0f} "
            f"{plan.gpu_hours:>9,.0f} {plan.cost['GPUs']:>9,.0f} {store:>8,.0f}"
        )
    return "\n".join([*lines, "", *dict.fromkeys(ADVICE[plan.bottleneck] for plan in plans)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(command_line("launch.plan"), description=as_started(__doc__))
    result.add_argument("--set", choices=SETS, help="a training set of the paper")
    result.add_argument("--measure", nargs="+", metavar="URL", help="read an epoch of these corpora and count instead")
    result.add_argument(
        "--scale-to", type=int, help="number of samples to plan for, if the measured corpora are a sample"
    )
    result.add_argument("--cached", action="store_true", help="read images in blocks of 1 MiB (cache.folder is set)")
    result.add_argument("--nodes", type=int, nargs="+", default=list(NODES), help="(default: %(default)s)")
    result.add_argument(
        "--card",
        help=f"for a GPU such as A100: --gpu-rate at the MFU measured on an {MEASURED_CARD}, {MEASURED_RATE:g}/s",
    )
    result.add_argument(
        "--image-res", nargs="+", default=[], metavar="SIZE:EPOCHS", help="epochs at smaller sizes than 224: 112:8"
    )
    result.add_argument("--json", action="store_true", help="print the plans as JSON")
    add_flags(result, Cluster)
    return result


def chosen_medium(options: argparse.Namespace) -> Medium:
    """The training set of a command line."""
    if options.measure:
        size = PerMedia(64, 64)
        medium, _ = measure(options.measure, LoaderConfig(batch_size=size))
        return replace(medium, samples=options.scale_to or medium.samples)
    if not options.set:
        raise UserError("name a training set: --set webvid_cc3m, or --measure URL ... for packed corpora")
    photos, clips = SETS[options.set]
    if options.cached:
        photos = replace(photos, bytes_shown=photos.bytes_stored, requests=photos.bytes_stored / 2**20)
    return photos + clips


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    cluster = Cluster(**{name: value for name, value in vars(options).items() if hasattr(Cluster, name)})
    if options.card:
        if "gpu_rate" in options:
            raise UserError("--card and --gpu-rate both give the rate of a GPU: leave out one")
        cluster = replace(cluster, gpu_rate=card_rate(options.card))
    if min(cluster.gpus, cluster.gpu_rate, cluster.efficiency, *options.nodes) <= 0:
        raise UserError("--nodes, --gpus, --gpu-rate and --efficiency must be above 0")
    medium, smaller = chosen_medium(options), smaller_epochs(options.image_res, cluster.epochs)
    plans = [make_plan(medium, cluster, nodes, smaller) for nodes in options.nodes]
    if options.json:
        found = [
            {**asdict(plan), "seconds": plan.seconds, "gpu_hours": plan.gpu_hours, "bottleneck": plan.bottleneck}
            for plan in plans
        ]
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write(table(plans, cluster) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
