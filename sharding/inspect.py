"""`python -m sharding.inspect`: statistics, samples, pictures and failures of a packed corpus."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import command
from runtime.flags import positive
from runtime.program import command_line
from runtime.progress import LOG_EVERY, Progress
from sharding.arguments import folder_of_shards
from sharding.reasons import count_kinds

if TYPE_CHECKING:
    from sharding.report.statistics import Statistics
    from sharding.shards.schema import Corpus

SHARDS = 16  # of a corpus that pictures are taken from by default
SHEET_SAMPLES = 64
GALLERY_SAMPLES = 96
LISTED = 100  # failures listed by default


def failures_of(url: str) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Failures by kind, and the first LISTED of them."""
    from sharding.shards.failures import read_failures

    kinds: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    for failure in read_failures(url):
        count_kinds(kinds, [failure["reason"]])
        if len(first) < LISTED:
            first.append(failure)
    return kinds, first


def write_gallery(corpus: Corpus, file: Path, count: int, shards: int, statistics: Statistics) -> None:
    """Write the HTML page."""
    from sharding.report.gallery import gallery
    from sharding.report.samples import pick

    try:
        kinds, _ = failures_of(corpus.url)
    except (OSError, ValueError):
        kinds = Counter()
    page = gallery(corpus, statistics, pick(corpus, count, shards), kinds)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def inspect(options: argparse.Namespace) -> None:
    """Run the command line; raises OSError or ValueError."""
    from sharding.report.samples import sample_sheet
    from sharding.report.statistics import measure, summary
    from sharding.report.text import failures_text, sample_facts, sample_text, statistics_text, summary_text
    from sharding.shards.schema import named_shards, read_corpus
    from storage.urls import local_form

    result: dict[str, Any] = {}
    lines: list[str] = []
    url = local_form(options.url)
    if options.failures:  # also of a build that ended without corpus.json
        kinds, first = failures_of(named_shards(url)[0])
        result["failures"] = {"kinds": dict(kinds.most_common()), "first": first}
        lines.append(failures_text(kinds, first))
    asked = options.stats or options.sheet or options.html
    if not options.failures or asked or options.sample:
        corpus = read_corpus(url)
        result["corpus"] = summary(corpus)
        lines.insert(0, summary_text(corpus))
        if (options.sample or not asked) and corpus.samples:
            result["sample"] = sample_facts(corpus, options.sample or "0", options.frame, True)
            lines.append(sample_text(result["sample"]))
        if options.stats or options.html:
            number = min(options.stats_shards or len(corpus.shards), len(corpus.shards))
            with Progress(number, "reading indices", True, "shard", "read", options.log_every) as progress:
                statistics = measure(corpus, number, progress)
            result["statistics"] = statistics.to_json()
            lines += [statistics_text(statistics, corpus)] if options.stats else []
        if options.sheet:
            sheet = sample_sheet(corpus, options.count or SHEET_SAMPLES, options.shards)
            options.sheet.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(options.sheet)
            lines.append(f"contact sheet: {options.sheet}")
        if options.html:
            write_gallery(corpus, Path(options.html), options.count or GALLERY_SAMPLES, options.shards, statistics)
            lines.append(f"gallery: {options.html}")
    sys.stdout.write((json.dumps(result, default=str) if options.json else "\n".join(lines)) + "\n")


def png_file(text: str) -> Path:
    """A file to write a picture to, of the command line."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("sharding.inspect"),
        description="Show the content of a packed corpus, local or remote; by default a summary and the first sample.",
    )
    add = result.add_argument
    add("url", metavar="URL", type=folder_of_shards, help="folder or URL of the corpus, or of some of its tars")
    add("--sample", default="", metavar="KEY", help="show one sample: its key, its source, or its number from 0")
    add("--frame", type=int, default=0, help="frame of the sample that the printed command fetches")
    add("--stats", action="store_true", help="histograms of texts, sizes, frames, seconds, bytes, from the indices")
    add("--stats-shards", type=positive, default=0, metavar="N", help="from N evenly spread shards only (default: all)")
    add("--sheet", type=png_file, metavar="FILE.png", help=f"write a contact sheet of {SHEET_SAMPLES} samples")
    add("--html", metavar="FILE.html", help=f"write a page with histograms and {GALLERY_SAMPLES} samples to look at")
    add("--count", type=positive, default=0, metavar="N", help="samples on the sheet and the page")
    add(
        "--shards",
        type=positive,
        default=SHARDS,
        metavar="N",
        help="shards that the pictures are read from (default: %(default)s)",
    )
    add("--failures", action="store_true", help="show the failures with their reasons")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--log-every", type=float, default=LOG_EVERY, metavar="SECONDS", help=f"see {command_line('sharding.build')}")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(arguments)
    from storage.policy import storage_errors

    try:
        with storage_errors(options.url, "read"):
            inspect(options)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
