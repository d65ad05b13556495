"""Real object stores for tests: S3 (moto), GCS (gcp-storage-emulator) and plain HTTP servers on 127.0.0.1.

Fixtures, usable from any test: `s3`, `gcs`, `http`. Each gives a Store whose `environment` is already set for this
process and those it starts, so that `s3://...` and `gs://...` URLs work as they do for a user:

    def test_something(s3: Store) -> None:
        build_corpus(..., output=s3.url("photos"))             # a bucket of this test's own
        s3.fill(local_folder, "photos")                         # or: copy a folder there; returns its URL

`faulty` puts a proxy before a store that injects faults into a share of the requests (tests/faulty_proxy.py):

    def test_it_survives(s3: Store, faulty: MakeFaulty) -> None:
        url = s3.fill(folder, "photos")
        proxy = faulty(s3, Faults.everywhere(0.1, seed=1))      # from here on s3:// goes through the proxy
        ...                                                     # (of http: http.url("photos", proxy) does)
        assert proxy.counts()["cut"] > 0                        # proxy.log has every request

Import the names with `from object_stores import Store, MakeFaulty` and `from faulty_proxy import Faults`.

The servers have their own virtual environment, because moto and s3fs need different versions of botocore: `make
servers` creates it (.venv-servers); the variable TEST_SERVERS gives another path.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from aiohttp import web
from faulty_proxy import Faults, FaultyProxy, web_server
from needs import leave_out, module

SERVERS = Path(os.environ.get("TEST_SERVERS", Path(__file__).resolve().parent.parent / ".venv-servers"))

# gcsfs reads this on import; otherwise it asks a gRPC endpoint for the type of each bucket, which takes a minute.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# The default queue of 5 connections is too short for parallel reads: a sixth connection may wait for minutes.
GCS_EMULATOR = """
import socketserver, sys
socketserver.TCPServer.request_queue_size = 512
from gcp_storage_emulator.__main__ import main
main(sys.argv[1:])
"""

MakeFaulty = Callable[["Store", Faults], FaultyProxy]


@dataclass(frozen=True)
class Store:
    """A store for objects: `root` with a bucket (or folder) for the test, at `address` (host:port)."""

    kind: str  # s3 | gcs | http
    address: str
    root: str
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None  # served by a plain HTTP server

    def url(self, name: str, proxy: FaultyProxy | None = None) -> str:
        """URL of an object in the store; `proxy` replaces the address in it."""
        url = f"{self.root}/{name}"
        return url if proxy is None else url.replace(self.address, f"127.0.0.1:{proxy.port}")

    def fill(self, source: Path | str, name: str) -> str:
        """Copy a local folder into the store; returns its URL."""
        if self.folder is not None:
            shutil.copytree(source, self.folder / self.root.rsplit("/", 1)[-1] / name, dirs_exist_ok=True)
            return self.url(name)
        filesystem, root = fsspec.url_to_fs(self.url(name))
        for path in sorted(Path(source).rglob("*")):
            if path.is_file():
                filesystem.pipe_file(f"{root}/{path.relative_to(source)}", path.read_bytes())
        return self.url(name)


def die_with_parent() -> None:
    """Called in a new child process: it ends when this process ends, for any reason."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def start(*words: object, log: Path, **options: Any) -> subprocess.Popen:
    """Start a command that appends its output to `log` and ends when this process ends."""
    with log.open("ab") as output:
        return subprocess.Popen(
            list(map(str, words)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent,
            **options,
        )


def free_port() -> int:
    """An unused port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def store_server(program: str) -> Path:
    """A program of the servers' environment; skips the test if it is missing."""
    path = SERVERS / "bin" / program
    if not path.exists():
        leave_out(f"{path} is missing: run `make servers`, or set TEST_SERVERS")
    return path


@contextmanager
def server(program: str, *arguments: str, port: int) -> Iterator[str]:
    """A running server of the servers' environment; yields its address."""
    with tempfile.NamedTemporaryFile() as file:
        log = Path(file.name)
        process = start(store_server(program), *arguments, log=log)
        try:
            until(lambda: listens(port), lambda: log.read_text(errors="replace"), process)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def listens(port: int) -> bool:
    """Whether a server of this machine answers on the port."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def until(done: Callable[[], bool], log: Callable[[], str], process: subprocess.Popen | None = None) -> None:
    """Wait for an event; fails with the log if the process ends first, or after 120 seconds."""
    deadline = time.monotonic() + 120
    while not done():
        assert process is None or process.poll() is None, f"ended with {process.returncode}:\n{log()}"
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)


@contextmanager
def http_files(folder: Path) -> Iterator[str]:
    """A plain HTTP server with ranges over a folder, in a thread; yields its address."""
    application = web.Application()
    application.router.add_static("/", folder, show_index=True)
    with web_server(lambda: web.AppRunner(application)) as port:
        yield f"127.0.0.1:{port}"


def environment_of(kind: str, address: str) -> dict[str, str]:
    """The environment variables that send URLs of that kind to `address`."""
    if kind == "s3":
        keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_REGION": "us-east-1"}
        return {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{address}"}
    if kind == "gcs":
        # fsspec reads the last two on import; they skip the search for credentials.
        emulator = {"STORAGE_EMULATOR_HOST": f"http://{address}"}
        return {**emulator, "FSSPEC_GS_TOKEN": "anon", "FSSPEC_GS_PROJECT": "testing"}
    return {}


def activate(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment, for clients created from now on."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options: dict[str, dict[str, str]] = {}
    for name, value in environment.items():
        if name.startswith("FSSPEC_GS_"):
            options.setdefault("gs", {})[name.removeprefix("FSSPEC_GS_").lower()] = value
    for scheme, found in options.items():
        monkeypatch.setitem(fsspec.config.conf, scheme, found)
    forget_clients()


def forget_clients() -> None:
    """Clear fsspec's clients: it caches them by their arguments, which do not include the environment."""
    for scheme in ("s3", "gs", "http"):
        with suppress(ImportError):  # s3fs and gcsfs may be missing
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    module("s3fs", "s3fs")
    port = free_port()
    with server("moto_server", "-H", "127.0.0.1", "-p", str(port), port=port) as address:
        yield address


@pytest.fixture(scope="session")
def gcs_address() -> Iterator[str]:
    module("gcsfs", "gcsfs")
    port = free_port()
    arguments = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--quiet"]
    with server("python", "-c", GCS_EMULATOR, *arguments, port=port) as address:
        yield address


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    environment = environment_of("s3", s3_address)
    activate(environment, monkeypatch)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield Store("s3", s3_address, f"s3://{bucket}", environment)
    forget_clients()


@pytest.fixture
def gcs(gcs_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    environment = environment_of("gcs", gcs_address)
    activate(environment, monkeypatch)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("gs").mkdir(bucket)
    yield Store("gcs", gcs_address, f"gs://{bucket}", environment)
    forget_clients()


@pytest.fixture
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("http")
    (folder / "files").mkdir()
    with http_files(folder) as address:
        yield Store("http", address, f"http://{address}/files", folder=folder)
    forget_clients()


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Store:
    """The store of the parameter: `@pytest.mark.parametrize("store", STORES, indirect=True)`."""
    return request.getfixturevalue(request.param)


STORES = ["s3", "gcs", "http"]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeFaulty]:
    # Requests are counted: without the indices that an earlier session has cached for the same content and port.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("host")))
    proxies: list[FaultyProxy] = []

    def put_before(target: Store, faults: Faults) -> FaultyProxy:
        proxies.append(FaultyProxy(target.address, faults))
        activate(environment_of(target.kind, f"127.0.0.1:{proxies[-1].port}"), monkeypatch)
        return proxies[-1]

    yield put_before
    forget_clients()
    for proxy in proxies:
        proxy.close()
