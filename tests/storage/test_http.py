"""Byte ranges over HTTP: connections, redirects, certificates, name servers, proxies, faulty servers."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hosts import why_not
from needs import leave_out
from places import ROOT
from web_servers import Handler, encrypt, serving

from storage.ranges import ByteRange
from storage.remote import RemoteStore

LATE = 8.0  # seconds
DATA = np.random.default_rng(1).bytes(2**20)


class Ranges(Handler):
    """Serves ranges of DATA under /things; below other paths the fault of that name."""

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        self.server.requested.append((self.path, self.headers.get("Authorization")))
        first, last = map(int, re.findall(r"\d+", self.headers.get("Range", f"bytes=0-{len(DATA) - 1}")))
        if self.path.startswith("/moved"):
            return self.say(302, b"", Location=self.path.replace("moved", "things"))
        if self.path.startswith("/garbled"):
            return self.raw(b"blah blah blah\r\n\r\n")
        if self.path.startswith("/broken"):
            return self.raw(b"HTTP/1.1 206 Partial Content\r\nContent-Le")
        if self.path.startswith("/whole"):
            return self.say(200, DATA * 64)
        if self.path.startswith("/refusing"):
            return self.say(503, DATA)  # a body longer than the range
        if self.path.startswith("/late") and first == 2000 and self.server.late.is_set():
            self.server.late.clear()
            time.sleep(LATE)
        if self.path.startswith("/stuck") and first:
            self.server.stuck.set()
            self.connection.settimeout(20)
            self.server.ended.append(self.connection.recv(1))  # empty when the client hangs up
        return self.say(206, DATA[first : last + 1])

    def do_CONNECT(self) -> None:
        self.say(407, b"")

    def raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.close_connection = True

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        try:
            super().say(status, body, **headers)
            self.server.sent += len(body)
        except OSError:
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    events = {"stuck": threading.Event(), "late": threading.Event()}
    with serving(Ranges, connections=0, sent=0, requested=[], ended=[], **events) as server:
        yield server


@pytest.fixture
def remote(server, remote_store) -> Callable[..., RemoteStore]:
    """Opens a folder of the server."""

    def make(folder: str, scheme: str = "http", **settings) -> RemoteStore:
        host = "localhost" if scheme == "https" else "127.0.0.1"
        return remote_store(f"{scheme}://{host}:{server.server_port}/{folder}", **settings)

    return make


def parts(count: int, size: int = 1500) -> list[ByteRange]:
    return [ByteRange("shard.tar", first, first + size) for first in range(0, count * 2000, 2000)]


def wanted(count: int) -> list[bytes]:
    """What `parts` hold."""
    return [DATA[part.start : part.end] for part in parts(count)]


def test_many_ranges_share_few_connections(server, remote) -> None:
    reading = remote("things", connections=4, hedge_percentile=0)
    for _ in range(3):
        assert reading.read_ranges(parts(100)) == wanted(100)
    assert server.connections <= 4
    assert len(server.requested) == 300


def test_a_whole_object_above_the_limit_is_refused(monkeypatch, remote) -> None:
    monkeypatch.setattr("storage.http.LARGEST_OBJECT", len(DATA) - 1)
    reading = remote("things")
    with pytest.raises(OSError, match="Maximum file size exceeded"):
        reading.read_ranges([ByteRange("corpus.json")])


def test_a_redirect_is_followed(server, remote) -> None:
    reading = remote("moved")
    assert reading.read_ranges(parts(3)) == wanted(3)
    assert {path for path, _ in server.requested} == {"/moved/shard.tar", "/things/shard.tar"}


def test_a_server_without_ranges_is_named_before_the_whole_object_arrives(server, remote) -> None:
    with pytest.raises(OSError, match=r"whole/shard\.tar cannot be read: the server does not support byte ranges"):
        remote("whole").read_ranges(parts(1))
    time.sleep(0.2)
    assert server.sent == 0  # of 64 MB


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("refusing", "HTTP 503"), ("garbled", "connection closed early"), ("broken", "connection closed early")],
)
def test_bad_responses_are_retried_until_the_deadline(folder: str, reason: str, remote) -> None:
    reading = remote(folder, deadline=1)
    with pytest.raises(TimeoutError, match=rf"\(\d+ tries\); the last: {reason}"):
        reading.read_ranges(parts(1))
    assert reading.counters["retries"] > 0


def test_a_connection_reset_during_the_tls_handshake_is_retried(remote_store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reset() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(100)
                    connection.close()  # with bytes unread: a reset

        threading.Thread(target=reset, daemon=True).start()
        reading = remote_store(f"https://127.0.0.1:{server.getsockname()[1]}/things", deadline=1)
        with pytest.raises(TimeoutError, match=r"the last: no encrypted connection: 127\.0\.0\.1"):
            reading.read_ranges(parts(1))
        assert reading.counters["retries"] > 0
        server.shutdown(socket.SHUT_RDWR)


def test_a_server_without_tls_is_named_at_once(server, remote_store) -> None:
    with pytest.raises(OSError, match=r"things/shard\.tar cannot be read: no encrypted connection: 127\.0\.0\.1"):
        remote_store(f"https://127.0.0.1:{server.server_port}/things").read_ranges(parts(1))


@pytest.mark.parametrize(
    ("proxy", "reason"),
    [("http://127.0.0.1:{port}", "cannot be read: proxy: HTTP 407"), ("jane:open-sesame@proxy:80x80", ".*proxy")],
)
def test_errors_of_a_proxy_name_it_without_its_password(server, monkeypatch, remote_store, proxy, reason) -> None:
    monkeypatch.setenv("https_proxy", proxy.format(port=server.server_port))
    monkeypatch.setenv("no_proxy", "elsewhere.test")
    with pytest.raises(OSError, match=rf"store\.test/things/shard\.tar {reason}") as raised:
        remote_store("https://store.test/things", deadline=1).read_ranges(parts(1))
    assert "sesame" not in str(raised.value)


def test_no_connection_and_no_response_are_told_apart(remote, remote_store) -> None:
    reading = remote("stuck", try_seconds=0.5, deadline=0.7)
    assert reading.read_ranges(parts(1)) == [DATA[:1500]]
    with pytest.raises(TimeoutError, match=r"the last: no response within 0\.5 s \(remote\.try_seconds\)"):
        reading.read_ranges(parts(2)[1:])  # over the same connection
    with socket.socket() as full, ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # the queue of connections is full after these
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/things"
        reading = remote_store(url, try_seconds=1, deadline=1.2)
        with pytest.raises(TimeoutError, match=r"the last: no connection within 1 s"):
            reading.read_ranges(parts(1))


@pytest.mark.parametrize("host", ["store..example", "a" * 70 + ".example"])
def test_an_impossible_host_name_is_reported_at_once(host: str, remote_store) -> None:
    reading = remote_store(f"http://{host}/things")
    with pytest.raises(OSError, match=r"things/shard\.tar cannot be read: host not found"):
        reading.read_ranges(parts(1))


def test_headers_of_one_request_are_not_sent_with_the_next(server, tmp_path: Path, monkeypatch, remote) -> None:
    monkeypatch.setattr("storage.addresses.KEPT_FOR", 0.0)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login jane password sesame\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    reading = remote("things", hedge_percentile=0)
    reading.read_ranges(parts(1))
    (tmp_path / "netrc").unlink()
    reading.read_ranges(parts(1))
    assert [header is None for _, header in server.requested] == [False, True]


def test_closing_while_other_threads_read_loses_none_of_them(remote) -> None:
    reading = remote("things", hedge_percentile=0)

    def read() -> None:
        for _ in range(30):
            with suppress(CancelledError):
                assert reading.read_ranges(parts(20)) == wanted(20)

    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read) for _ in range(4)]
        while not all(each.done() for each in reads):
            reading.close()
            time.sleep(0.01)
    assert [each.result() for each in reads] == [None] * 4


def cancelled(reading: RemoteStore, server) -> None:
    """Read two ranges, of which the server holds one back; cancel the reads meanwhile."""
    server.stuck.clear()
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(reading.read_ranges, parts(2))
        assert server.stuck.wait(20)
        reading.cancel()
        with pytest.raises(CancelledError):
            read.result(20)


def test_cancelling_closes_the_connection_and_later_reads_open_another(server, remote) -> None:
    reading = remote("stuck")
    cancelled(reading, server)
    until = time.monotonic() + 10
    while not server.ended and time.monotonic() < until:
        time.sleep(0.01)
    assert server.ended == [b""]
    assert reading.read_ranges(parts(1)) == [DATA[:1500]]


def test_the_bytes_read_are_not_kept(remote) -> None:
    reading = remote("things", hedge_percentile=0)
    whole = [ByteRange("shard.tar", 0, len(DATA))] * 32
    reading.read_ranges(whole[:1])
    tracemalloc.start()
    try:
        assert reading.read_ranges(whole) == [DATA] * 32
        assert tracemalloc.get_traced_memory()[0] < 4 * len(DATA)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE"])
def test_certificates_are_verified_with_those_of_the_environment(
    server, tmp_path: Path, monkeypatch, variable: str, remote
) -> None:
    for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    authority = encrypt(server)
    with pytest.raises(OSError, match=r"things/shard\.tar cannot be read: no valid certificate: localhost"):
        remote("things", "https").read_ranges(parts(1))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv(variable, str(tmp_path / "ca.pem"))
    assert remote("things", "https").read_ranges(parts(20)) == wanted(20)


def test_reads_by_fsspec_are_hedged_cancelled_and_explained_too(server, remote_store) -> None:
    def by_fsspec(folder: str, **settings) -> RemoteStore:  # an option that our own client does not know
        url = f"http://127.0.0.1:{server.server_port}/{folder}"
        return remote_store(url, {"headers": {"X-Asked-By": "fsspec"}}, **settings)

    reading = by_fsspec("late")
    assert reading.read_ranges(parts(60)) == wanted(60)  # measures latencies
    server.late.set()
    began = time.monotonic()
    assert reading.read_ranges(parts(10)) == wanted(10)
    assert time.monotonic() - began < LATE
    assert reading.counters["hedges_won"] == 1
    cancelled(by_fsspec("stuck"), server)
    with pytest.raises(TimeoutError, match=r"refusing/shard\.tar bytes 0-1499 .*the last: HTTP 503"):
        by_fsspec("refusing", deadline=1).read_ranges(parts(1))


NAME_SERVER = """
import socket, sys, threading, time
from storage.limits import RemoteReads
from storage.ranges import ByteRange
from storage.remote import RemoteStore

code, deadline = int(sys.argv[1]), float(sys.argv[2])
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))

def respond():
    while True:
        query, client = server.recvfrom(512)
        if code:  # else it stays silent
            server.sendto(query[:2] + bytes([0x81, 0x80 | code]) + query[4:], client)

threading.Thread(target=respond, daemon=True).start()
reading = RemoteStore("http://store.example.org/things", {}, RemoteReads(deadline=deadline))
began = time.monotonic()
try:
    reading.read_ranges([ByteRange("shard.tar", 0, 10)])
except OSError as error:
    print(type(error).__name__, error)
failed = time.monotonic()
reading.close()
print(failed - began, time.monotonic() - failed, reading.counters["retries"], time.time())
"""


@pytest.mark.parametrize(
    ("code", "deadline", "message", "retries"),
    [
        (3, 30, r"OSError .*things/shard\.tar cannot be read: host not found: store\.example\.org", False),
        (2, 3, r"TimeoutError .*\d+ tries\); the last: host not found: store\.example\.org", True),
        (0, 3, r"TimeoutError .*\(1 tries\); the last: no connection within 3 s", False),
    ],
    ids=["no such name", "the name server fails", "the name server is silent"],
)
def test_a_wrong_host_name_is_reported_at_once_and_a_failing_name_server_is_retried(
    tmp_path: Path, code: int, deadline: float, message: str, retries: bool
) -> None:
    """A real name server in its own network namespace; responses SERVFAIL (2), NXDOMAIN (3), or none (0)."""
    leave_out(why_not())
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "reading.py").write_text(NAME_SERVER)
    boot = f"ip link set lo up && mount --bind {tmp_path}/resolv.conf /etc/resolv.conf"
    words = f"{boot} && exec {sys.executable} {tmp_path}/reading.py {code} {deadline}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", words], capture_output=True, text=True, env=environment, timeout=100
    )
    over = time.time()
    assert done.returncode == 0, done.stderr
    error, seconds = done.stdout.splitlines()
    assert re.search(message, error), error
    until_error, closing, count, last = map(float, seconds.split())
    assert until_error < deadline + 2
    assert closing < 4  # though libcurl's thread may wait for the name server for ten seconds
    assert over - last < 4  # nor does it delay the end of the process
    assert (count > 0) == retries
