"""Repairs a corpus: rebuilds indices, corpus.json and failures.parquet from intact tars."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec

from runtime.errors import UserError
from sharding.shards.checks import Report
from sharding.shards.failures import FILE, FailureLog
from sharding.shards.indexing import IndexTask, index_shard
from sharding.shards.output import BUILD, digest_of, open_output, write_text
from sharding.shards.plan import ShardSettings
from sharding.shards.schema import Corpus, ShardInfo, parse_corpus, read_file
from storage.urls import join_url


def repair(url: str, corpus: Corpus | None, reports: list[Report]) -> list[str]:
    """Repair a corpus by the `reports` on its shards; returns what was done, a line each.

    corpus: what corpus.json says, None when that cannot be trusted. What depends on a damaged tar is left as it is.
    Raises OSError: nothing can be written there.
    """
    done: list[str] = []
    with open_output(url, among_others=True) as scratch:
        shards: list[ShardInfo] = []
        kinds: set[str] = set()
        failures = FailureLog(scratch)
        columns = (corpus.settings if corpus else settings_at(url) or {}).get("extra_columns", {})
        failures_known = True  # whether the intact indices list all failures
        for number, report in enumerate(reports):
            known = corpus.shards[number] if corpus else None
            info, kind = report.info, report.media_type
            if not report.index_is_intact and report.tar_is_intact:
                info, kind = new_index(url, report, scratch, columns)
                done.append(f"{info.index_name} rebuilt from {info.name}")
                failures_known = False
            elif not report.index_is_intact:
                failures_known = False
            failures.add(number, report.failures)
            kept = known if known and not report.tar_is_intact else info or known
            if kept:
                shards.append(kept)
            kinds |= {kind} - {""}
        files = dict(corpus.files) if corpus else {}
        files |= small_files(url, files, failures if failures_known else None, done)
        repaired = described(url, corpus, tuple(shards), kinds, files)
        text = repaired.to_json()
        if corpus is None or text != corpus.to_json():
            write_text(join_url(url, "corpus.json"), text, scratch)
            done.append(f"corpus.json rebuilt: {len(shards)} shards, {repaired.samples} samples")
    return done


def new_index(url: str, report: Report, scratch: Path, columns: dict[str, str]) -> tuple[ShardInfo, str]:
    """Index an intact tar again, with extra columns; returns its line of corpus.json and its media type."""
    tars, name = report.check.tar.rsplit("/", 1)
    filesystem, path = fsspec.url_to_fs(report.check.tar)
    where = report.check.number, tars, name, filesystem.size(path), url, str(scratch)
    task = IndexTask(*where, 0.0, rebuild=True, columns=columns)
    shard = index_shard(task, lambda good, bad, size: None)
    if shard.info is None:
        raise UserError(f"{report.check.tar}: {shard.damages[0]}")
    return shard.info, shard.media_type


def small_files(url: str, files: dict[str, str], failures: FailureLog | None, done: list[str]) -> dict[str, str]:
    """SHA-256 of the files beside the shards; failures.parquet is made again from the indices where it is damaged."""
    found = {}
    for name in (BUILD, FILE):
        tar_url = join_url(url, name)
        filesystem, path = fsspec.url_to_fs(tar_url)
        there = filesystem.exists(path)
        digest = digest_of([tar_url]) if there else ""
        if digest and files.get(name, digest) == digest:
            found[name] = digest
        elif name == FILE and failures is not None and (there or files or failures.count):
            found |= failures.publish(url)
            done.append(f"{FILE} rebuilt: {failures.count} failures")
    return found


def described(
    url: str, corpus: Corpus | None, shards: tuple[ShardInfo, ...], kinds: set[str], files: dict[str, str]
) -> Corpus:
    """The corpus of these shards; name and settings as corpus.json or build.json says, as far as that can be read."""
    if corpus:
        return replace(corpus, shards=shards, files=files)
    settings = settings_at(url)
    tars, more = "", {}
    if settings is None:
        try:
            old = parse_corpus(read_file(join_url(url, "corpus.json")), url, also_damaged=True)  # better than nothing
            name, settings, tars, more = old.name, old.settings, old.tars, old.more
        except (OSError, ValueError):
            name, settings = url.rstrip("/").rsplit("/", 1)[-1], {"indexed": True}
    else:
        name = settings["name"]
    media_type = next(iter(kinds)) if len(kinds) == 1 else settings.get("media_type", "image")
    return Corpus(url, name, media_type, shards, settings, files, tars, more)


def settings_at(url: str) -> dict[str, Any] | None:
    """The settings of the build that wrote the folder."""
    try:
        with fsspec.open(join_url(url, BUILD), "rb") as file:
            found = json.loads(file.read())
        columns = found["reading"].get("extra_columns")
        settings = {name: found[name] for name in ShardSettings.__dataclass_fields__}
        return settings | ({"extra_columns": columns} if columns else {})
    except (OSError, ValueError, KeyError, TypeError):
        return None
