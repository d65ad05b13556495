"""Checks a packed corpus as a whole: corpus.json, each shard in processes side by side, and the other files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import fsspec

from runtime.errors import MissingError
from runtime.process_pool import run_tasks
from runtime.progress import LOG_EVERY, Progress
from sharding.shards.checks import Check, Fault, Report, check_shard
from sharding.shards.indexing import free_index_name
from sharding.shards.output import BUILD, digest_of
from sharding.shards.schema import UNITS, Corpus, files_at, is_index, named_shards, parse_corpus, with_shards
from storage.urls import join_url, local_form

DESCRIPTION = "corpus.json"


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
    Raises FileNotFoundError: there is neither a corpus nor a shard at `url`.
    """
    return examine(url, decode, workers).all


def examine(
    url: str, decode: bool = False, workers: int = 1, progress: bool = False, log_every: float = LOG_EVERY
) -> Findings:
    """`verify_corpus` with the details that a repair needs."""
    url, named = named_shards(local_form(url))
    names = named or sorted(files_at(url))
    findings = Findings(url, *read_description(url))
    if findings.corpus and named:
        findings.corpus = with_shards(findings.corpus, named)
    corpus = findings.corpus
    tars = [name for name in names if name.endswith(".tar")]
    if corpus is None and not tars:
        raise MissingError(
            f"{url} has no corpus.json and no .tar files: it is not a packed corpus; pack it with "
            "`python -m sharding.build`"
        )
    checks = planned_checks(url, corpus, tars, names, decode)
    findings.faults += [] if named else other_files(url, corpus, names, checks)
    processes = min(workers, len(checks))
    with Progress(len(checks), f"verifying {url}", progress, "shard", "intact", log_every) as shown:
        found = {check.number: report for check, report in run_tasks(check_shard, checks, processes, shown.advance)}
    findings.reports = [found[number] for number in sorted(found)]
    return findings


def read_description(url: str) -> tuple[Corpus | None, list[Fault]]:
    """The corpus as corpus.json describes it, when every byte of that is as it was written, and its faults."""
    try:
        with fsspec.open(join_url(url, DESCRIPTION), "rb") as file:
            data = file.read()
        corpus = parse_corpus(data, url)
    except FileNotFoundError:
        return None, [Fault(DESCRIPTION, "is missing")]
    except (OSError, ValueError) as error:
        return None, [Fault(DESCRIPTION, str(error))]
    if b'"sha256"' not in data[-90:]:
        return None, [Fault(DESCRIPTION, "carries no checksum: damaged, or written by an earlier version")]
    totals = json.loads(data)  # its keys may be more than this version knows, so it is not compared as a whole
    if any(totals.get(unit) != sum(corpus.counts(unit)) for unit in UNITS):
        return None, [Fault(DESCRIPTION, "its checksum or its totals do not match")]
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
        index = tar.removesuffix(".tar") + ".parquet" if own else free_index_name(url, tar)
        checks.append(Check(number, join_url(url, tar), join_url(url, index), None, own, decode))
    return checks


def other_files(url: str, corpus: Corpus | None, names: list[str], checks: list[Check]) -> list[Fault]:
    """Faults beside the shards: changed files, shards that are not listed, gaps in their numbers."""
    faults = []
    for name, digest in (corpus.files if corpus else {}).items():
        if name not in names:
            faults.append(Fault(name, "is missing"))
        elif digest_of([join_url(url, name)]) != digest:
            faults.append(Fault(name, "its SHA-256 differs from the one in corpus.json"))
    listed = {url.rsplit("/", 1)[-1] for check in checks for url in (check.tar, check.index)}
    for name in names:
        if name.endswith(".tar") and name not in listed and not (corpus and corpus.settings.get("selected")):
            faults.append(Fault(name, "is not in corpus.json"))
        elif name.endswith(".parquet") and name not in listed and is_index(join_url(url, name)):
            faults.append(Fault(name, "is an index without a shard"))
    if corpus is None and BUILD in names:
        numbers = {int(check.tar[-10:-4]) for check in checks if check.tar[-10:-4].isdecimal()}
        faults += [
            Fault(f"shard {number:06d}", "is missing: the shard numbers have a gap")
            for number in sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
        ]
    return faults
