"""The store where the processes of a job find each other: on the host of rank 0, on a free port."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistNetworkError, TCPStore

from runtime.errors import UserError
from runtime.ranks import Ranks

POLL_SECONDS = 0.1
_servers: list[TCPStore] = []  # of rank 0, kept as long as the process lives
_agreed: list[int] = []  # the port, once it is known


def master_port(ranks: Ranks, seconds: float) -> int:
    """The port of the store on MASTER_ADDR, also set as MASTER_PORT; rank 0 listens there from now on.

    On a single node under `deepspeed` rank 0 replaces a port that is in use by a free one and writes it to a file,
    which the others wait for `seconds` seconds. Elsewhere it raises UserError. `torchrun` listens itself.
    """
    if not _agreed and not _hosted_by_launcher():
        file = _port_file()
        if ranks.is_first:
            _servers.append(_listen(may_choose=file is not None))
            _agreed.append(_servers[0].port)
            if file is not None:
                temporary = file.with_suffix(f".{os.getpid()}")
                temporary.write_text(str(_agreed[0]))
                os.replace(temporary, file)
                _remove_leftovers(file)
        elif file is not None:
            _agreed.append(_read_port(file, seconds))
        os.environ.update({"MASTER_PORT": str(_agreed[0])} if _agreed else {})
    return int(os.environ["MASTER_PORT"])


def connect(ranks: Ranks, seconds: float) -> TCPStore:
    """A separate connection to the store, for the calling thread."""
    port, timeout = master_port(ranks, seconds), timedelta(seconds=seconds)
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timeout)


def remove_port_file() -> None:
    """Rank 0 calls once all ranks are connected."""
    file = _port_file()
    if file is not None:
        file.unlink(missing_ok=True)


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
        f"port {port}, where the processes meet, is in use on this host, usually by another job: choose another with "
        f"`deepspeed --master_port {port + 1} ...`; under srun or mpirun export MASTER_PORT={port + 1}"
    )


def _hosted_by_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _port_file() -> Path | None:
    """The file with the port for the processes of one `deepspeed` on a single node; None under other launchers."""
    if os.environ.get("LOCAL_SIZE") != os.environ["WORLD_SIZE"] or "CROSS_SIZE" not in os.environ:
        return None
    launcher = os.getppid()
    try:
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # the launcher is gone
        return None
    return Path(tempfile.gettempdir()) / f"singularity-port-{os.getuid()}-{namespace}-{launcher}-{started}"


def _remove_leftovers(file: Path) -> None:
    """Remove the files of launchers that are gone: their jobs failed before all ranks were connected."""
    common, launcher, _ = file.name.rsplit("-", 2)
    for other in file.parent.glob(f"{common}-*-*"):
        pid = other.name.removeprefix(f"{common}-").split("-")[0]
        if pid != launcher and not Path(f"/proc/{pid}").exists():
            other.unlink(missing_ok=True)


def _read_port(file: Path, seconds: float) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if _agreed:  # another thread has read it
            return _agreed[0]
        try:
            if file.stat().st_uid == os.getuid():
                return int(file.read_text())
        except FileNotFoundError:
            pass
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"rank 0 did not write its port to {file} within {seconds:.0f} s")
