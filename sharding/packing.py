"""A build from its settings to a described corpus: rows are staged, shards built, everything accounted for."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.progress import Progress, counted
from runtime.units import data_size
from sharding.annotations.reading import read_rows
from sharding.annotations.staging import Staged, move_staged, open_staged, stage
from sharding.estimate import estimate_build
from sharding.executors.executor import Executor
from sharding.reasons import summary
from sharding.settings import BuildSettings
from sharding.shards.failures import FailureLog, TooManyFailures
from sharding.shards.output import (
    BUILD,
    check_claim,
    claim,
    digest_of,
    has_staged_rows,
    open_output,
    plan_of,
    remove,
    staging_folder,
    write_text,
)
from sharding.shards.plan import Task, plan_shards
from sharding.shards.schema import Corpus, ShardInfo
from sharding.shards.writing import FinishedShard, finished_shard
from storage.urls import join_url

LOOKUPS = 16  # shards looked up at once in a store

log = logging.getLogger("sharding")


def pack(settings: BuildSettings) -> Corpus:
    """Pack annotated media into shards and describe them in `corpus.json`.

    Shards that an interrupted build completed are kept; the result is byte-identical whatever the executor.
    Of several jobs on one output the last one describes it; the others return what is complete.

    Raises FileNotFoundError: an annotation file or the media root is missing. ValueError: bad settings or annotations,
    or an output that holds something else or is in use. TooManyFailures: a larger share of media failed than
    `max_failures`.
    """
    settings = settings.prepared()
    shards, output = settings.shards, settings.output
    with open_output(output, part=settings.executor.part) as scratch:
        check_claim(output, plan_of(shards, settings.reading))
        staged, digest = staged_rows(settings, scratch)
        claim(output, plan_of(shards, settings.reading, digest) | shards.shares(staged.items), scratch)
        tasks = planned_tasks(settings, staged, scratch)
        failures = FailureLog(scratch)
        with Progress(
            staged.items, f"packing {shards.name}", settings.progress, log_every=settings.log_every
        ) as progress:
            built, rows = build_shards(tasks, settings.executor, settings.retry_failed, failures, progress)
        recorded = asdict(shards) | settings.reading.recorded_columns()
        corpus = Corpus(output, shards.name, shards.media_type, tuple(built), recorded)
        if len(built) < len(tasks):
            return corpus
        files = {BUILD: digest_of([join_url(output, BUILD)]), **failures.publish(output)}
        corpus = replace(corpus, files=files)
        report(staged, rows, corpus, failures)
        check_failures(failures.count, staged.items, settings)
        write_text(join_url(output, "corpus.json"), corpus.to_json(), scratch)
    return corpus


def estimate(settings: BuildSettings) -> Iterator[str]:
    """Lines about the size and time of `pack` with these settings; nothing is written. Raises like `pack`."""
    settings = settings.prepared()
    with tempfile.TemporaryDirectory(prefix="singularity-estimate-") as folder:
        scratch = Path(folder)
        staged = stage_annotations(settings, scratch)
        tasks = planned_tasks(settings, staged, scratch)
        yield from estimate_build(staged, tasks, settings.executor.processes, settings.max_failures)


def planned_tasks(settings: BuildSettings, staged: Staged, scratch: Path) -> list[Task]:
    """One task per shard."""
    where = settings.media_root, settings.output, scratch
    return plan_shards(staged, settings.shards, *where, settings.fetching, settings.reading.extra_columns)


def staged_rows(settings: BuildSettings, scratch: Path) -> tuple[Staged, str]:
    """(rows on disk, SHA-256 of their annotation files); the files are read once, after an interruption only hashed.

    Raises FileNotFoundError, ValueError: a file cannot be read, there is nothing to pack, or the rows are of other
    files than those that the corpus was built of.
    """
    output, digest = settings.output, hashlib.sha256()
    if has_staged_rows(output):
        found = digest_of(settings.annotations)
        plan = plan_of(settings.shards, settings.reading, found)
        check_claim(output, plan)
        if (staged_rows := staging_folder(output, scratch, plan)).exists():
            log.info("annotations: read by an earlier run")
            return open_staged(staged_rows), found
    staged = stage_annotations(settings, scratch, digest)
    plan = plan_of(settings.shards, settings.reading, digest.hexdigest())
    check_claim(output, plan)
    return move_staged(staged, staging_folder(output, scratch, plan)), digest.hexdigest()


def stage_annotations(settings: BuildSettings, scratch: Path, digest: Any = None) -> Staged:
    """The rows of annotation files in a file in `scratch`; raises as `staged_rows`. `digest` takes in the files."""
    start = time.monotonic()
    rows = read_rows(settings.annotations, settings.reading, scratch, digest)
    if settings.progress:
        rows = counted(rows, settings.log_every)
    staged = stage(rows, scratch / "rows.sqlite", scratch, settings.reading.limit)
    if not staged.items:
        raise UserError(nothing_to_pack(settings.annotations, staged))
    seconds = time.monotonic() - start
    log.info("annotations: %d rows about %d media, read in %.1f seconds", staged.rows, staged.items, seconds)
    return staged


def nothing_to_pack(annotations: Sequence[str], staged: Staged) -> str:
    """The message that nothing can be packed."""
    files = ", ".join(annotations)
    if not staged.rows:
        return f"no records in {files}: nothing to pack"
    reasons = "; ".join(f"{count} x {reason}" for reason, count in staged.filtered.items())
    return f"all {staged.rows} rows of {files} are filtered ({reasons}): nothing to pack"


def report(staged: Staged, packed_rows: int, corpus: Corpus, failures: FailureLog) -> None:
    """Log the account; every annotation row was packed, failed or filtered, or it is an error of this program."""
    if staged.kept != packed_rows + failures.rows or staged.items != corpus.samples + failures.count:
        raise RuntimeError(
            f"{corpus.url}: {staged.rows} rows, {packed_rows} packed, {failures.rows} failed, {staged.filtered} "
            f"filtered; {staged.items} media, {corpus.samples} packed, {failures.count} failed: "
            "the numbers do not add up"
        )
    filtered = staged.rows - staged.kept
    log.info("%d rows = %d packed + %d failed + %d filtered", staged.rows, packed_rows, failures.rows, filtered)
    for reason, count in sorted(staged.filtered.items(), key=lambda pair: -pair[1]):
        log.info("  %6d x filtered: %s", count, reason)
    log.info("%d media = %d packed + %d failed", staged.items, corpus.samples, failures.count)
    for line in summary(failures.kinds):
        log.info("%s", line)
    if failures.count:
        log.info("each one with its reason: python -m sharding.inspect %s --failures", corpus.url)
    shards, frames, size = len(corpus.shards), sum(corpus.counts("frames")), sum(corpus.counts("bytes"))
    log.info("%s: %d shards, %d samples, %d frames, %s", corpus.url, shards, corpus.samples, frames, data_size(size))


def check_failures(failed: int, media: int, settings: BuildSettings) -> None:
    """Raise TooManyFailures where a larger share of the media failed than the settings allow."""
    if failed > settings.max_failures * media:
        raise TooManyFailures(
            f"{failed} of {media} media failed ({failed / media:.1%}, at most {settings.max_failures:.1%} allowed): "
            f"see `python -m sharding.inspect {settings.output} --failures`; repair them and run the same command with "
            "--retry-failed, or raise --max-failures"
        )


def build_shards(
    tasks: list[Task], executor: Executor, retry_failed: bool, failures: FailureLog, progress: Progress
) -> tuple[list[ShardInfo], int]:
    """The complete shards, in order, and the annotation rows in them; those already complete are not built again.

    They are all of them, unless this is one job of several and others are not done.

    Raises ValueError: `executor.finish`, and shards are missing.
    """
    shards: dict[int, ShardInfo] = {}
    rows = 0

    def keep(number: int, shard: FinishedShard) -> None:
        nonlocal rows
        shards[number] = shard.info
        rows += shard.rows
        failures.add(number, shard.failures)

    for task, done in finished(tasks):
        if not (retry_failed and done.failures):
            keep(task.number, done)
            progress.skip(done.info.samples, len(done.failures), done.info.bytes)
    pending = executor.of_this_job([task for task in tasks if task.number not in shards])
    if pending:
        unpublish(pending)
    for task, shard in executor.run(pending, progress.advance):
        keep(task.number, shard)
    for task, done in finished([task for task in tasks if task.number not in shards]):  # by other jobs, meanwhile
        keep(task.number, done)
    missing = [task.name for task in tasks if task.number not in shards]
    if missing and executor.finish:
        raise UserError(
            f"{len(missing)} of {len(tasks)} shards are not complete in {tasks[0].output} ({', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}): run the parts that build them again, then --finish"
        )
    if missing:
        log.info("part %s is complete; other parts build %d of %d shards", executor.part, len(missing), len(tasks))
    return [shards[number] for number in sorted(shards)], rows


def finished(tasks: list[Task]) -> Iterator[tuple[Task, FinishedShard]]:
    """The tasks whose shards are complete, with their shards."""
    if not tasks:
        return
    with ThreadPoolExecutor(LOOKUPS if "://" in tasks[0].output else 1) as pool:
        for task, done in zip(tasks, pool.map(lambda task: finished_shard(task.output, task.name), tasks)):
            if done:
                yield task, done


def unpublish(tasks: list[Task]) -> None:
    """Remove the descriptions of shards before these are rebuilt, so that nothing looks complete."""
    remove(join_url(tasks[0].output, "corpus.json"))
    with ThreadPoolExecutor(LOOKUPS) as pool:
        indices = [join_url(task.output, task.name.removesuffix(".tar") + ".parquet") for task in tasks]
        list(pool.map(remove, indices))
