"""The checks of the doctor, from nodes and network to storage and a trial run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from launch.doctor import findings
from launch.doctor.findings import BAD, OK, WARNING, Finding
from launch.doctor.nodes import ROOT, Node, NodeError, ask_all, find_nodes, start
from runtime.units import duration
from train.config.settings import RunConfig, load_settings

REACH_ADVICE = (
    "make `ssh HOST` work from here without a password, and have the repository and its environment at the same path "
    "on every host"
)
TRIAL_WARM_UP = 3  # steps of a trial that do not count
KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"


def examine_nodes(nodes: Sequence[Node]) -> list[Finding]:
    """Versions, code, hardware, GPUs and clocks."""
    facts, failures = ask_all(nodes, lambda node: node.ask("facts"))
    found = findings.failed("facts", failures, "run `python -m launch.doctor.probe` there to see why")
    if not facts:
        return found
    code = {host: fact["code"] for host, fact in facts.items()}
    found += findings.versions(facts)
    found += findings.compare("code", code, "bring the repository to the same state on every host (git status, pull)")
    found += findings.hardware(facts)
    found += findings.gpus(facts)
    offsets, _ = ask_all(nodes, _clock_offset)
    return found + findings.clocks(offsets)


def _clock_offset(node: Node) -> float:
    """Offset of a node's clock in seconds, from the fastest of several requests."""
    tries = []
    for _ in range(5):
        asked = time.time()
        clock = node.ask("clock")
        answered = time.time()
        tries.append((answered - asked, clock - (asked + answered) / 2))
    return min(tries)[1]


def examine_network(nodes: Sequence[Node], port: int, least_gbit: float) -> list[Finding]:
    """Between nodes: ports and the speed of links. On one as on many: an all-reduce."""
    found = examine_links(nodes, port, least_gbit) if len(nodes) > 1 else []
    if any(finding.verdict == BAD for finding in found):  # it would only take long
        return found
    return [*found, *examine_collective(nodes, port)]


def examine_links(nodes: Sequence[Node], port: int, least_gbit: float) -> list[Finding]:
    """Every node to every other, on the port where ranks meet and on others; the speed of links."""
    listening, failures = ask_all(nodes, lambda node: node.ask("listen", port))
    found = findings.failed("ports", failures, "check the network of this host")
    for host, answer in listening.items():
        if answer["error"]:
            found.append(Finding("ports", host, BAD, answer["error"], "stop its process, or choose another --port"))
    reached = _connections(nodes, listening)
    found += findings.ports(reached, port)
    speeds: dict[tuple[str, str], float] = {}
    for source, target in zip(nodes, [*nodes[1:], nodes[0]]) if not any(reached.values()) else ():
        try:
            open_port = listening[target.name]["ports"][-1]
            speeds[source.name, target.name] = source.ask("send", target.address, open_port, seconds=300)
        except NodeError as error:
            found.append(Finding("link", f"{source.name} -> {target.name}", BAD, str(error), "repair the link"))
    ask_all(nodes, lambda node: node.ask("close_ports"))
    return found + findings.links(speeds, least_gbit)


def _connections(nodes: Sequence[Node], listening: dict[str, Any]) -> dict[tuple[str, str, int], str]:
    """{(from, to, port): empty, or why no connection opens}."""

    def from_one(node: Node) -> dict[tuple[str, str, int], str]:
        others = [other for other in nodes if other is not node and other.name in listening]
        targets = [(other, port) for other in others for port in listening[other.name]["ports"]]
        reasons = node.ask("connect", [(other.address, port) for other, port in targets])
        return {(node.name, other.name, port): reason for (other, port), reason in zip(targets, reasons)}

    answers, _ = ask_all(nodes, from_one)
    return {connection: reason for found in answers.values() for connection, reason in found.items()}


def examine_collective(nodes: Sequence[Node], port: int) -> list[Finding]:
    """An all-reduce over all processes that a job would have, and a product of bf16 matrices on each."""
    ends = list(accumulate(node.slots for node in nodes))
    first_ranks = {node.name: end - node.slots for node, end in zip(nodes, ends)}
    world_size = ends[-1]
    try:
        master = nodes[0].ask("address_towards", nodes[1].address) if len(nodes) > 1 else "127.0.0.1"
    except NodeError as error:
        return findings.failed("all-reduce", {nodes[0].name: str(error)}, "check the network of this host")

    def all_reduce(node: Node) -> Any:
        return node.ask("collective", master, port, first_ranks[node.name], world_size, node.slots, seconds=180)

    answers, failures = ask_all(nodes, all_reduce)
    advice = "set NCCL_DEBUG=INFO (or GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME to the right interface) and look again"
    found = findings.failed("all-reduce", failures, advice)
    if not answers or failures:
        return found
    answer = answers[nodes[0].name]
    where, speed = "1 process", ""
    if world_size > 1:
        where, speed = f"{world_size} processes", f"{answer['gbit']:.3g} Gbit/s of bus bandwidth "
    text = f"{speed}over {answer['backend']}, sums and bf16 products are right"
    found.append(Finding("all-reduce", where, OK, text))
    speeds = {host: answer["tflops"] for host, answer in answers.items() if answer["tflops"]}
    advice = "look for throttling: `nvidia-smi -q -d PERFORMANCE`"
    return found + (findings.lagging("GPU", "TFLOP/s in bf16", speeds, advice) if speeds else [])


def examine_decoding(nodes: Sequence[Node]) -> list[Finding]:
    """Every node decodes a picture, in a separate process: on the CPU, and with DALI where there is a GPU."""
    answers, failures = ask_all(nodes, lambda node: node.ask("decode_one", seconds=180))
    advice = "run `python launch/doctor/decode_one.py` there to see more, or set decode=cpu"
    return findings.failed("decoding", failures, advice) + findings.decoding(answers)


def examine_storage(nodes: Sequence[Node], run: RunConfig) -> tuple[list[Finding], int]:
    """Every node reads some shards of every corpus; the first one checks that all their files are there.

    Returns also the number of samples of the corpora that can be read.
    """
    found: list[Finding] = []
    seeds = {node.name: number for number, node in enumerate(nodes)}
    advice = "check the URL, the credentials and the network to the store from that host, with its environment"
    total = 0

    def read_shards(node: Node) -> Any:
        return node.ask("storage", url, dict(run.storage), seeds[node.name])

    def list_files(node: Node) -> Any:
        return node.ask("listing", url, dict(run.storage))

    for url in run.train_urls():
        answers, failures = ask_all(nodes, read_shards)
        found += findings.failed("storage", {f"{host}: {url}": reason for host, reason in failures.items()}, advice)
        for host, read in answers.items():
            text = f"{read['shards']} shards of {read['samples']:,} samples read, {read['mb_per_second']:.3g} MB/s"
            found.append(Finding("storage", f"{host}: {url}", OK, text))
        total += next((read["samples"] for read in answers.values()), 0)
        listings, _ = ask_all(nodes[:1], list_files)
        for listing in listings.values():  # none where reading failed as well
            found += findings.listed(url, **listing)
    return found, total


def examine_output(nodes: Sequence[Node], run: RunConfig) -> list[Finding]:
    """Whether all nodes see the same output_dir: every rank writes its shard of a checkpoint there."""
    if not run.output_dir:
        advice = "give the job's output_dir, to check that all nodes share it"
        return [Finding("output_dir", "all", WARNING, "not set", advice)]
    path, token = str(Path(run.output_dir).absolute() / f".doctor-{uuid.uuid4().hex[:8]}"), uuid.uuid4().hex
    try:
        nodes[0].ask("write", path, token)
    except NodeError as error:
        return [Finding("output_dir", nodes[0].name, BAD, str(error), "choose an output_dir that can be written to")]
    answers, failures = ask_all(nodes, lambda node: node.ask("read", path))
    apart = {host: "cannot see the file that the first host wrote" for host, text in answers.items() if text != token}
    nodes[0].ask("remove", path)
    advice = "put output_dir on a file system that all hosts mount: every rank writes its shard of a checkpoint there"
    found = findings.failed("output_dir", {**apart, **failures}, advice)
    return found or [Finding("output_dir", "all", OK, f"{run.output_dir} is shared")]


def examine_ssh(names: Sequence[str]) -> list[Finding]:
    """Whether `deepspeed` returns when a host dies: without keep-alive pdsh's ssh waits for hours."""
    if "ServerAliveInterval" in os.environ.get("PDSH_SSH_ARGS_APPEND", ""):
        names = []
    for name in names:
        options = subprocess.run(["ssh", "-G", name], capture_output=True, text=True).stdout.split("\n")
        if "serveraliveinterval 0" in options:
            advice = f'export PDSH_SSH_ARGS_APPEND="{KEEP_ALIVE}", or set both in ~/.ssh/config'
            return [Finding("ssh", name, WARNING, "`deepspeed` would wait forever for a dead host", advice)]
    return [Finding("ssh", "all", OK, "detects a dead host")]


def estimate(nodes: Sequence[Node], options: argparse.Namespace, run: RunConfig, samples: int) -> list[Finding]:
    """Samples a second of every node's loader, of a trial of the training, and the time of an epoch."""
    asked = [options.config, options.settings, len(nodes), options.seconds]
    answers, failures = ask_all(nodes, lambda node: node.ask("loader", *asked, seconds=300 + 10 * options.seconds))
    found = findings.failed("loading", failures, "run `python -m loaders.bench URL` there to see more")
    if not answers or failures:
        return found
    rates = {host: answer["samples_per_second"] for host, answer in answers.items()}
    advice = "`python -m loaders.bench URL` there says whether reading or decoding is the bottleneck"
    found += findings.lagging("loading", "samples/s", rates, advice, WARNING)
    total = sum(rates.values())
    text = f"{total:,.4g} samples/s, an epoch of {samples:,} in {duration(samples / total)} at best"
    found.append(Finding("epoch", "loading", OK, text))
    if options.trial_steps and run.output_dir:
        found += trial(nodes, options, run, samples, total)
    return found


def trial(
    nodes: Sequence[Node], options: argparse.Namespace, run: RunConfig, samples: int, loading: float
) -> list[Finding]:
    """Some real steps of the job itself."""
    folder = Path(str(run.output_dir)).absolute() / f".doctor-trial-{uuid.uuid4().hex[:8]}"
    where = ["--hostfile", options.hostfile] if options.hostfile else ["--num_accelerators", str(nodes[0].slots)]
    steps = options.trial_steps + TRIAL_WARM_UP
    settings = [f"max_steps={steps}", "log_every=1", "save_every=1000000000", "stop_key=null", f"output_dir={folder}"]
    words = ["deepspeed", *where, str(ROOT / "launch/pretrain.py"), options.config, *options.settings, *settings]
    result = subprocess.run(words, capture_output=True, text=True)
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        speeds = [line["samples_per_second"] for line in lines if "loss" in line][TRIAL_WARM_UP:]
    except OSError:
        speeds = []
    shutil.rmtree(folder, ignore_errors=True)
    if result.returncode or not speeds:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        return [Finding("trial", "all", BAD, reason, f"see the whole output of: {' '.join(words)}")]
    speed = median(speeds)
    text = f"{speed:,.4g} samples/s, an epoch of {samples:,} in {duration(samples / speed)}"
    bottleneck = "loading is the bottleneck: `python -m loaders.bench` says why" if loading < 1.2 * speed else ""
    return [Finding("epoch", f"training, {len(speeds)} steps", WARNING if bottleneck else OK, text, bottleneck)]


def examine(options: argparse.Namespace) -> list[Finding]:
    """All findings. Raises ValueError or FileNotFoundError for a wrong command line or configuration."""
    run = load_settings(options.config, options.settings).config if options.config else None
    hosts, way = find_nodes(options.hostfile)
    nodes = [start(name, slots, way) for name, slots in hosts.items()]
    try:
        _, failures = ask_all(nodes, lambda node: node.ask("clock", seconds=60))
        found = findings.failed("reach", failures, REACH_ADVICE)
        nodes = [node for node in nodes if node.name not in failures]
        found += [] if failures else [Finding("reach", "all", OK, f"{len(nodes)} hosts answer")]
        if not nodes:
            return found
        for node in nodes:
            node.slots = node.slots or len(node.ask("facts")["gpus"]) or 1
        found += examine_nodes(nodes)
        found += examine_ssh(list(hosts)) if way == "ssh" and len(hosts) > 1 else []
        found += examine_network(nodes, options.port, options.least_gbit)
        found += examine_decoding(nodes)
        if run is None:
            return found
        found += examine_output(nodes, run)
        stored, samples = examine_storage(nodes, run)
        found += stored
        if not any(finding.verdict == BAD for finding in stored):
            found += estimate(nodes, options, run, samples)
        return found
    finally:
        for node in nodes:
            node.close()
