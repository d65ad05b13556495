"""The two ways to decode, side by side on a packed corpus: DALI on the GPU, and libjpeg-turbo with OpenCV on the CPU.

    python benchmarks/decoding.py data/photos --size 224 --batch 128

Without a GPU DALI's graph runs on the CPU. Printed, as JSON: images/s of each, in rounds that alternate; by how many
grey levels of 255 their pictures differ; and what DALI makes of a damaged image in a batch: `named` as bad, `shown` all
the same (the loader finds it by its CRC before), or `harmed`: another picture changed. Exit code 1 where one is harmed,
or where the mean difference is more than two grey levels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from loaders.clips import BadSampleError, Window
from loaders.config import LoaderConfig
from loaders.decoding import Decoder, make_decoder, usable_threads
from loaders.evaluation import VisualSet
from loaders.pixels import Clip

LARGEST_MEAN = 2.0  # grey levels: the kernels differ, DALI's is Catmull-Rom's; of photos they do by 0.7


def headless(data: bytes) -> bytes:
    """A JPEG's header with next to nothing of its picture."""
    return data[: data.index(b"\xff\xda") + 16]


DAMAGES = {"empty": lambda data: b"", "html": lambda data: b"<html>", "no picture": headless}


def read_clips(url: str, count: int) -> list[Clip]:
    """The first frame of up to `count` samples, each with a random part of it to show."""
    visuals, random = VisualSet(url, LoaderConfig()), np.random.default_rng(0)
    clips = []
    for visual in range(min(count, visuals.num_visuals)):
        shard, row = visuals.place(visual)
        record = visuals.reader.index(shard).record(row)
        (jpegs,) = visuals.reader.read([(shard, record, np.zeros(1, np.int64))])
        if isinstance(jpegs, BadSampleError):
            continue
        height, width = (
            int(side * share) for side, share in zip((record.height, record.width), random.uniform(0.7, 1, 2))
        )
        top, left = random.integers(record.height - height + 1), random.integers(record.width - width + 1)
        window = Window(int(top), int(left), height, width, flip=bool(random.integers(2)))
        clips.append(Clip(jpegs, record.height, record.width, window))
    visuals.close()
    return clips


def rate(decoder: Decoder, batches: list[list[Clip]], seconds: float) -> float:
    """Images a second over about that many seconds."""
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < seconds:
        for batch in batches:
            decoder.decode(batch)
            done += len(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done / (time.perf_counter() - began)


def deviation(dali: Decoder, cpu: Decoder, batches: list[list[Clip]]) -> dict[str, float]:
    """Grey levels by which the pictures differ."""
    largest, total, count = 0, 0.0, 0
    for batch in batches:
        one, other = (decoder.decode(batch)[0].cpu().int() for decoder in (dali, cpu))
        difference = (one - other).abs()
        largest, total = max(largest, int(difference.max())), total + float(difference.sum())
        count += difference.numel()
    return {"largest": largest, "mean": round(total / count, 4)}


def alike(frames: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether pictures (B, T, S, S, 3) are the same; a GPU may decode one in its hardware now, by a kernel then."""
    return float((frames.int() - others.int()).abs().float().flatten(1).mean(1).max()) <= LARGEST_MEAN


def survival(decoder: Decoder, batch: list[Clip]) -> dict[str, str]:
    """What becomes of a batch with a damaged image: `named`, `shown` or `harmed`."""
    good, middle = decoder.decode(batch)[0].clone(), len(batch) // 2
    others = [number for number in range(len(batch)) if number != middle]
    found = {}
    for name, damage in DAMAGES.items():
        damaged = batch[middle]._replace(jpegs=[damage(data) for data in batch[middle].jpegs])
        frames, bad = decoder.decode([*batch[:middle], damaged, *batch[middle + 1 :]])
        again, bad_again = decoder.decode(batch)
        unharmed = alike(frames[others], good[others]) and alike(again, good)
        if not unharmed or bad_again or set(bad) - {middle}:
            found[name] = "harmed"
        else:
            found[name] = "named" if bad else "shown"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="URL", help="a packed corpus")
    parser.add_argument("--size", type=int, default=224, help="pixels of a picture as shown (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images at once (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1024, help="of the corpus (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="(default: the cores)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round (default: %(default)s)")
    options = parser.parse_args()
    clips = read_clips(options.corpus, options.images)
    batches = [clips[first : first + options.batch] for first in range(0, len(clips), options.batch)]
    threads = usable_threads(options.threads, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoders = {
        name: make_decoder(name, options.size, threads, antialias=False, device=device) for name in ("dali", "cpu")
    }
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    result = {
        "dali_on": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": threads,
        "images": len(clips),
        "grey_levels": deviation(decoders["dali"], decoders["cpu"], batches),
        "damaged": survival(decoders["dali"], batches[0]),
    }
    for number in range(options.rounds):
        for name in sorted(decoders, reverse=bool(number % 2)):
            rates[name].append(rate(decoders[name], batches, options.seconds))
    medians = {name: round(statistics.median(each), 1) for name, each in rates.items()}
    print(
        json.dumps({**result, "images_per_second": medians, "dali_to_cpu": round(medians["dali"] / medians["cpu"], 2)})
    )
    for decoder in decoders.values():
        decoder.close()
    return int(result["grey_levels"]["mean"] > LARGEST_MEAN or "harmed" in result["damaged"].values())


if __name__ == "__main__":
    sys.exit(main())
