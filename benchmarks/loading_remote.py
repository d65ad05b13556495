"""Compares loading from S3 with loading from the local disk, in alternating rounds; medians and ratios.

    python benchmarks/loading_remote.py --corpus data/photos [--latency 0.02] [--rounds 5] [--cache] [--nginx]

The S3 server (moto, from the tests' environment, see tests/object_stores.py) and the proxy that adds the latency run on
the first core, our loader on the second, also in local rounds. Every round opens the corpus again and takes batches for
some seconds after the first one. Two rates: by wall time, and by CPU time of our processes, which other work on the
machine disturbs less. `--cache`: an empty cache and one epoch a round, so that all bytes come from the store.
`--nginx`: a web server (Debian's nginx) behind a forwarder that delays bytes, instead of moto behind a proxy that reads
HTTP, so that the server is not the bottleneck.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fsspec  # noqa: E402
from object_stores import Store, environment_of, forget_clients, free_port, server  # noqa: E402

from loaders.bench import cpu_seconds  # noqa: E402
from loaders.config import CacheConfig, LoaderConfig, PerMedia  # noqa: E402
from loaders.train import TrainLoader  # noqa: E402
from loaders.vocab import learn_vocabulary  # noqa: E402
from preprocessing.text import Tokenizer  # noqa: E402

HTTP_PROXY_PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from faulty_proxy import Faults, FaultyProxy
proxy = FaultyProxy(sys.argv[1], Faults(latency=float(sys.argv[2])), port=int(sys.argv[3]))
print("ready", flush=True)
sys.stdin.read()
"""


# Forwards bytes; delays the server's by `latency` seconds. Minimal, to use little CPU.
TCP_FORWARDER_PROGRAM = """
import asyncio, sys
host, port, latency = sys.argv[1].split(":")[0], int(sys.argv[1].split(":")[1]), float(sys.argv[2])

async def pump(reader, writer, seconds):
    loop = asyncio.get_running_loop()
    while data := await reader.read(2**18):
        loop.call_later(seconds, writer.write, data) if seconds else writer.write(data)
    loop.call_later(seconds, writer.close)

async def serve(reader, writer):
    up_reader, up_writer = await asyncio.open_connection(host, port)
    await asyncio.gather(pump(reader, up_writer, 0), pump(up_reader, writer, latency), return_exceptions=True)

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[3]), backlog=512)
    print("ready", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
NGINX = """
daemon off; worker_processes 1; error_log {folder}/log; pid {folder}/pid; {user}
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 10000000; sendfile on;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def nginx(root: Path) -> Iterator[str]:
    """Serve a folder by Debian's nginx; yields its address."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="nginx-")
    user = "user root;" if os.getuid() == 0 else ""
    settings = Path(folder, "conf")
    settings.write_text(NGINX.format(folder=folder, port=port, root=root.resolve(), user=user))
    process = subprocess.Popen(["nginx", "-c", settings])
    try:
        time.sleep(1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def moto(corpus: str) -> Iterator[str]:
    """Serve the corpus from an S3 server; yields its address."""
    port = free_port()
    with server("moto_server", "-H", "127.0.0.1", "-p", str(port), port=port) as address:
        os.environ.update(environment_of("s3", address))
        fsspec.filesystem("s3").mkdir("corpora")
        Store("s3", address, "s3://corpora").fill(corpus, "corpus")
        yield address


def proxy_at(core: int, upstream: str, latency: float, program: str) -> tuple[subprocess.Popen[str], str]:
    """Start the proxy in its own process on one core; its address."""
    port = free_port()
    command = [sys.executable, "-c", program, upstream, str(latency), str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(process.pid, {core})
    assert process.stdout is not None
    process.stdout.readline()
    return process, f"127.0.0.1:{port}"


def rate(url: str, address: str, vocab: Path, options: argparse.Namespace) -> tuple[float, float, dict[str, float]]:
    """Samples per second and per CPU second after opening the corpus once, and the loader's counters."""
    os.environ.update(environment_of("s3", address))
    forget_clients()
    folder = tempfile.mkdtemp(prefix="cache-")
    cache = CacheConfig(folder, 50.0, clips=True) if options.cache else CacheConfig()
    config = LoaderConfig(
        batch_size=PerMedia(options.batch, options.batch), decode="cpu", threads=1, cache=cache, max_bad_share=0.5,
        corpus_weights={Path(options.corpus).name: options.passes},
    )  # fmt: skip
    loader = TrainLoader([url], Tokenizer.load(str(vocab)), config)
    next(iter(loader))
    samples, began, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - began < options.seconds:
        for batch in loader:
            samples += len(batch.keys)
            if time.perf_counter() - began >= options.seconds:
                break
        if options.cache:
            break
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    counters = loader.counters()
    loader.close()
    shutil.rmtree(folder)
    return samples / seconds, samples / cpu, counters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a packed corpus on the local disk")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds added to every response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="duration of a measurement")
    parser.add_argument("--passes", type=float, default=1.0, help="traversals of the corpus in an epoch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--nginx", action="store_true", help="a fast web server instead of moto")
    parser.add_argument("--cache", action="store_true", help="whole blocks, through an empty cache")
    options = parser.parse_args()
    first, second = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {first})  # what is started now stays there
    corpus = Path(options.corpus)
    with nginx(corpus.parent) if options.nginx else moto(options.corpus) as address:
        program, kind = (TCP_FORWARDER_PROGRAM, "http") if options.nginx else (HTTP_PROXY_PROGRAM, "s3")
        plain, plain_address = proxy_at(first, address, 0.0, program)
        slow, slow_address = proxy_at(first, address, options.latency, program)
        urls = [
            f"http://{at}/{corpus.name}" if options.nginx else "s3://corpora/corpus"
            for at in (plain_address, slow_address)
        ]
        vocab = Path(tempfile.mkdtemp()) / "vocab.txt"
        learn_vocabulary([options.corpus], 2000, vocab)
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {second})
        sides = {
            "local": (options.corpus, address),
            kind: (urls[0], plain_address),
            f"{kind}+{options.latency * 1000:g}ms": (urls[1], slow_address),
        }
        gc.collect()
        gc.freeze()  # as training does
        found: dict[str, list[tuple[float, float, dict[str, float]]]] = {name: [] for name in sides}
        for number in range(options.rounds):
            for name, (where, at) in sides.items():
                found[name].append(rate(where, at, vocab, options))
                print(number, name, *(f"{value:,.0f}" for value in found[name][-1][:2]), flush=True)
        for process in (plain, slow):
            process.terminate()
    for name, rounds in found.items():
        clock, of_cpu = (statistics.median(r[k] for r in rounds) for k in (0, 1))
        by_clock, by_cpu = ([r[k] / f[k] for r, f in zip(rounds, found["local"])] for k in (0, 1))
        last = {key: round(value, 2) for key, value in rounds[-1][2].items() if value}
        print(
            f"{name:9} {clock:8,.0f}/s {of_cpu:8,.0f}/CPU s; remote / local: {statistics.median(by_clock):.2f} wall, "
            f"{statistics.median(by_cpu):.2f} CPU time"
        )
        print("   ", last)


if __name__ == "__main__":
    main()
