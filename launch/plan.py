"""`python -m launch.plan`: an epoch's time, egress, requests and cost on N nodes, from given or measured numbers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from loaders.config import LoaderConfig, PerMedia
from loaders.train import TrainLoader
from runtime.errors import UserError, command
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
        means = {
            field.name: (getattr(self, field.name) * self.samples + getattr(other, field.name) * other.samples)
            / max(1, total)
            for field in fields(Medium)[1:]
        }
        return Medium(total, **means)


# Bytes: photos and frames of 224 pixels as `sharding.build` writes them, measured (docs/scaling.md). Samples: Table 15
# of the paper. A clip of WebVid is 18 s long, 36 frames at 2 a second, of which an epoch shows one. A request for each,
# and some for indices: in a large corpus the samples of a batch lie too far apart to come in one.
PHOTO = Medium(0, 7_500, 1.1, 9_200)
CLIP = Medium(0, 18_000, 1.1, 36 * 15_500)
SETS = {
    "webvid_cc3m": (replace(PHOTO, samples=2_950_000), replace(CLIP, samples=2_490_000)),
    "webvid_14m": (replace(PHOTO, samples=14_790_000), replace(CLIP, samples=2_490_000)),
}


@dataclass(frozen=True)
class Cluster:
    """What a plan is made for; the command line's options say more."""

    gpus: int = 8  # of a node
    gpu_rate: float = 200.0  # samples a second that one GPU trains on
    batch: int = 128  # of a GPU
    parameters: float = 202e6
    decode_rate: float = 16_000.0  # samples a second that one node decodes
    node_gbit: float = 25.0  # of a node's network
    overlap: bool = False  # the all-reduce runs beside the backward pass: overlap_comm of the DeepSpeed JSON
    store_requests: float = 5_500.0  # a second that the store answers under one prefix (a corpus)
    node_requests: float = 3_000.0  # a second that one node sends: remote.requests_per_second
    prefixes: int = 1  # that the corpora are spread over
    store_gbit: float = 0.0  # that the store gives altogether; 0: no limit
    epochs: int = 10
    gpu_hour: float = 2.0  # dollars
    egress_gb: float = 0.0
    requests_1000: float = 0.0004
    storage_gb_month: float = 0.023


@dataclass(frozen=True)
class Plan:
    """An epoch on so many nodes. `times`: seconds that each part would need alone."""

    nodes: int
    samples: int
    times: dict[str, float]
    training: float  # seconds of the GPU and the all-reduce together
    egress_bytes: float  # of an epoch
    requests: float  # of an epoch
    stored_bytes: float
    cost: dict[str, float]  # dollars, of all epochs

    @property
    def binds(self) -> str:
        """The part that decides the time; of GPU and all-reduce, which belong to one step, the longer one."""
        beside = max((part for part in self.times if part not in STEP_PARTS), key=lambda part: self.times[part])
        return beside if self.times[beside] > self.training else max(STEP_PARTS, key=lambda part: self.times[part])

    @property
    def seconds(self) -> float:
        """Of an epoch: reading and decoding go on while the GPUs train."""
        return max(self.training, *self.times.values())


def training_seconds(gpu: float, all_reduce: float, overlap: bool) -> float:
    """Of steps whose arithmetic and exchange would take so long alone.

    DeepSpeed's ZeRO 1 starts the exchange after the backward pass. With overlap_comm the gradients, two thirds of it,
    go beside the backward pass, two thirds of the arithmetic; the weights follow the optimizer's step.
    """
    return (gpu + all_reduce) / 3 + max(gpu, all_reduce) * 2 / 3 if overlap else gpu + all_reduce


def make_plan(medium: Medium, cluster: Cluster, nodes: int) -> Plan:
    """The plan for a training set on so many nodes."""
    gpus = nodes * cluster.gpus
    egress = medium.samples * medium.bytes_shown
    requests = medium.samples * medium.requests
    # Gradients in bf16 go twice around the ring of nodes (ZeRO 1 and 2 all-reduce them by default), updated weights
    # once; within a node over faster links.
    reduced = 3 * 2 * cluster.parameters * (nodes - 1) / nodes
    times = {
        "GPU": medium.samples / (gpus * cluster.gpu_rate),
        "all-reduce": medium.samples / (gpus * cluster.batch) * reduced * 8e-9 / cluster.node_gbit,
        "decode": medium.samples / (nodes * cluster.decode_rate),
        "network": egress * 8e-9 / (nodes * cluster.node_gbit),
        "node's requests": requests / (nodes * cluster.node_requests),
        "store's requests": requests / (cluster.store_requests * cluster.prefixes),
    }
    if cluster.store_gbit:
        times["store's bytes"] = egress * 8e-9 / cluster.store_gbit
    stored = medium.samples * medium.bytes_stored
    training = training_seconds(times["GPU"], times["all-reduce"], cluster.overlap)
    run = max(training, *times.values()) * cluster.epochs
    cost = {
        "GPUs": gpus * run / 3600 * cluster.gpu_hour,
        "egress": egress * cluster.epochs * 1e-9 * cluster.egress_gb,
        "requests": requests * cluster.epochs / 1000 * cluster.requests_1000,
        "storage": stored * 1e-9 * cluster.storage_gb_month * max(1.0, run / MONTH),
    }
    return Plan(nodes, medium.samples, times, training, egress, requests, stored, cost)


def measure(corpora: Sequence[str], config: LoaderConfig) -> tuple[Medium, float]:
    """Read one epoch of corpora and count: what a sample takes, and the seconds of the epoch.

    Raises:
        FileNotFoundError, ValueError: as TrainLoader.
    """
    import time

    loader = TrainLoader(corpora, None, config)  # frames only: texts are read with the indices
    try:
        opened = loader.counters()
        began = time.perf_counter()
        samples = sum(len(batch.keys) for batch in loader)
        seconds = time.perf_counter() - began
        figures = loader.counters()
        shards = [shard for reader in loader.readers for shard in reader.corpus.shards]
    finally:
        loader.close()
    taken = {
        name: figures.get(name, 0.0) - opened.get(name, 0.0) for name in ("requests", "bytes_fetched", "bytes_read")
    }
    stored = sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)
    shown = taken["bytes_fetched"] or taken["bytes_read"]
    return Medium(samples, shown / samples, taken["requests"] / samples, stored), seconds


def advice(plan: Plan) -> str:
    """What to do about the part that binds."""
    return {
        "GPU": "GPUs bind, as it should be: more of them make it faster.",
        "all-reduce": "The network between nodes binds: a larger batch a GPU, faster links, fewer nodes, or "
        "overlap_comm in the DeepSpeed JSON (deepspeed_configs/zero2.json has it; --overlap).",
        "decode": "Decoding binds: GPU decoding (decode=dali), more cores, or frames packed smaller (--size).",
        "network": "The nodes' network binds: a cache (cache.folder), or frames packed smaller (--size).",
        "node's requests": "A node's request rate binds: raise remote.requests_per_second (--node-requests) where the "
        "store allows it, or let photos come in blocks (cache.folder, --cached).",
        "store's requests": "The store's request rate binds: spread the corpora over several prefixes or buckets "
        "(--prefixes), or let photos come in blocks (cache.folder, --cached).",
        "store's bytes": "The store's bandwidth binds: a cache (cache.folder), or a store nearer to the nodes.",
    }[plan.binds]


def table(plans: Sequence[Plan], cluster: Cluster) -> str:
    """Plans for people."""
    first = plans[0]
    lines = [
        f"{first.samples:,} samples: {data_size(first.stored_bytes)} stored; an epoch takes "
        f"{data_size(first.egress_bytes)} in {first.requests:,.4g} requests.",
        "",
        f"{'nodes':>5} {'GPUs':>5} {'epoch':>9} {f'{cluster.epochs} epochs':>10}  {'binds':<17}{'next':<27}"
        f"{'GB/s':>6} {'req/s':>7} {'$ GPUs':>9} {'$ store':>8}",
    ]
    for plan in plans:
        others = {part: seconds / plan.seconds for part, seconds in plan.times.items() if part != plan.binds}
        part, share = max(others.items(), key=lambda item: item[1])
        second = f"{part} ({share:.0%})"
        store = sum(value for part, value in plan.cost.items() if part != "GPUs")
        lines.append(
            f"{plan.nodes:>5} {plan.nodes * cluster.gpus:>5} {duration(plan.seconds):>9} "
            f"{duration(plan.seconds * cluster.epochs):>10}  {plan.binds:<17}{second:<27}"
            f"{plan.egress_bytes / plan.seconds / 1e9:>6.2g} {plan.requests / plan.seconds:>7,.0f} "
            f"{plan.cost['GPUs']:>9,.0f} {store:>8,.0f}"
        )
    return "\n".join([*lines, "", *dict.fromkeys(advice(plan) for plan in plans)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("python -m launch.plan", description=__doc__)
    result.add_argument("--set", choices=SETS, help="a training set of the paper")
    result.add_argument("--measure", nargs="+", metavar="URL", help="read an epoch of these corpora and count instead")
    result.add_argument(
        "--scale-to", type=int, help="samples of the planned set, where measured corpora are a part of it"
    )
    result.add_argument("--cached", action="store_true", help="photos come in blocks of 1 MiB (cache.folder is set)")
    result.add_argument("--nodes", type=int, nargs="+", default=list(NODES), help="(default: %(default)s)")
    result.add_argument("--json", action="store_true", help="print the plans as JSON")
    own = Cluster()
    for name, text in {
        "gpus": "GPUs of a node", "gpu_rate": "samples a second that a GPU trains on", "batch": "samples of a GPU",
        "parameters": "of the model", "decode_rate": "samples a second that a node decodes",
        "node_gbit": "Gbit/s of a node's network", "store_requests": "requests a second under one prefix of the store",
        "node_requests": "requests a second that one node may send (remote.requests_per_second)",
        "prefixes": "prefixes of the store that the corpora are spread over",
        "store_gbit": "Gbit/s that the store gives altogether, 0 for any", "epochs": "epochs of the run",
        "gpu_hour": "dollars a GPU-hour", "egress_gb": "dollars a GB out of the store", "requests_1000": "dollars",
        "storage_gb_month": "dollars",
    }.items():  # fmt: skip
        value = getattr(own, name)
        option = "--" + name.replace("_", "-")
        result.add_argument(option, type=type(value), default=value, help=f"{text} (default: %(default)s)")
    result.add_argument("--overlap", action="store_true", help="the DeepSpeed JSON sets overlap_comm")
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
    cluster = Cluster(**{field.name: getattr(options, field.name) for field in fields(Cluster)})
    medium = chosen_medium(options)
    plans = [make_plan(medium, cluster, nodes) for nodes in options.nodes]
    if options.json:
        told = [{**asdict(plan), "seconds": plan.seconds, "binds": plan.binds} for plan in plans]
        sys.stdout.write(json.dumps(told, indent=1) + "\n")
    else:
        sys.stdout.write(table(plans, cluster) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
