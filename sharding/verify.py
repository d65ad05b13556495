"""`python -m sharding.verify`: checks a packed corpus byte by byte, and mends what can be made again from its tars."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import fsspec

from runtime.errors import MissingError, UserError, command
from runtime.flags import positive
from runtime.process_pool import run_tasks
from runtime.progress import LOG_EVERY, Progress
from sharding.arguments import folder_of_shards
from sharding.index import is_foreign
from sharding.shards.checks import Check, Fault, Report, check_shard
from sharding.shards.output import BUILD, digest_of
from sharding.shards.repair import repair
from sharding.shards.schema import INDEX_SCHEMA, UNREADABLE, Corpus, named_shards, parse_corpus, with_shards
from storage.parquet import read_schema
from storage.policy import naming
from storage.urls import join_url, local_form

DESCRIPTION = "corpus.json"

log = logging.getLogger("sharding")


@dataclass
class Findings:
    """What a verification found: the corpus as corpus.json describes it (None: not to be trusted), faults, shards."""

    url: str
    corpus: Corpus | None
    faults: list[Fault]
    reports: list[Report] = field(default_factory=list)

    @property
    def all(self) -> list[Fault]:
        """Faults of the corpus as a whole, then those of its shards in order."""
        return [*self.faults, *(fault for report in self.reports for fault in report.faults)]


def verify_corpus(url: str, decode: bool = False, workers: int = 1) -> list[Fault]:
    """Every fault of a corpus: any byte that is not as it was written, anything missing or too much.

    decode: also decode every frame and compare its size in pixels with the index.

    Raises:
        FileNotFoundError: there is neither a corpus nor a shard at `url`.
    """
    return examine(url, decode, workers).all


def examine(
    url: str, decode: bool = False, workers: int = 1, progress: bool = False, log_every: float = LOG_EVERY
) -> Findings:
    """`verify_corpus`, with all that a repair needs to know."""
    url, named = named_shards(local_form(url))
    names = named or names_at(url)
    findings = Findings(url, *read_description(url))
    if findings.corpus and named:
        findings.corpus = with_shards(findings.corpus, named)
    corpus = findings.corpus
    tars = [name for name in names if name.endswith(".tar")]
    if corpus is None and not tars:
        raise MissingError(
            f"{url} holds no corpus.json and no .tar files: it is no packed corpus; pack it with "
            "`python -m sharding.build`"
        )
    checks = planned_checks(url, corpus, tars, names, decode)
    findings.faults += [] if named else other_files(url, corpus, names, checks)
    processes = min(workers, len(checks))
    with Progress(len(checks), f"verifying {url}", progress, "shard", "sound", log_every) as shown:
        found = {check.number: report for check, report in run_tasks(check_shard, checks, processes, shown.advance)}
    findings.reports = [found[number] for number in sorted(found)]
    return findings


def names_at(url: str) -> list[str]:
    """Names of the files in a folder, in order; empty when there is no such folder."""
    filesystem, root = fsspec.url_to_fs(url)
    try:
        entries = filesystem.ls(root, detail=True)
    except FileNotFoundError:
        return []
    return sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")


def read_description(url: str) -> tuple[Corpus | None, list[Fault]]:
    """The corpus as corpus.json describes it, when every byte of that is as it was written, and its faults."""
    try:
        with fsspec.open(join_url(url, DESCRIPTION), "rb") as file:
            data = file.read()
        corpus = parse_corpus(data.decode("utf-8", "replace"), url)
    except FileNotFoundError:
        return None, [Fault(DESCRIPTION, "is missing")]
    except (OSError, ValueError) as error:
        return None, [Fault(DESCRIPTION, str(error))]
    if b'"sha256"' not in data[-90:]:
        return None, [Fault(DESCRIPTION, "carries no checksum: damaged, or written by an earlier version")]
    if corpus.to_json().encode() != data:
        return None, [Fault(DESCRIPTION, "does not match its own checksum, or its totals are not those of its shards")]
    return corpus, []


def planned_checks(url: str, corpus: Corpus | None, tars: list[str], names: list[str], decode: bool) -> list[Check]:
    """The shards to check: those of corpus.json; without it, all tars in the folder."""
    own = BUILD in names if corpus is None else not corpus.settings.get("indexed")
    if corpus is not None:
        return [
            Check(number, corpus.tar_url(number), corpus.index_url(number), info, own, decode)
            for number, info in enumerate(corpus.shards)
        ]
    checks = []
    for number, tar in enumerate(tars):
        index = tar.removesuffix(".tar") + ".parquet"
        if not own and is_foreign(join_url(url, index)):
            index = tar.removesuffix(".tar") + ".index.parquet"
        checks.append(Check(number, join_url(url, tar), join_url(url, index), None, own, decode))
    return checks


def other_files(url: str, corpus: Corpus | None, names: list[str], checks: list[Check]) -> list[Fault]:
    """Faults of what lies beside the shards: files of another content, shards too much, gaps in their numbers."""
    faults = []
    for name, digest in (corpus.files if corpus else {}).items():
        if name not in names:
            faults.append(Fault(name, "is missing"))
        elif digest_of([join_url(url, name)]) != digest:
            faults.append(Fault(name, "its SHA-256 is not the one in corpus.json"))
    listed = {place.rsplit("/", 1)[-1] for check in checks for place in (check.tar, check.index)}
    for name in names:
        if name.endswith(".tar") and name not in listed and not (corpus and corpus.settings.get("selected")):
            faults.append(Fault(name, "is not in corpus.json"))
        elif name.endswith(".parquet") and name not in listed and is_index(join_url(url, name)):
            faults.append(Fault(name, "is an index without a shard"))
    if corpus is None and BUILD in names:
        numbers = {int(check.tar[-10:-4]) for check in checks if check.tar[-10:-4].isdecimal()}
        faults += [
            Fault(f"shard {number:06d}", "is missing: the numbers of the others leave a gap")
            for number in sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
        ]
    return faults


def is_index(url: str) -> bool:
    """Whether a parquet file is an index of ours."""
    try:
        with fsspec.open(url, "rb") as file:
            return bool(read_schema(file).equals(INDEX_SCHEMA))
    except UNREADABLE:
        return False


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 when all is sound, 1 with faults, 2 when nothing could be checked."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        "python -m sharding.verify",
        description="Check a packed corpus byte by byte.",
        epilog="Exit code: 0 all is sound, or was repaired; 1 faults; 2 nothing could be checked.",
    )
    add = parser.add_argument
    add("url", metavar="URL", type=folder_of_shards, help="folder or URL of the corpus, or of some of its tars")
    add("--decode", action="store_true", help="also decode every frame")
    add("--repair", action="store_true", help="make broken or missing indices, corpus.json and failures.parquet again")
    add("--workers", type=positive, default=None, help="processes (default: one a core)")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--log-every", type=float, default=LOG_EVERY, metavar="SECONDS", help="see sharding.build")
    options = parser.parse_args(arguments)
    done: list[str] = []
    how = (options.decode, options.workers or os.cpu_count() or 1, True, options.log_every)
    with naming(options.url, "read"):
        if options.repair and named_shards(options.url)[1]:
            raise UserError(f"--repair is for a whole corpus: give its folder {named_shards(options.url)[0]}")
        findings = examine(options.url, *how)
        faults = findings.all
        left = faults
        if options.repair and faults:
            done = repair(findings.url, findings.corpus, findings.reports)
            left = examine(options.url, *how).all
    if options.json:
        found = {"faults": [asdict(fault) for fault in faults], "repaired": done}
        sys.stdout.write(json.dumps({"url": options.url, **found, "left": [asdict(fault) for fault in left]}) + "\n")
    else:
        sys.stdout.write(outcome(options.url, faults, done, left, options.repair))
    return 1 if left else 0


def outcome(url: str, faults: list[Fault], done: list[str], left: list[Fault], repaired: bool) -> str:
    """What is printed."""
    lines = [str(fault) for fault in faults]
    lines.append(f"{url}: {len(faults) or 'no'} fault{'s' if len(faults) != 1 else ''}")
    if repaired and faults:
        lines += [f"repaired: {line}" for line in done]
        lines += [f"cannot be repaired: {fault}" for fault in left]
    tars = sorted({fault.file for fault in left if fault.file.endswith(".tar")})
    if tars:
        lines.append(
            f"damaged or missing tars, such as {tars[0]}, can only be made again: delete the .parquet beside each and "
            "run the same sharding.build again, or fetch the tars anew"
        )
    elif left and not repaired:
        lines.append("all of this can be made again: run this with --repair")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
