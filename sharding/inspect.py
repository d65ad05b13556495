"""`python -m sharding.inspect`: what is in a packed corpus, in numbers, one sample and pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import simplejpeg

from sharding.schema import Corpus, join_url, read_corpus, read_index

TILE = 128  # pixels of a picture on the contact sheet
COLUMNS = 8


def summary(corpus: Corpus) -> str:
    """The corpus in a few lines."""
    counts = {unit: sum(corpus.counts(unit)) for unit in ("samples", "frames", "captions", "questions", "choices")}
    size = sum(corpus.counts("bytes"))
    lines = [
        f"{corpus.url}: {corpus.media_type} corpus {corpus.name}, {len(corpus.shards)} shards, {size / 1e6:.1f} MB",
        ", ".join(f"{count:,} {unit}" for unit, count in counts.items() if count),
    ]
    if corpus.settings:
        lines.append("built with " + " ".join(f"{key}={value}" for key, value in corpus.settings.items()))
    return "\n".join(lines)


def locate(corpus: Corpus, number: int) -> tuple[int, dict[str, Any]]:
    """(shard, index row) of the corpus' sample `number`. Raises ValueError when there is no such sample."""
    rest = number
    for shard, info in enumerate(corpus.shards):
        if 0 <= rest < info.samples:
            return shard, read_index(corpus, shard).slice(rest, 1).to_pylist()[0]
        rest -= info.samples
    raise ValueError(f"--sample {number}: {corpus.url} has samples 0 to {corpus.samples - 1}")


def describe(corpus: Corpus, number: int) -> str:
    """One sample's row, and the command that fetches its first frame's bytes."""
    shard, row = locate(corpus, number)
    path = join_url(corpus.url, corpus.shards[shard].name)
    first, size = row["offsets"][0], row["sizes"][0]
    if "://" in path:
        fetch = f"curl -r {first}-{first + size - 1} {path} -o frame.jpg"
    else:
        fetch = f"tail -c +{first + 1} {path} | head -c {size} > frame.jpg"
    shown = {key: value for key, value in row.items() if value not in (None, [], "") and key != "crc32s"}
    return "\n".join([*(f"  {key}: {value}" for key, value in shown.items()), f"  first frame: {fetch}"])


def contact_sheet(corpus: Corpus, count: int = 48) -> np.ndarray:
    """RGB pixels of `count` samples' middle frames, evenly spread over the corpus, COLUMNS a row."""
    tiles = []
    for number in np.unique(np.linspace(0, corpus.samples - 1, count).astype(int)).tolist():
        shard, row = locate(corpus, number)
        middle = len(row["offsets"]) // 2
        with fsspec.open(join_url(corpus.url, corpus.shards[shard].name), "rb") as file:
            file.seek(row["offsets"][middle])
            data = file.read(row["sizes"][middle])
        tiles.append(tile(simplejpeg.decode_jpeg(data, "RGB")))
    tiles += [np.full((TILE, TILE, 3), 255, np.uint8)] * (-len(tiles) % COLUMNS)
    rows = [np.concatenate(tiles[first : first + COLUMNS], axis=1) for first in range(0, len(tiles), COLUMNS)]
    return np.concatenate(rows, axis=0)


def tile(pixels: np.ndarray) -> np.ndarray:
    """A picture fitted into a white square of TILE pixels."""
    scale = TILE / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    square = np.full((TILE, TILE, 3), 255, np.uint8)
    top, left = (TILE - small.shape[0]) // 2, (TILE - small.shape[1]) // 2
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m sharding.inspect", description="Show what is in a packed corpus.")
    parser.add_argument("url", metavar="URL", help="folder or URL of the corpus")
    parser.add_argument("--sample", type=int, default=0, help="number of the sample to show (default: %(default)s)")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet of samples from all over the corpus")
    options = parser.parse_args(arguments)
    try:
        corpus = read_corpus(options.url)
        sys.stdout.write(f"{summary(corpus)}\nsample {options.sample}:\n{describe(corpus, options.sample)}\n")
        if options.sheet:
            written, data = cv2.imencode(".png", cv2.cvtColor(contact_sheet(corpus), cv2.COLOR_RGB2BGR))
            if written:
                Path(options.sheet).write_bytes(data.tobytes())
                sys.stdout.write(f"contact sheet: {options.sheet}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
