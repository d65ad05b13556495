"""A Slurm cluster of two nodes on this machine, for tests: slurmctld, munged and two slurmd.

Needs root and Debian's slurm-wlm and munge (`make packages`); without them the tests are skipped.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import lacks, leave_out, program
from object_stores import free_port, start, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
CONFIG = """
ClusterName=two
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
ReturnToService=2
KillWait=60
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """Nodes n1 and n2; jobs of the partition `high` take them from those of `low`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._servers: list[subprocess.Popen] = []
        (folder / "state").mkdir()
        ports = [free_port() for _ in range(3)]
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ports=ports))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key, socket = folder / "munge.key", folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
        self._serve("munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={key}", *files)
        until(socket.exists, self.logs, self._servers[-1])
        self._serve("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._serve("slurmd", "-D", "-N", node)
        until(lambda: self.run("sinfo", "-h", "-o", "%t %D", check=False).split() == ["idle", "2"], self.logs)

    def _serve(self, name: str, *words: str) -> None:
        log = self.folder / "servers.log"
        self._servers.append(start(program(name), *words, log=log, env=self.environment))

    def logs(self) -> str:
        """The end of all logs."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("*.log")))

    def run(self, *words: object, check: bool = True, cwd: Path | str | None = None, **settings: str) -> str:
        """A command's output."""
        result = subprocess.run(
            list(map(str, words)), env={**self.environment, **settings}, cwd=cwd, capture_output=True, text=True
        )
        assert result.returncode == 0 or not check, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *words: object, cwd: Path | str, **settings: str) -> str:
        """`sbatch`; returns the job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **settings).strip()

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def close(self) -> None:
        """End all jobs and servers."""
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 60
        while self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)
        for server in reversed(self._servers):
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    leave_out(lacks(*PROGRAMS, root="Slurm's daemons need it"))
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    yield made
    made.close()
