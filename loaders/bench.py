"""`python -m loaders.bench`: measures the loader on this machine, names the bottleneck and the remedy."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import psutil

from loaders.config import BACKENDS, LoaderConfig, PerMedia, VideoInput
from runtime.errors import UserError, command
from runtime.flags import positive
from runtime.program import command_line
from runtime.ranks import cores_per_process

if TYPE_CHECKING:
    from loaders.batch import Batch
    from loaders.train import TrainLoader
    from preprocessing.text import Tokenizer

READ_BOUND_SHARE = 0.3  # share of the time that decoding waits for reading, from which reading is the bottleneck
NEGLIGIBLE_WAIT = 0.02  # share of the time that the loop waits for batches, below which loading costs nothing
REPLAYED = 8  # batches kept for the replay
HALF = (0.5, 0.5, 0.5)
OVERSIZE = 1.5  # stored size over shown size of frames, from which packing them smaller is worth while


@dataclass(frozen=True)
class Results:
    """Results of a benchmark, and the conditions that the advice depends on; shares are of the measured time."""

    samples: int
    seconds: float
    samples_per_second: float
    megabytes_per_second: float  # of stored frames
    cpu_milliseconds_per_sample: float  # over all threads and decoding processes
    first_batch_seconds: float  # from opening the corpora
    read_share: float  # the reading stage was at work
    decode_share: float  # the decoding stage was at work
    decode_wait_share: float  # the decoding stage waited for the reading stage
    decode_alone_per_second: float  # samples of one batch, repeatedly decoded from memory
    wait_share: float  # the loop waited for a batch
    replayed_per_second: float  # the same loop over batches kept in memory: the most that any loader gives
    quarantined: int
    threads: int
    cores: int
    backend: str
    remote: bool
    stored_size: int  # shorter side of stored frames in pixels, 0 when unknown
    shown_size: int


def measure(
    corpora: Sequence[str],
    config: LoaderConfig,
    seconds: float,
    step_seconds: float = 0.0,
    tokenizer: Tokenizer | None = None,
) -> Results:
    """Take batches for that long, a step of `step_seconds` after each; then decode one from memory, then replay some.

    tokenizer: None measures frames only. Raises as TrainLoader.
    """
    from loaders.decode.choice import usual_device
    from loaders.train import TrainLoader

    started = time.perf_counter()
    loader = TrainLoader(corpora, tokenizer, config, device=usual_device())
    try:
        next(iter(loader))
        first = time.perf_counter() - started
        while loader.decoder.name == "auto":  # until it has chosen: the batches of its trial come from both decoders
            for _ in loader:
                if loader.decoder.name != "auto":
                    break
        return take_batches(loader, seconds, first, step_seconds)
    finally:
        loader.close()


def take_batches(loader: TrainLoader, seconds: float, first_batch_seconds: float, step_seconds: float) -> Results:
    """The results of that many seconds of batches, epoch after epoch."""
    before, cpu, began = loader.counters(), cpu_seconds(), time.perf_counter()
    samples, waited = 0, 0.0
    kept: list[Batch] = []
    while time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        for batch in loader:
            waited += time.perf_counter() - asked
            samples += len(batch.keys)
            kept = [*kept[-REPLAYED + 1 :], batch]
            step(batch, step_seconds)
            if time.perf_counter() - began >= seconds:
                break
            asked = time.perf_counter()
    elapsed, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    taken = {name: value - before.get(name, 0) for name, value in loader.counters().items()}
    return Results(
        samples=samples,
        seconds=elapsed,
        samples_per_second=samples / elapsed,
        megabytes_per_second=taken["bytes_read"] / 1e6 / elapsed,
        cpu_milliseconds_per_sample=cpu * 1000 / samples,
        first_batch_seconds=first_batch_seconds,
        read_share=min(1.0, taken["read_seconds"] / elapsed),
        decode_share=min(1.0, taken["decode_seconds"] / elapsed),
        decode_wait_share=min(1.0, taken["decode_wait_seconds"] / elapsed),
        decode_alone_per_second=decode_alone(loader, min(3.0, seconds / 2)),
        wait_share=min(1.0, waited / elapsed),
        replayed_per_second=replay(kept, min(2.0, seconds / 2), step_seconds),
        quarantined=len(loader.quarantine),
        threads=loader.config.threads or cores_per_process(1),
        cores=len(os.sched_getaffinity(0)),
        backend=loader.decoder.name,
        remote=not all(reader.local for reader in loader.readers),
        stored_size=max(int(reader.corpus.settings.get("size", 0)) for reader in loader.readers),
        shown_size=loader.config.image_res,
    )


def cpu_seconds() -> float:
    """CPU time of this process and of the decoding processes that it has now."""
    own = psutil.Process()
    total = sum(own.cpu_times()[:2])
    for process in own.children():
        with suppress(psutil.Error):  # it has just ended
            if "loaders.decode.worker" in process.cmdline():
                total += sum(process.cpu_times()[:2])
    return total


def step(batch: Batch, seconds: float) -> None:
    """A simulated training step: bytes to pixels on the device, then a wait."""
    if seconds:
        import torch

        from loaders.decode.choice import usual_device
        from preprocessing.normalization import normalize

        normalize(batch.to(usual_device()).frames, HALF, HALF, torch.bfloat16)
        time.sleep(seconds)


def replay(batches: Sequence[Batch], seconds: float, step_seconds: float) -> float:
    """Samples per second of the loop over batches that are in memory already."""
    began, done, taken = time.perf_counter(), 0, 0
    while not taken or time.perf_counter() - began < seconds:
        batch = batches[taken % len(batches)]
        step(batch, step_seconds)
        done, taken = done + len(batch.keys), taken + 1
    return done / (time.perf_counter() - began)


def decode_alone(loader: TrainLoader, seconds: float) -> float:
    """Samples per second when the same batch is decoded from memory: the upper bound for faster reading."""
    _, samples = next(loader.read_steps(0, 0))
    clips = [sample.clip() for sample in samples]
    loader.decoder.decode(clips)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        loader.decoder.decode(clips)
        done += len(clips)
    return done / (time.perf_counter() - began)


def advice(results: Results) -> list[str]:
    """Advice on how to speed up loading, most important first."""
    if results.wait_share < NEGLIGIBLE_WAIT:
        share = results.samples_per_second / results.replayed_per_second
        return [f"The loader is not a bottleneck: the loop has {share:.0%} of its speed with batches in memory."]
    if results.decode_wait_share > READ_BOUND_SHARE:
        remedy = "copy the shards to a local disk, or raise prefetch" if results.remote else "use a faster disk"
        return [
            f"Reading is the bottleneck: decoding waits for it {results.decode_wait_share:.0%} of the time: {remedy}. "
            f"Decoding alone reaches {results.decode_alone_per_second:,.0f} samples/s."
        ]
    found = ["Decoding by DALI is the bottleneck."]
    if results.backend == "cpu" and results.threads < results.cores:
        found = [f"Decoding is the bottleneck, on {results.threads} of {results.cores} cores: raise threads."]
    elif results.backend == "cpu":
        found = [f"Decoding is the bottleneck, on all {results.cores} cores: use more cores, or a GPU (decode=dali)."]
    if results.stored_size > OVERSIZE * results.shown_size:
        found.append(
            f"Frames are stored at {results.stored_size} pixels and shown at {results.shown_size}: pack them with "
            f"--size {round(results.shown_size * 8 / 7)} to read and decode less."
        )
    if results.quarantined:
        found.append(f"{results.quarantined} samples are bad: see `python -m sharding.verify`.")
    return found


def table(results: Results) -> str:
    """The results for people."""
    rows = [
        ("samples/s", f"{results.samples_per_second:,.0f}", f"{results.samples:,} in {results.seconds:.1f} s"),
        ("MB/s", f"{results.megabytes_per_second:.1f}", "of stored frames"),
        ("first batch", f"{results.first_batch_seconds:.2f} s", "after opening the corpora"),
        ("reading", f"{results.read_share:.0%}", "of the time the reading stage was busy"),
        ("decoding", f"{results.decode_share:.0%}", f"of the time; {results.threads} threads, {results.backend}"),
        ("waiting", f"{results.decode_wait_share:.0%}", "of the time decoding waited for reading"),
        ("decoding alone", f"{results.decode_alone_per_second:,.0f}/s", "from memory: the bound for faster reading"),
        ("step waits", f"{results.wait_share:.0%}", "of the time the loop waited for a batch"),
        ("replayed", f"{results.replayed_per_second:,.0f}/s", "loop over batches in memory: the bound for loading"),
        ("CPU", f"{results.cpu_milliseconds_per_sample:.2f} ms", "per sample, all threads and decoding processes"),
    ]
    lines = [f"{name:<15}{value:>12}   {note}" for name, value, note in rows]
    return "\n".join([*lines, "", *advice(results)])


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """{"key": "value"} of KEY=VALUE texts; raises ValueError when one is not of that form."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise UserError(f"--storage {wrong[0]}: must be KEY=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("loaders.bench"), description="Measure loader throughput on this machine and name the bottleneck."
    )
    result.add_argument("corpora", nargs="+", metavar="URL", help="folders or URLs of packed corpora")
    result.add_argument("--batch-size", type=positive, default=128, help="samples per batch (default: %(default)s)")
    result.add_argument(
        "--size", type=positive, default=224, help="pixels of a cropped frame's side (default: %(default)s)"
    )
    result.add_argument("--frames", type=positive, default=1, help="frames per clip (default: %(default)s)")
    result.add_argument("--threads", type=int, default=0, help="decoding threads or processes (default: the cores)")
    result.add_argument("--decode", default="auto", choices=BACKENDS, help="(default: %(default)s)")
    result.add_argument("--prefetch", type=positive, default=3, help="batches prefetched (default: %(default)s)")
    result.add_argument("--step-ms", type=float, default=0, help="simulated time of a training step (default: none)")
    result.add_argument("--seconds", type=float, default=10, help="duration of the measurement (default: %(default)s)")
    result.add_argument("--storage", nargs="*", default=[], metavar="KEY=VALUE", help="fsspec options of the URLs")
    result.add_argument("--tokenizer", metavar="NAME", help="tokenize texts too: vocab.txt, its folder, or a hub name")
    result.add_argument("--json", action="store_true", help="print the results as JSON")
    return result


def configuration(options: argparse.Namespace) -> LoaderConfig:
    """The loader's settings for a benchmark; batches are no larger than the corpora allow."""
    from loaders.shards import describe

    config = LoaderConfig(
        image_res=options.size,
        video_input=VideoInput(num_frames=options.frames),
        threads=options.threads,
        decode=options.decode,
        prefetch=options.prefetch,
        storage=parse_options(options.storage),
        max_bad_share=1.0,
    )
    corpora = [describe(url, config) for url in options.corpora]
    if options.tokenizer and not all(sum(corpus.counts("captions")) for corpus in corpora):
        config.epoch_unit = "questions"
    sizes = {"image": 0, "video": 0}
    for corpus in corpora:
        sizes[corpus.media_type] += sum(corpus.counts(config.epoch_unit))
    config.batch_size = PerMedia(**{kind: min(options.batch_size, count) for kind, count in sizes.items()})
    return config


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    from preprocessing.text import Tokenizer

    config = configuration(options)
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    gc.collect()
    gc.freeze()  # as training does
    results = measure(options.corpora, config, options.seconds, options.step_ms / 1000, tokenizer)
    sys.stdout.write((json.dumps(asdict(results)) if options.json else table(results)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
