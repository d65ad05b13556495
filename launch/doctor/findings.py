"""Judges what the doctor measured: pure functions that make the lines of its table."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from train.job.gpus import OLDEST_DRIVER

OK, WARNING, BAD = "ok", "look", "BAD"
CLOCK_WARNING, CLOCK_BAD = 2.0, 300.0  # seconds; signed requests to stores are refused from some minutes on
LAGGING = 0.5  # of the median, below which a node or link holds the others up
LARGEST_LEVELS = 2.0  # grey levels of 255, as a mean: decoders and their resizing differ by less
WIDTH = 118


@dataclass(frozen=True)
class Finding:
    """A line of the table, and what to do about it."""

    check: str
    where: str
    verdict: str
    found: str
    advice: str = ""


def failed(check: str, failures: Mapping[str, str], advice: str) -> list[Finding]:
    """A problem for each host that gave no answer."""
    return [Finding(check, host, BAD, reason, advice) for host, reason in failures.items()]


def compare(check: str, values: Mapping[str, Any], advice: str) -> list[Finding]:
    """Hosts whose value differs from the majority (or from the first host if there is no majority)."""
    counts = Counter(map(str, values.values()))
    most = max(counts, key=lambda value: (counts[value], value == str(next(iter(values.values())))))
    others = [Finding(check, host, BAD, f"{value}; others {most}", advice) for host, value in values.items()
              if str(value) != most]  # fmt: skip
    return others or [Finding(check, "all", OK, most)]


def versions(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Python and packages that are not everywhere the same."""
    advice = "install the same environment on every host (`make install`), or put it on a shared file system"
    names = {"python"} | {name for fact in facts.values() for name in fact["versions"]}
    found: list[Finding] = []
    for name in sorted(names):
        each = {
            host: f"{name} {fact['python'] if name == 'python' else fact['versions'].get(name, 'missing')}"
            for host, fact in facts.items()
        }
        found += [finding for finding in compare("versions", each, advice) if finding.verdict != OK]
    installed = next(iter(facts.values()))["versions"]
    summary = ", ".join(f"{name} {installed[name]}" for name in ("torch", "deepspeed") if name in installed)
    return found or [Finding("versions", "all", OK, summary)]


def hardware(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """GPUs and cores that are not everywhere the same: the slowest host sets the pace."""
    each = {
        host: f"{len(fact['gpus'])} x {fact['gpus'][0]}" if fact["gpus"] else f"no GPU, {fact['cores']} cores"
        for host, fact in facts.items()
    }
    return compare("hardware", each, "the slowest host sets the pace: take it out of the hostfile, or repair it")


def gpus(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """GPUs that PyTorch can and cannot use, with the versions, and whether DALI's build fits."""
    found = []
    for host, fact in facts.items():
        cards, versions = fact["gpus"], fact["versions"]
        if fact["gpu_fault"]:
            reason, _, remedy = fact["gpu_fault"].partition("; ")
            found.append(Finding("GPU", host, BAD, reason, remedy or "start `nvidia-smi` there to see more"))
        elif not cards:
            found.append(Finding("GPU", host, OK, "no GPU: the CPU computes and decodes"))
        else:
            libraries = [f"{name} {versions[name]}" for name in ("CUDA of torch", "NCCL") if name in versions]
            text = ", ".join([f"{len(cards)} x {cards[0]}", f"driver {fact['driver'] or 'unknown'}", *libraries])
            found += [Finding("GPU", host, OK, text), *_dali(host, fact)]
    return found


def _dali(host: str, fact: Mapping[str, Any]) -> list[Finding]:
    """Whether DALI is built for the CUDA of PyTorch, by the name of its distribution."""
    built = [name for name in fact["versions"] if name.startswith("nvidia-dali-cuda")]
    cuda = int(fact["versions"].get("CUDA of torch", "0").split(".")[0])
    install = f"`make clean`, `make install DALI=cuda{cuda}`"
    if not built:
        advice = f"install it ({install}), or set decode=cpu"
        return [Finding("DALI", host, WARNING, "not installed: the CPU decodes", advice)]
    if len(built) > 1:
        return [Finding("DALI", host, BAD, f"{' and '.join(built)} overwrite each other's files", install)]
    major = int(built[0].removeprefix("nvidia-dali-cuda")[:2])
    if major == cuda:
        return [Finding("DALI", host, OK, built[0])]
    driver = int((fact["driver"] or "0").split(".")[0])
    needed = OLDEST_DRIVER.get(major, 0)
    text = f"{built[0]} beside a PyTorch for CUDA {cuda}"
    if 0 < driver < needed:
        return [Finding("DALI", host, BAD, f"{text}; CUDA {major} needs driver {needed} or newer", install)]
    return [Finding("DALI", host, WARNING, f"{text}: decode=dali is refused, decode=auto uses the CPU", install)]


def decoding(answers: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A picture that every host has decoded, by its difference from what it should be (launch/doctor/decode_one.py)."""
    found = []
    for host, answer in answers.items():
        levels = f"{answer['levels']:.2f} grey levels"
        where = "DALI on the GPU" if answer["backend"] == "dali" else "CPU"
        from_what = "the CPU's pixels" if answer["backend"] == "dali" else "the picture"
        if answer["levels"] > LARGEST_LEVELS:
            text, advice = f"{where}: a picture is {levels} from {from_what}", "set decode=cpu, or install DALI again"
            found.append(Finding("decoding", host, BAD, text, advice))
        elif answer["fallback"]:
            advice = "install DALI for the CUDA of PyTorch (`make install DALI=cuda12` or cuda13), or set decode=cpu"
            found.append(Finding("decoding", host, WARNING, f"{answer['fallback']}; the CPU decodes", advice))
        else:
            found.append(Finding("decoding", host, OK, f"{where}, {levels} from {from_what}"))
    return found


def clocks(offsets: Mapping[str, float]) -> list[Finding]:
    """Clocks that differ from this host's, in seconds."""
    advice = "set the clock (chrony, ntpd): stores refuse requests signed minutes ago, and logs do not fit together"
    found = [
        Finding("clock", host, BAD if abs(offset) > CLOCK_BAD else WARNING, f"{offset:+.1f} s from this clock", advice)
        for host, offset in offsets.items()
        if abs(offset) > CLOCK_WARNING
    ]
    worst = max(map(abs, offsets.values()), default=0.0)
    return found or [Finding("clock", "all", OK, f"within {worst:.2f} s")]


def ports(reached: Mapping[tuple[str, str, int], str], chosen_by_user: int) -> list[Finding]:
    """{(from, to, port): empty, or why it could not be reached}."""
    found = []
    for (source, target, port), reason in reached.items():
        if reason:
            which = f"port {port}" if port == chosen_by_user else f"port {port} (any that the system chooses)"
            advice = (
                f"open TCP between the nodes, all ports: the ranks meet at --master_port ({chosen_by_user}) and talk "
                "over ports that the system chooses"
            )
            found.append(Finding("ports", f"{source} -> {target}", BAD, f"{which}: {reason}", advice))
    return found or [Finding("ports", "all", OK, f"{len(reached)} connections are possible")]


def links(gbit: Mapping[tuple[str, str], float], least: float) -> list[Finding]:
    """Connections between nodes that are slower than `least` Gbit/s, or than half of the median."""
    middle = median(gbit.values()) if gbit else 0.0
    found = [
        Finding(
            "link", f"{source} -> {target}", BAD, f"{speed:.3g} Gbit/s, the median is {middle:.3g}",
            f"repair the link (at least --least-gbit {least:g} and half of the median is required): every step's "
            "all-reduce waits for the slowest; see `ethtool` and the switch's counters, or take the node out",
        )
        for (source, target), speed in gbit.items()
        if speed < least or speed < LAGGING * middle
    ]  # fmt: skip
    return found or [Finding("link", "all", OK, f"{min(gbit.values()):.3g} Gbit/s at least")] if gbit else []


def lagging(check: str, unit: str, rates: Mapping[str, float], advice: str, verdict: str = BAD) -> list[Finding]:
    """Hosts that are at less than half of the median get the verdict."""
    middle, found = median(rates.values()), []
    for host, rate in rates.items():
        lags = rate < LAGGING * middle
        found.append(Finding(check, host, verdict if lags else OK, f"{rate:,.4g} {unit}", advice if lags else ""))
    return found


def listed(url: str, missing: Sequence[str], error: str) -> list[Finding]:
    """The finding on the files of a corpus: those that are missing, or why they cannot be listed."""
    if error or not missing:
        return [Finding("shards", url, WARNING if error else OK, error or "all files are there")]
    indices = any(name.endswith(".parquet") for name in missing)
    advice = f"`python -m sharding.verify {url} --repair`" if indices else "pack it again: complete shards are kept"
    return [Finding("shards", url, BAD, f"{len(missing)} files are missing: {', '.join(missing[:3])}", advice)]


def table(findings: Sequence[Finding]) -> str:
    """The findings as a table, and each piece of advice once."""
    head = ("check", "where", "", "found")
    rows = [(f.check, f.where, f.verdict, f.found) for f in findings]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(3)]
    lines = []
    for row in [head, *rows]:
        start = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths))
        rest = textwrap.wrap(row[3], max(40, WIDTH - len(start))) or [""]
        lines += [f"{start}  {rest[0]}", *(" " * (len(start) + 2) + more for more in rest[1:])]
    advice = list(dict.fromkeys(f.advice for f in findings if f.advice))
    bad = sum(f.verdict == BAD for f in findings)
    lines += ["", f"{bad} problems to fix before a job is started." if bad else "No problem found."]
    for text in advice:
        lines += textwrap.wrap(f"- {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)
