"""Hosts for tests on one machine: each with its own network address, name, processes and sshd.

A host is a set of Linux namespaces whose first process is an sshd. A bridge of the host `store` connects them; `store`
also serves S3. Needs root, the programs that `make packages` installs and the right to create namespaces; without them
the tests are skipped, with the reason of `why_not`.

    def test_something(hosts: Hosts) -> None:
        hosts.run("node1", "ssh", "node2", "hostname")
        hosts.cut("node2")                                   # as with a pulled cable
        hosts.shape("node2", "tbf", "rate", "8mbit", ...)    # arguments of tc

The network of the machine itself does not change, and everything ends with the process of the test.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from needs import lacks, leave_out, program
from object_stores import environment_of, start, store_server, until
from places import ROOT

ADDRESSES = {"store": "10.203.77.1", "node1": "10.203.77.11", "node2": "10.203.77.12"}
PROGRAMS = ("ip", "tc", "nft", "ssh", "sshd", "ssh-keygen", "unshare", "nsenter", "pdsh")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
S3_PORT = 5000
SSHD = """
Port 22
HostKey {folder}/host
PidFile none
UsePAM no
PasswordAuthentication no
StrictModes no
AuthorizedKeysFile {folder}/login.pub
MaxStartups 100
"""
SSH = """
IdentityFile {folder}/login
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
BOOT = """
set -e
hostname {name}
mount --bind {folder}/{name}.hosts /etc/hosts
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
mkdir -p ~/.ssh && mount --bind {folder}/ssh ~/.ssh
ip link set lo up
exec {sshd} -D -e -f {folder}/sshd_config
"""


def why_not() -> str:
    """Why this machine cannot run hosts; empty if it can."""
    if reason := lacks(*PROGRAMS, root="hosts of their own need network namespaces"):
        return reason
    trial = "hostname trial && ip link add name one type veth peer name two && ip link add name eth0 type bridge"
    trial += " && mount -t tmpfs tmpfs /run"
    words = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", trial]
    tried = subprocess.run(words, capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"namespaces are not permitted here ({tried.stderr.strip()})"


class Hosts:
    """`store`, `node1` and `node2`, on the file system of this machine, as with a network file system."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.root, self.folder, self.environment = ROOT, folder, dict(environment)
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self.environment["HOME"] = pwd.getpwuid(os.getuid()).pw_dir  # ssh's own view, whatever HOME is
        self._first: dict[str, int] = {}  # process 1 of each host
        self._running: dict[str, subprocess.Popen] = {}
        self._make_files()
        for name in ADDRESSES:
            self.start(name)

    def _make_files(self) -> None:
        for key in ("host", "login"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        for own in ADDRESSES:  # as Debian does it: a host's own name is a loopback address
            names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items() if name != own)
            (self.folder / f"{own}.hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {own}\n{names}")
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        (self.folder / "ssh").mkdir(mode=0o700)
        (self.folder / "ssh" / "config").write_text(SSH.format(folder=self.folder))

    def start(self, name: str) -> None:
        """Start a host and connect it."""
        boot = BOOT.format(name=name, folder=self.folder, sshd=program("sshd"))
        path = self.folder / f"{name}.log"
        path.unlink(missing_ok=True)
        words = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", boot)
        self._running[name] = start(*words, log=path, env=self.environment)
        until(lambda: "listening on" in path.read_text(), path.read_text, self._running[name])
        self._first[name] = psutil.Process(self._running[name].pid).children()[0].pid
        if name == "store":
            self.ip(name, "link", "add", "name", "eth0", "type", "bridge")
        else:
            self._forget_cable(name)
            self.ip("store", "link", "add", "name", f"to-{name}", "type", "veth", "peer", "name", "far")
            self.ip("store", "link", "set", "far", "netns", str(self._first[name]))
            self.ip("store", "link", "set", f"to-{name}", "master", "eth0", "up")
            mac = f"02:00:00:00:00:{int(ADDRESSES[name].split('.')[-1]):02x}"  # as before, when it comes again
            self.ip(name, "link", "set", "far", "name", "eth0", "address", mac)
        self.ip(name, "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        self.ip(name, "link", "set", "eth0", "up")

    def _forget_cable(self, name: str) -> None:
        """Remove the cable of an ended host: the kernel may not have done so yet."""
        words = ["nsenter", "-t", str(self._first["store"]), "--net", "--", "ip", "link", "del", f"to-{name}"]
        subprocess.run(words, capture_output=True, env=self.environment)

    def ip(self, name: str, *words: str) -> None:
        """`ip WORDS` in a host's network."""
        self._in_network(name, "ip", *words)

    def cut(self, name: str) -> None:
        """Disconnect a host: its processes continue without a network."""
        self.ip("store", "link", "set", f"to-{name}", "down")

    def heal(self, name: str) -> None:
        """Connect it again."""
        self.ip("store", "link", "set", f"to-{name}", "up")

    def shape(self, name: str, *words: str) -> None:
        """`tc` on a host's cable, both ways, for example "netem", "rate", "8mbit"; no words: as it was."""
        for host, device in ((name, "eth0"), ("store", f"to-{name}")):
            if words:
                self._in_network(host, "tc", "qdisc", "replace", "dev", device, "root", *words)
            else:
                self._in_network(host, "tc", "qdisc", "del", "dev", device, "root")

    def firewall(self, name: str, rules: str) -> None:
        """Load nftables rules in a host, in place of those before."""
        self._in_network(name, "nft", "flush ruleset; " + rules)

    def kill(self, name: str) -> None:
        """End all processes of a host at once, and its network."""
        self._running[name].kill()
        self._running[name].wait()

    def popen(self, name: str, *words: object, log: Path, cwd: Path | str = ROOT, **settings: str) -> subprocess.Popen:
        """Start a command in a host, its output into `log`; settings: of the environment."""
        return start(*self._enter(name, cwd, *words), log=log, env={**self.environment, **settings})

    def run(
        self, name: str, *words: object, cwd: Path | str = ROOT, check: bool = True, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a host to its end."""
        result = subprocess.run(
            self._enter(name, cwd, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**self.environment, **settings},
        )
        assert result.returncode == 0 or not check, f"{words}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def processes(self, name: str, part: str) -> list[psutil.Process]:
        """The processes of a host whose command line holds `part`."""
        own, found = os.readlink(f"/proc/{self._first[name]}/ns/pid"), []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == own and part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _enter(self, name: str, cwd: Path | str, *words: object) -> list[str]:
        return ["nsenter", "-t", str(self._first[name]), *NAMESPACES, f"--wd={cwd}", "--", *map(str, words)]

    def _in_network(self, name: str, *words: str) -> None:
        command = ["nsenter", "-t", str(self._first[name]), "--net", "--", *words]
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        assert result.returncode == 0, f"{words}: {result.stderr}"

    def serve_s3(self) -> None:
        """Serve S3 on the store's address; the environment of commands in hosts points there."""
        server = store_server("moto_server")
        log = self.folder / "s3.log"
        process = self.popen("store", server, "-H", "0.0.0.0", "-p", S3_PORT, log=log)
        until(lambda: "Running on" in log.read_text(), log.read_text, process)
        self.environment.update(environment_of("s3", f"{ADDRESSES['store']}:{S3_PORT}"))

    def fill(self, source: Path, url: str) -> None:
        """Copy a folder into the S3 server."""
        code = (
            "import sys, fsspec\nfs = fsspec.filesystem('s3')\nfs.makedirs(sys.argv[2].split('/')[2], exist_ok=True)\n"
        )
        code += "fs.put(sys.argv[1] + '/', sys.argv[2] + '/', recursive=True)"
        self.run("store", sys.executable, "-c", code, source, url)

    def close(self) -> None:
        """End all hosts."""
        for name in reversed(ADDRESSES):
            self.kill(name)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    leave_out(why_not())
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    made = Hosts(tmp_path_factory.mktemp("hosts"), {**outside, **quiet})
    made.serve_s3()
    yield made
    made.close()
