"""Measures the CPU time of a ranged request: our client, libcurl in a bare loop, aiohttp, and fsspec.

    python benchmarks/http_requests.py [--size 34000] [--count 4000] [--at-once 32] [--rounds 5]

All take turns in one run; medians. The server (Debian's nginx) runs on the first core, the clients on the second; a
range has the size of a single frame of a clip. Ours includes retries, hedging, counters and deadlines.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import fsspec
import pycurl
from loading_remote import nginx
from yarl import URL

from storage.limits import RemoteReads
from storage.ranges import ByteRange
from storage.remote import RemoteStore

NAME, BYTES, BATCH = "shard.tar", 2**27, 32
Ranges = list[tuple[int, int]]


def bare(url: str, ranges: Ranges, at_once: int) -> int:
    """Bytes read by libcurl in a bare loop."""
    multi, todo, idle, total = pycurl.CurlMulti(), iter(ranges), [], 0
    running: dict[pycurl.Curl, list[bytes]] = {}
    for _ in range(at_once):
        curl = pycurl.Curl()
        curl.setopt(pycurl.URL, f"{url}/{NAME}")
        curl.setopt(pycurl.BUFFERSIZE, 2**18)
        idle.append(curl)
    while True:
        while idle and (span := next(todo, None)) is not None:
            curl, chunks = idle.pop(), []
            curl.setopt(pycurl.RANGE, f"{span[0]}-{span[1] - 1}")
            curl.setopt(pycurl.WRITEFUNCTION, chunks.append)
            running[curl] = chunks
            multi.add_handle(curl)
        if not running:
            return total
        multi.perform()
        ended = multi.info_read()[1]
        for curl in ended:
            multi.remove_handle(curl)
            total += len(b"".join(running.pop(curl)))
            idle.append(curl)
        if not ended:
            multi.select(0.05)


def by_aiohttp(url: str, ranges: Ranges, at_once: int) -> int:
    """The same with aiohttp's client."""

    async def run() -> int:
        address, gate = URL(f"{url}/{NAME}"), asyncio.Semaphore(at_once)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as session:

            async def one(start: int, end: int) -> int:
                async with gate, session.get(address, headers={"Range": f"bytes={start}-{end - 1}"}) as answer:
                    return len(await answer.read())

            return sum(await asyncio.gather(*(one(*span) for span in ranges)))

    return asyncio.run(run())


def by_fsspec(url: str, ranges: Ranges, at_once: int) -> int:
    """The same with fsspec's ranged reads."""
    starts, ends = zip(*ranges, strict=True)
    filesystem = fsspec.filesystem("http")
    return sum(map(len, filesystem.cat_ranges([f"{url}/{NAME}"] * len(ranges), starts, ends, batch_size=at_once)))


def ours(remote: RemoteStore, ranges: Ranges) -> int:
    """The same with the loader's client, used as in the loader: for batches, from eight threads."""

    def read(first: int) -> int:
        return sum(map(len, remote.read_ranges([ByteRange(NAME, *span) for span in ranges[first : first + BATCH]])))

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(read, range(0, len(ranges), BATCH)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=34_000, help="bytes of a range")
    parser.add_argument("--count", type=int, default=4000, help="ranges of a measurement")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    first, second = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {first})
    folder = tempfile.TemporaryDirectory(prefix="requests-")
    root = Path(folder.name)
    (root / NAME).write_bytes(random.Random(0).randbytes(BYTES))
    starts = random.Random(1).sample(range(BYTES - options.size), options.count)
    ranges = [(start, start + options.size) for start in starts]
    with nginx(root) as host:
        os.sched_setaffinity(0, {second})
        url = f"http://{host}"
        remote = RemoteStore(url, {}, RemoteReads(connections=options.at_once, requests_per_second=0))
        sides = {
            "libcurl, bare": lambda: bare(url, ranges, options.at_once),
            "ours": lambda: ours(remote, ranges),
            "aiohttp": lambda: by_aiohttp(url, ranges, options.at_once),
            "fsspec": lambda: by_fsspec(url, ranges, options.at_once),
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        gc.collect()
        gc.freeze()  # as training does
        for _ in range(options.rounds):
            for name, side in sides.items():
                began = time.process_time()
                assert side() == options.count * options.size
                found[name].append((time.process_time() - began) / options.count * 1e6)
        remote.close()
    folder.cleanup()
    for name, times in found.items():
        ratio = statistics.median(other / own for other, own in zip(times, found["ours"], strict=True))
        print(f"{name:14} {statistics.median(times):6.0f} us of CPU time a request, {ratio:.2f} theirs / ours")


if __name__ == "__main__":
    main()
