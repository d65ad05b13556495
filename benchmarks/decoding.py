"""Compares decoders on a packed corpus: DALI, and libjpeg-turbo with OpenCV in processes on the CPU.

    python benchmarks/decoding.py data/photos --size 224 --batch 128
    python benchmarks/decoding.py data/photos --hw-load 0 0.65 1 --fancy on off      settings of DALI's decoder on a GPU

Without a GPU DALI's graph runs on the CPU. Prints JSON: images/s of each decoder, in alternating rounds, and the
difference of their pixels in grey levels of 255. Several batches are decoded at once, as in the loader. Exit code 1
if the mean difference exceeds two grey levels with fancy upsampling, which the CPU also uses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from loaders.config import LoaderConfig
from loaders.decode.choice import make_decoder
from loaders.decode.decoder import BATCHES_AT_ONCE, Decoder
from loaders.evaluation import VisualSet
from loaders.samples import Clip, Window, whole_sample
from runtime.ranks import cores_per_process

LARGEST_MEAN = 2.0  # grey levels: the kernels differ, DALI's is Catmull-Rom's; of photos they do by 0.7


def read_clips(url: str, count: int) -> list[Clip]:
    """The first frame of up to `count` samples, each with a random crop."""
    visuals, random = VisualSet(url, LoaderConfig()), np.random.default_rng(0)
    clips = []
    for visual in range(min(count, visuals.num_visuals)):
        shard, row = visuals.locate(visual)
        record = visuals.reader.index(shard).record(row)
        (sample,) = visuals.reader.read([whole_sample(record, np.zeros(1, np.int64))])
        if sample.reason:
            continue
        height, width = (
            int(side * share) for side, share in zip((record.height, record.width), random.uniform(0.7, 1, 2))
        )
        top, left = random.integers(record.height - height + 1), random.integers(record.width - width + 1)
        window = Window(int(top), int(left), height, width, flip=bool(random.integers(2)))
        clips.append(Clip(sample.jpegs, record.height, record.width, window))
    visuals.close()
    return clips


def rate(decoder: Decoder, batches: list[list[Clip]], seconds: float) -> float:
    """Images/s over about that many seconds, with as many concurrent batches as in the loader."""
    began, done = time.perf_counter(), 0
    with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:
        while not done or time.perf_counter() - began < seconds:
            done += sum(len(frames) for frames, _ in pool.map(decoder.decode, batches))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done / (time.perf_counter() - began)


def deviation(dali: Decoder, cpu: Decoder, batches: list[list[Clip]]) -> dict[str, float]:
    """Differences of the pixels in grey levels."""
    largest, total, count = 0, 0.0, 0
    for batch in batches:
        one, other = (decoder.decode(batch)[0].cpu().int() for decoder in (dali, cpu))
        difference = (one - other).abs()
        largest, total = max(largest, int(difference.max())), total + float(difference.sum())
        count += difference.numel()
    return {"largest": largest, "mean": round(total / count, 4)}


def dali_decoder(size: int, threads: int, batch: list[Clip], load: float | None = None, fancy: bool = True) -> Decoder:
    """A DALI decoder with pipelines built for batches like `batch`.

    load: share of the GPU's JPEG engines, None: the loader's; fancy: whether chroma is upsampled smoothly.
    """
    from nvidia.dali import fn

    from loaders.decode.dali import DaliDecoder

    plain = fn.decoders.image

    def with_upsampling(*inputs: Any, **settings: Any) -> Any:
        return plain(*inputs, **(settings | {"jpeg_fancy_upsampling": fancy}))

    number = torch.cuda.current_device() if torch.cuda.is_available() else None
    loads = {} if load is None else {"hw_decoder_load": load}
    with mock.patch.object(fn.decoders, "image", with_upsampling):
        decoder = DaliDecoder(size, threads, False, number, **loads)
        with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:  # all at once, so that each pipeline is built
            list(pool.map(decoder.decode, [batch] * BATCHES_AT_ONCE))
    return decoder


def cpu_decoder(size: int, threads: int) -> Decoder:
    """The CPU decoder, as in a run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return make_decoder("cpu", size, threads, antialias=False, device=device)


def make_decoders(
    options: argparse.Namespace, threads: int, largest: list[Clip]
) -> tuple[dict[str, Decoder], dict[str, str]]:
    """Name -> decoder (each DALI setting, and the CPU), and why the GPU cannot run a setting."""
    result, failed = {}, {}
    for load, fancy in itertools.product(options.hw_load or [None], options.fancy):
        name = "dali" + ("" if load is None else f" load {load:g}") + ("" if fancy == "on" else " plain upsampling")
        try:
            result[name] = dali_decoder(options.size, threads, largest, load, fancy == "on")
        except RuntimeError as error:
            failed[name] = str(error).strip().splitlines()[-1]
    return result | {"cpu": cpu_decoder(options.size, threads)}, failed


def measure(
    decoders: dict[str, Decoder], batches: list[list[Clip]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Images/s of each decoder in each round; every other round runs in reverse order."""
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(options.rounds):
        for name in list(decoders)[:: -1 if number % 2 else 1]:
            rates[name].append(rate(decoders[name], batches, options.seconds))
    return rates


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("corpus", metavar="URL", help="a packed corpus")
    result.add_argument("--size", type=int, default=224, help="pixels of a picture as shown (default: %(default)s)")
    result.add_argument("--batch", type=int, default=128, help="images at once (default: %(default)s)")
    result.add_argument("--images", type=int, default=1024, help="of the corpus (default: %(default)s)")
    result.add_argument("--threads", type=int, default=0, help="(default: the cores)")
    result.add_argument("--hw-load", type=float, nargs="+", help="shares for the GPU's JPEG engine, each tried")
    result.add_argument(
        "--fancy", nargs="+", choices=("on", "off"), default=["on"], help="chroma upsampling, each tried"
    )
    result.add_argument("--rounds", type=int, default=5, help="of each (default: %(default)s)")
    result.add_argument("--seconds", type=float, default=2.0, help="of a round (default: %(default)s)")
    return result


def main() -> int:
    options = parser().parse_args()
    clips = read_clips(options.corpus, options.images)
    batches = [clips[first : first + options.batch] for first in range(0, len(clips), options.batch)]
    threads = options.threads or cores_per_process(1)
    decoders, failed = make_decoders(options, threads, batches[0])
    grey = {name: deviation(each, decoders["cpu"], batches) for name, each in decoders.items() if name != "cpu"}
    medians = {name: round(statistics.median(each)) for name, each in measure(decoders, batches, options).items()}
    result = {
        "dali_on": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": threads,
        "images": len(clips),
        "grey_levels": grey,
        "images_per_second": medians,
        "dali_to_cpu": round(max((medians[name] for name in grey), default=0) / medians["cpu"], 2),
        **({"failed": failed} if failed else {}),
    }
    print(json.dumps(result))
    for decoder in decoders.values():
        decoder.close()
    fancy = [each["mean"] for name, each in grey.items() if "plain" not in name]
    return int(not fancy or max(fancy) > LARGEST_MEAN)


if __name__ == "__main__":
    sys.exit(main())
