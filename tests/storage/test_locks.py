"""Locks between processes and machines, also on NFS, without locks, and with separate locks for each machine."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.build import main as build
from sharding.shards.output import open_output
from storage import locks
from storage.locks import HeldError, Lock

HOLD = """
import sys, time
from pathlib import Path
from storage import locks
locks.HEARTBEAT = float(sys.argv[3])
locks.machine = lambda: sys.argv[2]
if sys.argv[4] != "flock":
    def refuse(*_): raise OSError(int(sys.argv[4]), "no locks")
    locks.fcntl.flock = refuse
lock = locks.Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    monkeypatch.setattr(locks, "SETTLE", 0.2)


@pytest.fixture
def hold(quick: None):
    """Starts a process that holds a lock, as on another machine."""
    processes: list[subprocess.Popen] = []

    def start(path: Path, machine: str = "other", kind: str = "flock") -> subprocess.Popen:
        words = [sys.executable, "-c", HOLD, path, machine, "0.2", kind]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def refusing(number: int) -> Callable:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def nfs_flock(descriptor: int, kind: int, real: Callable = fcntl.flock) -> None:
    """As the client of NFS: by fcntl, which requires a file that is open for writing."""
    writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_RDWR | os.O_WRONLY)
    if kind & fcntl.LOCK_EX and not writable:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    real(descriptor, kind)


def test_a_second_build_is_refused_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", nfs_flock)
    with open_output(str(tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"another build is writing to .*out \(process {os.getpid()} on "):
            with open_output(str(tmp_path / "out")):
                pass


@pytest.mark.parametrize("kind", ["flock", str(errno.ENOLCK), str(errno.EOPNOTSUPP)])
def test_a_lock_of_another_machine_holds_while_that_runs(tmp_path: Path, hold, monkeypatch, kind: str) -> None:
    """With and without the kernel's lock."""
    path = tmp_path / "lock"
    holder = hold(path, kind=kind)
    if kind != "flock":
        monkeypatch.setattr(fcntl, "flock", refusing(int(kind)))
    with pytest.raises(HeldError, match=f"process {holder.pid} on "):
        Lock(path).acquire()
    holder.kill()
    holder.wait()
    began = time.monotonic()
    lock = Lock(path)
    lock.acquire()
    assert time.monotonic() - began < 5
    lock.release()
    Lock(path).acquire()


def test_a_mount_with_separate_locks_for_each_machine(tmp_path: Path, hold) -> None:
    path = tmp_path / "lock"
    holder = hold(path, kind=str(errno.ENOLCK))  # its lock is not visible here
    with pytest.raises(HeldError, match=f"process {holder.pid} on "):
        Lock(path).acquire()


def test_a_killed_process_of_this_machine_causes_no_waiting(tmp_path: Path, hold, monkeypatch) -> None:
    path = tmp_path / "lock"
    holder = hold(path, machine=locks.machine())
    holder.kill()
    holder.wait()
    assert "pid" in json.loads(path.read_text())
    monkeypatch.setattr(locks, "HEARTBEAT", 1000.0)
    Lock(path).acquire()


def test_without_locks_only_one_of_several_processes_gets_it(tmp_path: Path, quick, monkeypatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    monkeypatch.setattr(Lock, "_watch_notes", lambda _: None)  # each one looked before the others had written
    held: list[Lock] = []

    def begin() -> None:
        lock = Lock(tmp_path / "lock")
        with contextlib.suppress(HeldError):
            lock.acquire()
            held.append(lock)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    held[0].release()


def test_whole_builds_and_job_parts_exclude_each_other_without_locks(tmp_path: Path, quick, monkeypatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    output = str(tmp_path / "out")
    with open_output(output, part="1/2"):
        for part in ("", "1/2"):
            with pytest.raises(ValueError, match="another build is writing to"):
                with open_output(output, part=part):
                    pass
        with open_output(output, part="2/2"):
            pass
    with open_output(output):
        with pytest.raises(ValueError, match="another build is writing to"):
            with open_output(output, part="1/2"):
                pass


def test_a_refused_build_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.json").write_text('[{"image": "1.jpg"}]')
    output = tmp_path / "new" / "folder" / "out"
    words = ["--annotations", str(tmp_path / "a.json"), "--media-root", str(tmp_path), "--media-type", "image"]
    for part in ([], ["--part", "1/2"]):
        assert build([*words, "--output", str(output), *part]) == 2
        assert 'no "caption"' in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]
    (tmp_path / "mine").mkdir()
    assert build([*words, "--output", str(tmp_path / "mine")]) == 2
    assert list((tmp_path / "mine").iterdir()) == []
    (tmp_path / "mine" / "x.txt").touch()
    assert build([*words, "--output", str(tmp_path / "mine")]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["x.txt"]
