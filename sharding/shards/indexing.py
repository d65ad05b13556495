"""Indexes webdataset tars that other tools wrote, in place: a shard index for each, and corpus.json for all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fsspec
import pyarrow as pa

from runtime.errors import AccessError, MissingError, UserError
from runtime.process_pool import Advance, run_tasks
from runtime.progress import LOG_EVERY, Progress
from sharding.media.tar import open_stream
from sharding.reasons import summary
from sharding.shards.failures import FailureLog, TooManyFailures
from sharding.shards.foreign import Contents, read_contents
from sharding.shards.output import open_output, write_text
from sharding.shards.schema import (
    INDEX_SCHEMA,
    TYPES,
    UNREADABLE,
    Corpus,
    ShardInfo,
    check_columns,
    files_at,
    is_index,
    is_index_schema,
    media_type_of,
    named_shards,
    read_corpus,
    read_file,
)
from sharding.shards.writing import INDEXED, counts, publish, read_note, shard_info, write_index
from storage.parquet import read_table
from storage.policy import retry, storage_errors
from storage.urls import join_url, local_form

COMPRESSED_TARS = ("*.tar.*", "*.tgz", "*.tbz2", "*.txz")
RULES = 2  # version of the rules by which files become samples and rows; other versions' indices are rebuilt
MAX_EMPTY_TARS = 16  # if these many tars hold nothing to index, the others are not tried

log = logging.getLogger("sharding")


@dataclass(frozen=True)
class IndexTask:
    """One tar to index: where it is, how long, where its index goes."""

    number: int
    tars: str
    name: str
    bytes: int
    output: str
    scratch: str
    fps: float
    rebuild: bool = False  # index it again even if an index exists
    columns: dict[str, str] = field(default_factory=dict)  # extra ones, keys of KEY.json -> their types


@dataclass(frozen=True)
class IndexedShard:
    """A shard's line of corpus.json, its media type, its failures (source, rows, reason), and damages of the tar.

    Without `info` the tar could not be indexed at all, for the reason in `damages`.
    """

    info: ShardInfo | None
    media_type: str
    failures: list[dict[str, Any]]
    damages: list[str]
    rate_assumed: bool = False
    remarks: dict[str, int] = field(default_factory=dict)  # how often what else was left out
    valued: frozenset[str] = frozenset()  # extra columns that have a value in some sample


def index_shards(
    url: str,
    fps: float = 0.0,
    output: str = "",
    workers: int = 1,
    max_failures: float = 0.05,
    progress: bool = False,
    log_every: float = LOG_EVERY,
    extra_columns: Mapping[str, str] = MappingProxyType({}),
) -> Corpus:
    """Write an index for every tar in the folder `url`, or those that it names, and `corpus.json`; returns the corpus.

    Samples are KEY.jpg (.png, .webp), or KEY.000.jpg, KEY.001.jpg ... for the frames of a clip, with KEY.txt or
    KEY.json for their texts (img2dataset's, video2dataset's and our own forms). fps: rate of clips' frames where
    their JSON does not say it. Shards indexed earlier are kept, also when other tars are named.
    extra_columns: keys of KEY.json that become columns of the index -> their types; those of an earlier run stay. Index
    and corpus.json lie beside the tars, or in `output`; samples that cannot be indexed are in its failures.parquet.
    Raises FileNotFoundError: no tars at `url`. PermissionError: nothing can be written to `url`. ValueError: tars are
    compressed or hold whole videos, or pictures and clips are mixed. TooManyFailures: a tar is damaged, or a larger
    share of samples than `max_failures` cannot be indexed; what can be read is indexed all the same.
    """
    url, names = named_shards(local_form(url))
    output = local_form(output) or url
    known = known_corpus(output)
    sizes = named_tars(url, names, known) if names else tars_at(url)
    selected = bool(names) and (known is None or bool(known.settings.get("selected")))
    columns = {**(known.settings.get("extra_columns", {}) if known else {}), **extra_columns}
    check_columns(columns)
    with writable(output) as scratch:
        tasks = [
            IndexTask(n, url, name, size, output, str(scratch), fps, columns=columns)
            for n, (name, size) in enumerate(sizes)
        ]
        failures = FailureLog(scratch)
        with Progress(len(tasks), f"indexing {url}", progress, "shard", "indexed", log_every) as shown:
            shards = index_all(tasks, min(workers, len(tasks)), failures, shown)
        files = failures.publish(output) if failures.count else {}
        corpus = describe(shards, url, output, files, selected)
        if columns:
            corpus = replace(corpus, settings=corpus.settings | {"extra_columns": columns})
        write_text(join_url(output, "corpus.json"), corpus.to_json(), scratch)
    report(corpus, shards, failures, max_failures)
    return corpus


def index_all(
    tasks: list[IndexTask], workers: int, failures: FailureLog, progress: Progress
) -> dict[str, IndexedShard]:
    """The result for each tar, by name and in order; raises ValueError if no tar can be indexed."""
    shards: dict[str, IndexedShard] = {}
    for task, shard in run_tasks(index_shard, tasks, workers, progress.advance):
        shards[task.name] = shard
        failures.add(task.number, shard.failures)
        if len(shards) in (MAX_EMPTY_TARS, len(tasks)) and not any(shard.media_type for shard in shards.values()):
            raise UserError(f"{join_url(task.tars, task.name)}: {shard.damages[0]}")
    return dict(sorted(shards.items()))


def tars_at(url: str) -> list[tuple[str, int]]:
    """(name, bytes) of the tars in a folder, in order; raises FileNotFoundError when there is none."""
    there = files_at(url)
    if not there and "://" not in url and not Path(url).is_dir():
        raise MissingError(f"{url} does not exist: check the folder's name")
    found = {name: size for name, size in there.items() if name.endswith(".tar")}
    compressed = [name for name in there if any(fnmatchcase(name, kind) for kind in COMPRESSED_TARS)]
    if compressed:
        such = f"{len(compressed)} compressed tars, such as {min(compressed)}"
        problem = f"{such}: samples cannot be read from them, unpack them first"
        if not found:
            raise UserError(f"{url} holds {problem}")
        log.warning("left out %s", problem)
    if not found:
        raise MissingError(f"{url} has no .tar files: nothing to index")
    filesystem, root = fsspec.url_to_fs(url)
    return sorted((name, size or filesystem.size(join_url(root, name))) for name, size in found.items())


def named_tars(url: str, names: Sequence[str], known: Corpus | None) -> list[tuple[str, int]]:
    """(name, bytes) of the tars of these names and of those in a corpus, in order; FileNotFoundError without one."""
    filesystem, root = fsspec.url_to_fs(url)
    urls = [join_url(root, name) for name in names]
    with storage_errors(url, "read"):
        try:
            sizes = retry(filesystem.sizes, urls)
        except FileNotFoundError:
            sizes = []
    if not sizes:
        missing = next((name for name, tar_url in zip(names, urls) if not filesystem.exists(tar_url)), names[0])
        raise MissingError(f"{join_url(url, missing)} does not exist: name existing tars")
    earlier = {shard.name: shard.bytes for shard in known.shards} if known else {}
    return sorted((earlier | {name: size or 0 for name, size in zip(names, sizes, strict=True)}).items())


@contextmanager
def writable(output: str) -> Iterator[Path]:
    """`open_output`, with an error with the remedy if the folder is not writable."""
    if output.startswith(("http://", "https://")):
        raise AccessError(f"cannot write to {output}: choose a folder for the indices with --output")
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(open_output(output, among_others=True))
        except OSError as error:
            raise read_only(output, error) from None
        yield scratch


def read_only(folder: str, error: Exception) -> OSError:
    """The error of a folder where an index cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return PermissionError(f"{folder} cannot be written ({reason}): choose a folder for the indices with --output")


def index_shard(task: IndexTask, advance: Advance) -> IndexedShard:
    """Index one tar, or keep the index that an earlier run made."""
    beside = task.tars == task.output
    index_name = free_index_name(task.output, task.name) if beside else task.name.removesuffix(".tar") + ".parquet"
    kept = None if task.rebuild else kept_index(task, index_name)
    if kept:
        advance(1, 0, task.bytes)
        return kept

    def read() -> Contents:
        with open_stream(join_url(task.tars, task.name)) as file:
            return read_contents(file, task.fps, lambda size: advance(0, 0, size), task.columns)

    try:
        with storage_errors(join_url(task.tars, task.name), "read"):
            contents = retry(read)
        reject_unstorable(contents)
        if not contents.rows and not contents.damages:
            reasons = ", ".join(sorted({failure["reason"] for failure in contents.failures})[:3])
            raise ValueError("has no pictures that could be indexed" + (f" ({reasons})" if reasons else ""))
    except AccessError:
        raise  # the storage's, not the tar's
    except ValueError as error:
        advance(0, 1, 0)
        return IndexedShard(None, "", [], [str(error)])
    shard = write_shard(task, index_name, contents)
    advance(int(not contents.damages), len(contents.damages[:1]), 0)
    return shard


def reject_unstorable(contents: Contents) -> None:
    """Samples whose texts do not fit the index's columns become failures."""
    try:
        pa.Table.from_pylist(contents.rows, schema=INDEX_SCHEMA)
    except (pa.ArrowException, TypeError, ValueError):
        valid = []
        for row in contents.rows:
            try:
                pa.Table.from_pylist([row], schema=INDEX_SCHEMA)
                valid.append(row)
            except (pa.ArrowException, TypeError, ValueError) as error:
                reason = f"its texts do not fit the schema of the index: {error}"
                contents.failures.append({"source": row["key"], "rows": 1, "reason": reason})
        contents.rows = valid


def write_shard(task: IndexTask, index_name: str, contents: Contents) -> IndexedShard:
    """Publish the index of a tar."""
    facts: dict[str, Any] = {**counts(contents.rows), "bytes": contents.bytes, "sha256": contents.sha256}
    media_type = ("video" if contents.is_video else "image") if contents.rows else ""
    damages = [f"byte {damage.offset}: {damage.reason}" for damage in contents.damages]
    note = {"facts": facts, "fps": task.fps, "failures": contents.failures, "damages": damages}
    note |= {"rules": RULES, "rate_assumed": contents.rate_assumed, "remarks": dict(contents.remarks)}
    index = Path(task.scratch) / index_name
    write_index(index, contents.rows, note, task.columns, INDEXED)
    info = shard_info(task.name, facts, index_name, index.read_bytes())
    try:
        publish(index, join_url(task.output, index_name))
    except Exception as error:  # every store has its own exceptions
        raise read_only(join_url(task.output, index_name), error) from None
    valued = frozenset(name for name in task.columns if any(row[name] is not None for row in contents.rows))
    more = contents.rate_assumed, dict(contents.remarks), valued
    return IndexedShard(info, media_type, contents.failures, damages, *more)


def kept_index(task: IndexTask, index_name: str) -> IndexedShard | None:
    """The notes of an earlier run or build on a tar of this size; None unless its index is complete.

    One that was made by other rules than today's counts as none: it may lack samples, or tell other sizes.
    """
    try:
        data = read_file(join_url(task.output, index_name))
        table = read_table(data)
        note = read_note(table.schema)
        facts = note["facts"]
    except (*UNREADABLE, KeyError):
        return None
    if facts["bytes"] != task.bytes or facts["samples"] != table.num_rows or not is_index_schema(table.schema):
        return None
    if any(TYPES[kind] != dict(zip(table.schema.names, table.schema.types)).get(n) for n, kind in task.columns.items()):
        return None
    if note.get("fps", task.fps) != task.fps or note.get("damages"):
        return None
    if "rows" not in note and note.get("rules") != RULES:  # a build notes rows
        return None
    info = shard_info(task.name, facts, index_name, data)
    valued = frozenset(name for name in task.columns if table[name].null_count < len(table))
    more = note.get("rate_assumed", False), note.get("remarks", {}), valued
    return IndexedShard(info, media_type_of(table), note["failures"], [], *more)


def free_index_name(folder: str, tar: str) -> str:
    """The file name of a tar's index; img2dataset writes its own metadata under the usual one."""
    usual = tar.removesuffix(".tar") + ".parquet"
    return tar.removesuffix(".tar") + ".index.parquet" if is_index(join_url(folder, usual)) is False else usual


def describe(
    shards: dict[str, IndexedShard], url: str, output: str, files: dict[str, str], selected: bool = False
) -> Corpus:
    """The corpus of indexed shards, under the name and settings that it had; raises ValueError for a mixture.

    selected: they are not all tars of their folder.
    """
    first = {shard.media_type: name for name, shard in reversed(shards.items()) if shard.media_type}
    if len(first) > 1:
        raise UserError(
            f"{url} holds pictures ({first['image']}) and clips ({first['video']}): a corpus has one kind, put them "
            "into folders of their own"
        )
    known = known_corpus(output)
    name, settings = (known.name, known.settings) if known else (url.rstrip("/").rsplit("/", 1)[-1], {"indexed": True})
    settings = {key: value for key, value in settings.items() if key != "selected"}
    settings |= {"selected": True} if selected else {}
    tars = "" if output == url else url if "://" in url else str(Path(url).resolve())
    more = known.more if known else {}
    infos = tuple(shard.info for shard in shards.values() if shard.info)
    return Corpus(output, name, next(iter(first)), infos, settings, (known.files if known else {}) | files, tars, more)


def known_corpus(url: str) -> Corpus | None:
    """The existing `corpus.json`, if there is one."""
    try:
        return read_corpus(url)
    except (FileNotFoundError, ValueError):
        return None


def report(corpus: Corpus, shards: dict[str, IndexedShard], failures: FailureLog, max_failures: float) -> None:
    """Log what was left out; raises TooManyFailures when that is more than allowed."""
    for line in summary(failures.kinds):
        log.info("%s", line)
    remarks: Counter[str] = Counter()
    for shard in shards.values():
        remarks.update(shard.remarks)
    for line in summary(remarks):
        log.info("%s", line)
    if any(shard.rate_assumed for shard in shards.values()):
        log.info("the shards do not state their frame rate: assuming 1 frame per second; set --fps and run again")
    for name in corpus.settings.get("extra_columns", {}):
        if not any(name in shard.valued for shard in shards.values()):
            log.warning("no sample has a value of %s: check the key's name in the KEY.json of the tars", name)
    damaged = {name: shard for name, shard in shards.items() if shard.damages}
    for name, shard in damaged.items():
        log.info("%s: %s%s", name, shard.damages[0], "; its intact samples are indexed" if shard.info else "")
    if damaged:
        raise TooManyFailures(
            f"{len(damaged)} of {len(shards)} tars of {corpus.tars or corpus.url} are damaged, the first is "
            f"{next(iter(damaged))}: download them again, and run the same command"
        )
    total = corpus.samples + failures.count
    if failures.count > max_failures * total:
        raise TooManyFailures(
            f"{failures.count} of {total} samples cannot be indexed, more than --max-failures {max_failures:g} allows; "
            f"the others are indexed: see `python -m sharding.inspect {corpus.url} --failures`"
        )
