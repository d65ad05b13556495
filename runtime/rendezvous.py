"""Where the processes of a job find each other: a store on the first rank's host, on a port that is free."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistNetworkError, TCPStore

from runtime.errors import UserError
from runtime.ranks import Ranks

LOOK_SECONDS = 0.1
_listening: list[TCPStore] = []  # the first rank's server, as long as the process lives
_agreed: list[int] = []  # the port, once it is known


def meeting_port(ranks: Ranks, seconds: float) -> int:
    """The port on MASTER_ADDR where the ranks meet, also set as MASTER_PORT; the first rank listens there from now on.

    On a single node under `deepspeed` another port takes the place of one that another job uses, and the first rank
    leaves a note of it for the others, who wait `seconds` seconds for it. Elsewhere the first rank raises UserError.
    `torchrun` listens itself.
    """
    if not _agreed and not _hosted_by_launcher():
        note = _note()
        if ranks.is_first:
            _listening.append(_listen(may_choose=note is not None))
            _agreed.append(_listening[0].port)
            if note is not None:
                aside = note.with_suffix(f".{os.getpid()}")
                aside.write_text(str(_agreed[0]))
                os.replace(aside, note)
                _remove_left(note)
        elif note is not None:
            _agreed.append(_noted(note, seconds))
        os.environ.update({"MASTER_PORT": str(_agreed[0])} if _agreed else {})
    return int(os.environ["MASTER_PORT"])


def meet(ranks: Ranks, seconds: float) -> TCPStore:
    """A connection of its own to the store, for the calling thread."""
    port, timeout = meeting_port(ranks, seconds), timedelta(seconds=seconds)
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timeout)


def forget_port() -> None:
    """Remove the note: all ranks have met. The first rank calls."""
    note = _note()
    if note is not None:
        note.unlink(missing_ok=True)


def _listen(may_choose: bool) -> TCPStore:
    port = int(os.environ["MASTER_PORT"])
    for each in (port, 0) if may_choose else (port,):
        try:
            # Several tenants: PyTorch's own rendezvous in this process finds the server and uses it.
            return TCPStore(os.environ["MASTER_ADDR"], each, is_master=True, wait_for_workers=False, multi_tenant=True)
        except DistNetworkError as error:
            if "EADDRINUSE" not in str(error) and "in use" not in str(error):
                raise
    raise UserError(
        f"port {port}, where the processes are to meet, is in use on this host, as a rule by another job: choose "
        f"another with `deepspeed --master_port {port + 1} ...`; under srun or mpirun export MASTER_PORT={port + 1}"
    )


def _hosted_by_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _note() -> Path | None:
    """The file that names the port to the processes of one `deepspeed` on a single node; None under other launchers."""
    if os.environ.get("LOCAL_SIZE") != os.environ["WORLD_SIZE"] or "CROSS_SIZE" not in os.environ:
        return None
    launcher = os.getppid()
    try:
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # the launcher has gone
        return None
    return Path(tempfile.gettempdir()) / f"singularity-port-{os.getuid()}-{namespace}-{launcher}-{started}"


def _remove_left(note: Path) -> None:
    """Remove the notes of launchers that have gone, which jobs that failed before they had met have left."""
    common, launcher, _ = note.name.rsplit("-", 2)
    for other in note.parent.glob(f"{common}-*-*"):
        pid = other.name.removeprefix(f"{common}-").split("-")[0]
        if pid != launcher and not Path(f"/proc/{pid}").exists():
            other.unlink(missing_ok=True)


def _noted(note: Path, seconds: float) -> int:
    """What the first rank has written."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if _agreed:  # another thread has read it
            return _agreed[0]
        try:
            if note.stat().st_uid == os.getuid():
                return int(note.read_text())
        except FileNotFoundError:
            pass
        time.sleep(LOOK_SECONDS)
    raise RuntimeError(f"rank 0 has not told its port in {seconds:.0f} s")
