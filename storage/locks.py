"""Locks on folders that processes on several machines may write to.

Two mechanisms, because neither suffices everywhere. The kernel's lock (flock) on a file that is open for writing ends
with its process; it works between machines on NFS with a lock daemon, but not on mounts with `nolock` or `local_lock`,
nor on file systems without locks. So the holder also writes a note to the file, with a counter that grows at every
heartbeat. A process that finds the note of another machine watches whether its counter still grows. Clocks are not
compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEARTBEAT = 3.0  # seconds between two heartbeats
MISSED_HEARTBEATS = 5  # in a row, after which the process of a note counts as dead
SETTLE = 1.0  # seconds until a note counts without the kernel's locks: another process may be writing its own
POLL = 0.2

log = logging.getLogger(__name__)


class HeldError(Exception):
    """Another process holds a lock; the message names it, if known."""


def machine() -> str:
    """The id of the running kernel: its locks work between all of its processes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Lock:
    """The lock of the file `path`, held from `acquire` to `release`, or to the end of this process.

    shared: others may share it; its holders write no note. beside: other lock files whose notes are checked as well,
    where the kernel's lock does not exclude their holders.
    """

    def __init__(self, path: Path, shared: bool = False, beside: Iterable[Path] = ()) -> None:
        self.path, self.shared, self.beside = path, shared, list(beside)
        self._descriptor = -1
        self._kernel = True  # whether its file system has locks
        self._note: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine(),
            "token": uuid.uuid4().hex,
        }
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._send_heartbeats, name="lock", daemon=True)

    def acquire(self, seconds: float = 0) -> None:
        """Take the lock; wait up to `seconds` for the process that holds it. Raises HeldError."""
        deadline = time.monotonic() + seconds
        while True:
            self._open()
            if not self._lock():
                os.close(self._descriptor)
                if time.monotonic() >= deadline:
                    raise HeldError(holder(read_note(self.path)))
            elif self._is_current():
                break
            else:  # its holder has removed the file meanwhile
                os.close(self._descriptor)
                continue
            time.sleep(POLL)
        try:
            self._watch_notes()
            if not self.shared:
                self._leave_note()
        except BaseException:
            os.close(self._descriptor)
            raise

    def make_exclusive(self) -> bool:
        """Turn a shared lock into an exclusive one; False, and the lock is lost, where others hold it too."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # first: of two processes the later one must get it
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Release the lock."""
        self._released.set()
        if self._heart.ident is not None:
            self._heart.join()  # before the descriptor can be reused for another file
        if not self.shared and same_holder(read_note(self.path), self._note):
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _open(self) -> None:
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # its holder has just removed the folder
                # For writing: NFS gives no exclusive lock on files open for reading.
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                return

    def _lock(self) -> bool:
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            self._kernel = False
        return True

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _watch_notes(self) -> None:
        """Watch notes of processes that the kernel's lock may not exclude; raises HeldError when a counter grows."""
        found = {path: note for path in [self.path, *self.beside] if (note := self._foreign(path))}
        if not found:
            return
        names = " and ".join(map(holder, found.values()))
        log.info(
            "%s: waiting %g s to see whether %s is still running",
            self.path.parent,
            MISSED_HEARTBEATS * HEARTBEAT,
            names,
        )
        deadline = time.monotonic() + MISSED_HEARTBEATS * HEARTBEAT
        while time.monotonic() < deadline:
            time.sleep(POLL)
            for path, before in found.items():
                now = self._foreign(path)
                if now and now != before:
                    raise HeldError(holder(now))

    def _foreign(self, path: Path) -> dict[str, Any]:
        """The note in a file; empty if there is none, or its process has ended."""
        note = read_note(path)
        return {} if self._kernel and note.get("machine") == self._note["machine"] else note

    def _leave_note(self) -> None:
        self._write(0)
        if not self._kernel:
            time.sleep(SETTLE)
            if not same_holder(note := read_note(self.path), self._note):
                raise HeldError(holder(note))
        self._heart.start()

    def _send_heartbeats(self) -> None:
        number = 0
        while not self._released.wait(HEARTBEAT):
            number += 1
            with contextlib.suppress(OSError):  # a full disk, an unavailable server
                if same_holder(read_note(self.path), self._note):
                    self._write(number)

    def _write(self, number: int) -> None:
        data = json.dumps({**self._note, "beat": number}).encode()
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))
        os.fsync(self._descriptor)  # visible to other clients of a network file system


def read_note(path: Path) -> dict[str, Any]:
    """The note of the holder of a lock; empty without one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def same_holder(note: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two notes have the same holder."""
    return note.get("token") == other["token"]


def holder(note: Mapping[str, Any]) -> str:
    """The process of a note, for messages."""
    return f"process {note['pid']} on {note['host']}" if {"pid", "host"} <= set(note) else "another process"
