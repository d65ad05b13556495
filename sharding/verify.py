"""`python -m sharding.verify`: checks a packed corpus byte by byte against its indices and its description."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import simplejpeg
from tqdm import tqdm

from sharding.schema import Corpus, ShardInfo, join_url, read_corpus, read_index

log = logging.getLogger("sharding")


def verify_corpus(url: str, decode: bool = False, progress: bool = False) -> list[str]:
    """Every fault of a corpus, a line each naming shard, key and reason; empty when it is sound.

    decode: also decode every frame and compare its size in pixels with the index.

    Raises:
        FileNotFoundError, ValueError: there is no corpus at `url` that could be checked.
    """
    corpus = read_corpus(url)
    faults: list[str] = []
    for number, info in enumerate(tqdm(corpus.shards, unit="shard", desc="verifying", disable=not progress)):
        faults += shard_faults(corpus, number, info, decode)
    return faults


def shard_faults(corpus: Corpus, number: int, info: ShardInfo, decode: bool) -> Iterator[str]:
    """Faults of one shard; a missing or unreadable file is one too."""
    try:
        with fsspec.open(join_url(corpus.url, info.name), "rb") as file:
            data = file.read()
        with fsspec.open(join_url(corpus.url, info.index_name), "rb") as file:
            index_digest = hashlib.sha256(file.read()).hexdigest()
        rows = read_index(corpus, number).to_pylist()
    except (OSError, ValueError) as error:
        yield f"{info.name}: {error}"
        return
    if index_digest != info.index_sha256:
        yield f"{info.index_name}: its SHA-256 is not the one in corpus.json"
    if len(data) != info.bytes:
        yield f"{info.name}: {len(data)} bytes, corpus.json says {info.bytes}"
    found = False
    for row in rows:
        for reason in sample_faults(data, row, decode):
            found = True
            yield f"{info.name}: {row['key']}: {reason}"
    if not found and hashlib.sha256(data).hexdigest() != info.sha256:
        yield f"{info.name}: its SHA-256 is not the one in corpus.json, though every frame is sound"


def sample_faults(data: bytes, row: dict[str, Any], decode: bool) -> Iterator[str]:
    """Faults of one sample's frames in a tar's bytes."""
    for frame, (offset, size, crc32) in enumerate(zip(row["offsets"], row["sizes"], row["crc32s"], strict=True)):
        jpeg = data[offset : offset + size]
        if zlib.crc32(jpeg) != crc32:
            yield f"frame {frame}: CRC-32 does not match the index"
        elif decode:
            try:
                height, width = simplejpeg.decode_jpeg(jpeg, "RGB").shape[:2]
            except ValueError as error:
                yield f"frame {frame}: {error}"
                continue
            if (width, height) != (row["width"], row["height"]):
                yield f"frame {frame}: {width}x{height} pixels, the index says {row['width']}x{row['height']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 when all is sound, 1 with faults, 2 when nothing could be checked."""
    parser = argparse.ArgumentParser("python -m sharding.verify", description="Check a packed corpus byte by byte.")
    parser.add_argument("url", metavar="URL", help="folder or URL of the corpus")
    parser.add_argument("--decode", action="store_true", help="also decode every frame")
    options = parser.parse_args(arguments)
    try:
        faults = verify_corpus(options.url, options.decode, progress=True)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for fault in faults:
        sys.stdout.write(f"{fault}\n")
    sys.stdout.write(f"{options.url}: {len(faults) or 'no'} faults\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
