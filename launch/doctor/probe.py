"""Runs on every node for `python -m launch.doctor`: answers questions about it, one JSON line each."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.errors import PROGRAM, ROOMS
from runtime.packaged import PACKAGED, RECIPES

PACKAGES = (
    "torch", "deepspeed", "transformers", "timm", "numpy", "pyarrow", "fsspec", "s3fs", "gcsfs", "aiohttp", "pycurl",
)  # fmt: skip
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
CONNECT_SECONDS = 5.0
SEND_SECONDS = 2.0  # that a link is measured for at most
CHUNK = 2**18
SHARDS_READ = 4  # of a corpus on each node
FRAMES_READ = 32  # of each of them
STORE_SECONDS = 20.0  # given to a store for one part, all tries together
COLLECTIVE = Path(__file__).with_name("all_reduce.py")
DECODE_ONE = Path(__file__).with_name("decode_one.py")
DECODE_SECONDS = 150.0


class _Receiver(socketserver.ThreadingTCPServer):
    """Accepts connections on a port."""

    allow_reuse_address = daemon_threads = True


class _Drain(socketserver.BaseRequestHandler):
    """Reads a connection to its end, and confirms that."""

    def handle(self) -> None:
        """Read all bytes, then send one."""
        with suppress(OSError):
            while self.request.recv(CHUNK):
                pass
            self.request.sendall(b"!")


class Probe:
    """The answers of a node; one method a question."""

    def __init__(self) -> None:
        self._servers: list[_Receiver] = []

    def clock(self) -> float:
        """This node's time in seconds."""
        return time.time()

    def facts(self) -> dict[str, Any]:
        """Hardware of this node and its installed packages."""
        from train.job.devices import gpu_fault
        from train.job.gpus import driver_version

        installed = {}
        for name in (*PACKAGES, *DALI):
            with suppress(PackageNotFoundError):
                installed[name] = version(name)
        return {
            "python": platform.python_version(),
            "versions": installed | _cuda_versions(),
            "code": code_hash(),
            "gpus": _gpus(),
            "gpu_fault": gpu_fault(),
            "driver": driver_version(),
            "cores": len(os.sched_getaffinity(0)),
        }

    def listen(self, port: int) -> dict[str, Any]:
        """Listen on `port` and on one that the system chooses; {"ports": the open ones, "error": of the first}."""
        error = ""
        for wanted in (port, 0):
            try:
                server = _Receiver(("0.0.0.0", wanted), _Drain)
            except OSError as failure:
                error = f"port {wanted} cannot be opened: {failure.strerror}"
                continue
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        return {"ports": [server.server_address[1] for server in self._servers], "error": error}

    def close_ports(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def connect(self, targets: Sequence[tuple[str, int]]) -> list[str]:
        """For each host and port: empty when a connection opens, else why not."""

        def attempt(target: tuple[str, int]) -> str:
            host, port = target
            try:
                socket.create_connection((host, port), CONNECT_SECONDS).close()
            except OSError as error:
                return "no response" if isinstance(error, TimeoutError) else str(error.strerror or error)
            return ""

        with ThreadPoolExecutor(max(1, len(targets))) as pool:
            return list(pool.map(attempt, targets))

    def send(self, host: str, port: int) -> float:
        """Gbit/s of one connection to a host that listens."""
        with socket.create_connection((host, port), CONNECT_SECONDS) as sock:
            sock.settimeout(60)
            data, sent, began = bytes(CHUNK), 0, time.perf_counter()
            while time.perf_counter() - began < SEND_SECONDS:
                sock.sendall(data)
                sent += CHUNK
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)  # when the last byte has arrived
            return sent * 8e-9 / (time.perf_counter() - began)

    def address_towards(self, host: str) -> str:
        """This node's address as another one sees it."""
        from runtime.network import address_towards

        return address_towards(host)

    def write(self, path: str, text: str) -> None:
        """Write a file, and the folders above it."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)

    def read(self, path: str) -> str:
        """A file's text; empty when it is not there."""
        return Path(path).read_text() if Path(path).is_file() else ""

    def remove(self, path: str) -> None:
        """Remove a file."""
        Path(path).unlink(missing_ok=True)

    def collective(self, master: str, port: int, first_rank: int, world_size: int, processes: int) -> dict[str, Any]:
        """All-reduce over all nodes, with `processes` of this one; {"gbit": bus bandwidth, "backend", "tflops"}."""
        common = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": master, "MASTER_PORT": port}
        children = [
            _start(COLLECTIVE, **common, RANK=first_rank + local, LOCAL_RANK=local) for local in range(processes)
        ]
        try:
            answers = [_answer(child, "the all-reduce") for child in children]
            return answers[0]
        finally:
            for child in children:  # of a failed one the others wait in vain
                child.kill()
                child.wait()

    def decode_one(self) -> dict[str, Any]:
        """Decode a picture in a separate process, which a faulty GPU or driver may crash; see decode_one.py."""
        return _answer(_start(DECODE_ONE), "decoding a picture", DECODE_SECONDS)

    def listing(self, url: str, storage: dict[str, str]) -> dict[str, Any]:
        """{"missing": files that corpus.json lists and the folder lacks}, where the folder can be listed."""
        import fsspec

        reader = _open(url, storage)
        corpus = reader.corpus
        wanted = {shard.index_name for shard in corpus.shards}
        if not corpus.tars or corpus.tars == url:
            wanted |= {shard.name for shard in corpus.shards}
        try:
            files, root = fsspec.url_to_fs(url, **storage)
            there = {str(path).rsplit("/", 1)[-1] for path in files.ls(root, detail=False)}
        except (OSError, NotImplementedError) as error:
            return {"missing": [], "error": f"cannot be listed ({error}): only samples of it were read"}
        finally:
            reader.close()
        return {"missing": sorted(wanted - there), "error": ""}

    def storage(self, url: str, storage: dict[str, str], seed: int) -> dict[str, Any]:
        """Read the indices of some shards and frames of them, checked: {"samples", "mb_per_second", "shards"}."""
        import numpy as np

        from loaders.samples import whole_sample

        reader = _open(url, storage)
        try:
            corpus, began, read = reader.corpus, time.perf_counter(), 0
            chosen = random.Random(seed).sample(range(len(corpus.shards)), min(SHARDS_READ, len(corpus.shards)))
            for shard in chosen:
                index = reader.index(shard)
                rows = np.linspace(0, corpus.shards[shard].samples - 1, FRAMES_READ).astype(int)
                records = [index.record(int(row)) for row in sorted(set(rows.tolist()))]
                for sample in reader.read([whole_sample(record, np.zeros(1, np.int64)) for record in records]):
                    if sample.reason:
                        raise ValueError(f"{corpus.tar_url(shard)}: {sample.spec.record.key}: {sample.reason}")
                    read += len(sample.jpegs[0])
            seconds = time.perf_counter() - began
        finally:
            reader.close()
        return {"samples": corpus.samples, "shards": len(chosen), "mb_per_second": read / 1e6 / seconds}

    def loader(self, config: str, settings: list[str], nodes: int, seconds: float) -> dict[str, Any]:
        """Samples a second that this node reads and decodes, with its share of the batch."""
        from loaders.bench import measure
        from loaders.config import PerMedia
        from train.config.settings import load_settings

        run = load_settings(config, settings).config
        share = PerMedia(*(max(1, size // nodes) for size in (run.batch_size.image, run.batch_size.video)))
        found = measure(run.train_urls(), replace(run, batch_size=share, quarantine_file=""), seconds)
        return {name: getattr(found, name) for name in ("samples_per_second", "backend", "threads")}


def code_hash() -> str:
    """Hash of all Python files and recipes; a checkout and a wheel of one state have the same."""
    found = hashlib.sha256()
    recipes = [(PACKAGED / name).resolve() for name in sorted(RECIPES)]
    for folder in (*(PROGRAM / room for room in sorted(ROOMS)), *recipes):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".yaml", ".json", ".j2"):
                found.update(path.relative_to(folder.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _open(url: str, storage: dict[str, str]) -> Any:
    from loaders.shards import CorpusReader
    from storage.limits import RemoteReads

    return CorpusReader(url, storage, remote=RemoteReads(deadline=STORE_SECONDS, try_seconds=STORE_SECONDS / 2))


def _gpus() -> list[str]:
    """The GPUs that a run would use."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _cuda_versions() -> dict[str, str]:
    """CUDA and NCCL of a PyTorch for GPUs: processes with different NCCL cannot connect."""
    import torch

    if torch.version.cuda is None:
        return {}
    return {"CUDA of torch": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}


def _start(program: Path, **variables: object) -> subprocess.Popen[str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(program)], env=environment, stdout=pipe, stderr=pipe, text=True)


def _answer(child: subprocess.Popen[str], task: str, seconds: float | None = None) -> Any:
    """The JSON in the last line that a program prints. Raises RuntimeError where it fails, crashes or hangs."""
    try:
        output, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise RuntimeError(f"{task} did not end within {seconds:.0f} s") from None
    if child.returncode or not output:
        ended = f"{task} ended with signal {-child.returncode}: " if child.returncode < 0 else ""
        raise RuntimeError(ended + (errors.strip().splitlines() or ["no reason given"])[-1])
    return json.loads(output.splitlines()[-1])


def main() -> int:
    """Answer until the input ends: {"ask": METHOD, "with": [ARGUMENTS]} -> {"answer": ...} or {"error": TEXT}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    probe = Probe()
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., Any] = getattr(probe, request["ask"])
        try:
            answer = {"answer": method(*request["with"])}
        except Exception as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    os._exit(main())
