"""`python -m sharding.inspect`: what is in a packed corpus, in numbers, one sample, pictures, and what failed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from runtime.errors import UserError, command
from runtime.progress import LOG_EVERY, Progress
from runtime.units import data_size
from sharding.annotations.arguments import folder_of_shards, positive
from sharding.report.gallery import gallery
from sharding.report.samples import SHARDS, contact_sheet, fetch_command, pick
from sharding.report.statistics import Figures, columns_of, in_threads, measure, short, summary, text_histogram
from sharding.shards.failures import count_kinds, read_failures
from sharding.shards.failures import summary as failure_lines
from sharding.shards.output import local_form
from sharding.shards.schema import INDEX_SCHEMA, Corpus, named_shards, read_corpus
from storage.policy import naming

SHEET_SAMPLES = 64
GALLERY_SAMPLES = 96
LISTED = 100  # failures that are listed, unless more are asked for


def summary_text(corpus: Corpus) -> str:
    """The corpus in a few lines."""
    facts = summary(corpus)
    counts = ", ".join(
        f"{facts[unit]:,} {unit}" for unit in ("samples", "frames", "captions", "questions", "choices") if facts[unit]
    )
    lines = [
        f"{corpus.url}: {corpus.media_type} corpus {corpus.name}, {facts['shards']:,} shards, "
        f"{data_size(facts['bytes'])}",
        counts or "no samples",
    ]
    if corpus.settings:
        lines.append("built with " + " ".join(f"{key}={value}" for key, value in corpus.settings.items()))
    return "\n".join(lines)


def locate(corpus: Corpus, number: int) -> tuple[int, dict[str, Any]]:
    """(shard, index row) of the corpus' sample `number`. Raises ValueError when there is no such sample."""
    rest = number
    for shard, info in enumerate(corpus.shards):
        if 0 <= rest < info.samples:
            return shard, columns_of(corpus, shard, INDEX_SCHEMA.names).slice(rest, 1).to_pylist()[0]
        rest -= info.samples
    raise UserError(f"--sample {number}: {corpus.url} has samples 0 to {corpus.samples - 1}")


def find(corpus: Corpus, name: str, shown: bool = False) -> tuple[int, dict[str, Any]]:
    """(shard, index row) of a sample by its number, else its key, else its source, the first that has it.

    Raises:
        ValueError: there is none.
    """
    if name.isdecimal() and str(int(name)) == name and (int(name) < corpus.samples or len(name) < 9):
        return locate(corpus, int(name))
    shards = list(range(len(corpus.shards)))
    if name[:6].isdecimal():  # our keys begin with the number of their shard
        shards.sort(key=lambda shard: not corpus.shards[shard].name.endswith(f"-{name[:6]}.tar"))
    with Progress(len(shards), "searching", shown, "shard", "searched") as progress:
        for shard, table in zip(shards, in_threads(lambda n: columns_of(corpus, n, ("key", "source")), shards)):
            same = pc.or_(pc.equal(table["key"], name), pc.equal(table["source"], name))
            place = pc.index(same, True).as_py()
            progress.advance(1, 0, 0)
            if place >= 0:
                return shard, columns_of(corpus, shard, INDEX_SCHEMA.names).slice(place, 1).to_pylist()[0]
    raise UserError(f"--sample {name}: no sample of {corpus.url} has this key or source, and it is no sample's number")


def sample_facts(corpus: Corpus, name: str, frame: int, shown: bool = False) -> dict[str, Any]:
    """One sample's row of the index, and the command that fetches a frame's bytes."""
    shard, row = find(corpus, name, shown)
    if not 0 <= frame < len(row["offsets"]):
        raise UserError(f"--frame {frame}: sample {row['key']} has frames 0 to {len(row['offsets']) - 1}")
    ending = ".jpg" if row["fps"] is None else f".{frame:03d}.jpg"
    target = row["key"].rsplit("/", 1)[-1] + ending
    command = fetch_command(corpus.tar_url(shard), row["offsets"][frame], row["sizes"][frame], target, signed=True)
    return {"shard": corpus.shards[shard].name, **row, "frame": frame, "command": command}


def sample_text(facts: dict[str, Any]) -> str:
    """One sample in lines."""
    times = ""
    if facts["fps"] is not None:
        times = f", {len(facts['offsets'])} frames, {facts['fps']:g} a second, {facts['duration']:.2f} s"
    lines = [
        f"sample {facts['key']} in {facts['shard']}",
        f"  source: {facts['source']}",
        f"  {facts['width']}x{facts['height']} pixels, {sum(facts['sizes']):,} bytes{times}",
    ]
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


def figures_text(figures: Figures, corpus: Corpus) -> str:
    """The distributions as histograms."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    lines = [text_histogram(distribution, width) for distribution in figures.distributions]
    if figures.without_text:
        lines.append(f"{figures.without_text:,} of {figures.samples:,} samples have no text")
    if figures.empty_captions:
        lines.append(f"{figures.empty_captions:,} captions are empty")
    if figures.shards < len(corpus.shards):
        lines.append(f"measured on {figures.shards:,} of {len(corpus.shards):,} shards")
    return "\n".join(lines)


def failures_of(url: str) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Failures by kind, and the first LISTED of them."""
    kinds: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    for failure in read_failures(url):
        count_kinds(kinds, [failure["reason"]])
        if len(first) < LISTED:
            first.append(failure)
    return kinds, first


def failures_text(kinds: Counter[str], first: list[dict[str, Any]]) -> str:
    """What failed: by kind, then one by one."""
    if not kinds:
        return "no failures"
    lines = [f"{kinds.total():,} failures", *failure_lines(kinds, 50)]
    lines += [f"{failure['source']}: {failure['reason']} ({failure['rows']} rows)" for failure in first]
    if kinds.total() > len(first):
        lines.append(f"and {kinds.total() - len(first):,} more in failures.parquet")
    return "\n".join(lines)


def write_gallery(corpus: Corpus, file: Path, count: int, shards: int, figures: Figures) -> None:
    """Write the HTML page."""
    try:
        kinds, _ = failures_of(corpus.url)
    except (OSError, ValueError):
        kinds = Counter()
    page = gallery(corpus, figures, pick(corpus, count, shards), kinds)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def inspect(options: argparse.Namespace) -> None:
    """Do what the command line asks; raises OSError or ValueError where that cannot be."""
    say: dict[str, Any] = {}
    lines: list[str] = []
    url = local_form(options.url)
    if options.failures:  # also of a build that ended without corpus.json
        kinds, first = failures_of(named_shards(url)[0])
        say["failures"] = {"kinds": dict(kinds.most_common()), "first": first}
        lines.append(failures_text(kinds, first))
    asked = options.stats or options.sheet or options.html
    if not options.failures or asked or options.sample:
        corpus = read_corpus(url)
        say["corpus"] = summary(corpus)
        lines.insert(0, summary_text(corpus))
        if (options.sample or not asked) and corpus.samples:
            say["sample"] = sample_facts(corpus, options.sample or "0", options.frame, True)
            lines.append(sample_text(say["sample"]))
        if options.stats or options.html:
            number = min(options.stats_shards or len(corpus.shards), len(corpus.shards))
            with Progress(number, "reading indices", True, "shard", "read", options.log_every) as progress:
                figures = measure(corpus, number, progress)
            say["statistics"] = figures.to_json()
            lines += [figures_text(figures, corpus)] if options.stats else []
        if options.sheet:
            sheet = contact_sheet(corpus, options.count or SHEET_SAMPLES, options.shards)
            options.sheet.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(options.sheet)
            lines.append(f"contact sheet: {options.sheet}")
        if options.html:
            write_gallery(corpus, Path(options.html), options.count or GALLERY_SAMPLES, options.shards, figures)
            lines.append(f"gallery: {options.html}")
    sys.stdout.write((json.dumps(say) if options.json else "\n".join(lines)) + "\n")


def png_file(text: str) -> Path:
    """A file to write a picture to, of the command line."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        "python -m sharding.inspect",
        description="Show what is in a packed corpus, local or remote; without flags a summary and the first sample.",
    )
    add = result.add_argument
    add("url", metavar="URL", type=folder_of_shards, help="folder or URL of the corpus, or of some of its tars")
    add("--sample", default="", metavar="KEY", help="show one sample: its key, its source, or its number from 0")
    add("--frame", type=int, default=0, help="frame of the sample that the printed command fetches")
    add("--stats", action="store_true", help="histograms of texts, sizes, frames, seconds, bytes, from the indices")
    add("--stats-shards", type=positive, default=0, metavar="N", help="from N evenly spread shards only (default: all)")
    add(
        "--sheet",
        type=png_file,
        metavar="FILE.png",
        help=f"write a contact sheet of {SHEET_SAMPLES} samples from all over",
    )
    add("--html", metavar="FILE.html", help=f"write a page with histograms and {GALLERY_SAMPLES} samples to look at")
    add("--count", type=positive, default=0, metavar="N", help="samples on the sheet and the page")
    add(
        "--shards",
        type=positive,
        default=SHARDS,
        metavar="N",
        help="shards that pictures come from (default: %(default)s)",
    )
    add("--failures", action="store_true", help="what could not be packed, and why")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--log-every", type=float, default=LOG_EVERY, metavar="SECONDS", help="see sharding.build")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        with naming(options.url, "read"):
            inspect(options)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
