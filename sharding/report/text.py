"""Text reports on a packed corpus: a summary, one sample, histograms, failures."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

from runtime.errors import UserError
from runtime.units import data_size
from sharding.reasons import summary as failure_lines
from sharding.report.samples import fetch_command, find
from sharding.report.statistics import Statistics, short, summary, text_histogram
from sharding.shards.schema import INDEX_SCHEMA, SHOWN, UNITS, Corpus


def summary_text(corpus: Corpus) -> str:
    """The corpus in a few lines."""
    facts = summary(corpus)
    counts = ", ".join(f"{facts[unit]:,} {unit}" for unit in UNITS[:-1] if facts[unit])
    lines = [
        f"{corpus.url}: {corpus.media_type} corpus {corpus.name}, {facts['shards']:,} shards, "
        f"{data_size(facts['bytes'])}",
        counts or "no samples",
    ]
    if corpus.settings:
        lines.append("built with " + " ".join(f"{key}={value}" for key, value in corpus.settings.items()))
    return "\n".join(lines)


def sample_facts(corpus: Corpus, name: str, frame: int, shown: bool = False) -> dict[str, Any]:
    """One sample's row of the index, and the command that fetches a frame's bytes."""
    shard, row = find(corpus, name, shown)
    if not 0 <= frame < len(row["offsets"]):
        raise UserError(f"--frame {frame}: sample {row['key']} has frames 0 to {len(row['offsets']) - 1}")
    ending = ".jpg" if row["fps"] is None else f".{frame:03d}.jpg"
    target = row["key"].rsplit("/", 1)[-1] + ending
    command = fetch_command(corpus.tar_url(shard), row["offsets"][frame], row["sizes"][frame], target)
    return {"shard": corpus.shards[shard].name, **row, "frame": frame, "command": command}


def sample_text(facts: dict[str, Any]) -> str:
    """Lines that describe one sample."""
    times = ""
    if facts["fps"] is not None:
        times = f", {len(facts['offsets'])} frames, {facts['fps']:g} a second, {facts['duration']:.2f} s"
    lines = [
        f"sample {facts['key']} in {facts['shard']}",
        f"  source: {facts['source']}",
        f"  {facts['width']}x{facts['height']} pixels, {sum(facts['sizes']):,} bytes{times}",
    ]
    known = {*INDEX_SCHEMA.names, *SHOWN}
    lines += [f"  {name}: {value}" for name, value in facts.items() if name not in known]  # extra columns
    lines += [f"  caption: {caption}" for caption in facts["captions"]]
    for question in facts["questions"]:
        answers = zip(question["answers"], question["weights"])
        lines.append(f"  question {question['question_id']}: {question['question']}")
        lines.append("    answers: " + ", ".join(f"{answer} ({weight:.0%})" for answer, weight in answers))
    for choice in facts["choices"]:
        lines.append(f"  choice {choice['question_id']}:")
        options = enumerate(choice["options"])
        lines += [f"    {'*' if number == choice['answer'] else ' '} {option}" for number, option in options]
    lines.append("  frame      second      offset     bytes     CRC-32")
    seconds = facts["frame_times"] or [None] * len(facts["offsets"])
    for number, (at, offset, size, crc32) in enumerate(zip(seconds, facts["offsets"], facts["sizes"], facts["crc32s"])):
        lines.append(f"  {number:5d}  {'-' if at is None else short(at):>10} {offset:11d} {size:9d}   {crc32:08x}")
    return "\n".join([*lines, f"  frame {facts['frame']}: {facts['command']}"])


def statistics_text(statistics: Statistics, corpus: Corpus) -> str:
    """The distributions as histograms."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    lines = [text_histogram(distribution, width) for distribution in statistics.distributions]
    if statistics.without_text:
        lines.append(f"{statistics.without_text:,} of {statistics.samples:,} samples have no text")
    if statistics.empty_captions:
        lines.append(f"{statistics.empty_captions:,} captions are empty")
    if statistics.shards < len(corpus.shards):
        lines.append(f"measured on {statistics.shards:,} of {len(corpus.shards):,} shards")
    return "\n".join(lines)


def failures_text(kinds: Counter[str], first: list[dict[str, Any]]) -> str:
    """Failures: counts by kind, then one line each."""
    if not kinds:
        return "no failures"
    lines = [f"{kinds.total():,} failures", *failure_lines(kinds, 50)]
    lines += [f"{failure['source']}: {failure['reason']} ({failure['rows']} rows)" for failure in first]
    if kinds.total() > len(first):
        lines.append(f"and {kinds.total() - len(first):,} more in failures.parquet")
    return "\n".join(lines)
