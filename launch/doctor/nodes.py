"""Starts launch/doctor/probe.py on every node, over ssh, Slurm or directly, and asks it questions."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10")


class NodeError(Exception):
    """A node that does not answer, or a question that it could not answer; the message is its reason."""


class Node:
    """A host of the cluster on which the probe runs."""

    def __init__(self, name: str, slots: int, command: Sequence[str]) -> None:
        """slots: processes that a job has there."""
        self.name, self.slots = name, slots
        self.address = address_in_slurm(name) if command[0] == "srun" else name
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._stderr_lines: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Keep the last lines of stderr, of the probe and of ssh."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr_lines = [*self._stderr_lines[-5:], line.strip()]

    def ask(self, question: str, *arguments: Any, seconds: float = 120.0) -> Any:
        """A method of launch.doctor.probe.Probe. Raises NodeError, also when there is no response within `seconds`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        alarm = threading.Timer(seconds, self._process.kill)
        alarm.start()
        try:
            self._process.stdin.write(json.dumps({"ask": question, "with": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            self._listener.join(2)
            if not alarm.is_alive() and self._process.poll() == -9:
                raise NodeError(f"no response within {seconds:.0f} s")
            raise NodeError(" ".join(self._stderr_lines[-1:]) or "no reason given")
        answer = json.loads(line)
        if "error" in answer:
            raise NodeError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def find_nodes(hostfile: str | None) -> tuple[dict[str, int], str]:
    """Host -> slots, and how to reach them: "ssh" for a hostfile, "srun" within a Slurm job, "" for this host alone.

    Raises ValueError when the hostfile is missing or damaged.
    """
    if hostfile:
        from deepspeed.launcher.runner import fetch_hostfile

        found = fetch_hostfile(hostfile) if Path(hostfile).is_file() else None
        if not found:
            raise UserError(f"--hostfile {hostfile} has no hosts: write one per line, such as `node1 slots=8`")
        return dict(found), "ssh"
    if "SLURM_JOB_NODELIST" in os.environ:
        names = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
        slots = int(os.environ.get("TASKS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or 1)
        return dict.fromkeys(names, slots), "srun"
    return {"localhost": 0}, ""


def address_in_slurm(name: str) -> str:
    """The address at which Slurm reaches a node."""
    words = _scontrol("--oneliner", "show", "node", name)
    return next((word.split("=", 1)[1] for word in words if word.startswith("NodeAddr=")), name)


def _scontrol(*arguments: str) -> list[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout.split()


def start(name: str, slots: int, way: str) -> Node:
    """Start the probe on a host, with the environment that `deepspeed` would give its processes there."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    words = ["env", f"PYTHONPATH={path}", sys.executable, "-P", "-u", "-m", "launch.doctor.probe"]
    if way == "srun":
        words = ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={name}", *words]
    elif way == "ssh":
        exports = [f"export {key}={shlex.quote(value)};" for key, value in exported_variables().items()]
        return Node(name, slots, [*SSH, name, *exports, f"cd {shlex.quote(os.getcwd())}; exec {shlex.join(words)}"])
    return Node(name, slots, words)


def exported_variables() -> dict[str, str]:
    """The variables that `deepspeed` exports to other hosts: by their prefixes, and those of .deepspeed_env."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher.runner import DEEPSPEED_ENVIRONMENT_NAME, DEEPSPEED_ENVIRONMENT_PATHS, EXPORT_ENVS

    prefixes = tuple(EXPORT_ENVS + get_accelerator().export_envs())
    found = {key: value for key, value in os.environ.items() if key.startswith(prefixes) and key != "PYTHONPATH"}
    for folder in DEEPSPEED_ENVIRONMENT_PATHS:
        path = Path(folder) / DEEPSPEED_ENVIRONMENT_NAME
        if path.is_file():
            lines = path.read_text().splitlines()
            found |= dict(line.split("=", 1) for line in lines if "=" in line)
    return found


def ask_all(nodes: Sequence[Node], question: Callable[[Node], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Ask all nodes at once: host -> answer, and host -> reason of those without one."""

    def one(node: Node) -> tuple[Any, str | None]:
        try:
            return question(node), None
        except NodeError as error:
            return None, str(error)

    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        found = {node.name: answer for node, answer in zip(nodes, pool.map(one, nodes))}
    answers = {name: answer for name, (answer, reason) in found.items() if reason is None}
    return answers, {name: reason for name, (_, reason) in found.items() if reason is not None}
