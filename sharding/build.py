"""`python -m sharding.build`: annotations and media files to webdataset shards with their indices."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from runtime.errors import UserError, command
from runtime.progress import LOG_EVERY, Progress, counted
from runtime.units import data_size
from sharding.annotations.arguments import add_annotation_arguments, positive, read_options
from sharding.annotations.config import Reading
from sharding.annotations.reading import expanded, read_rows
from sharding.annotations.staging import Staged, move_staged, open_staged, stage
from sharding.estimate import Estimate, estimate_build
from sharding.executors.executor import ENGINES, Engine, pack
from sharding.media.sources import check_root
from sharding.shards.failures import FailureLog, TooManyFailures, summary
from sharding.shards.output import (
    BUILD,
    check_claim,
    claim,
    digest_of,
    has_staged_rows,
    local_form,
    open_output,
    plan_of,
    staging_place,
    write_text,
)
from sharding.shards.plan import Settings, plan_shards
from sharding.shards.schema import MEDIA_TYPES, Corpus, join_url
from storage.web import LARGEST_MB, Fetching

log = logging.getLogger("sharding")


def build_corpus(
    annotations: Sequence[str],
    media_root: str,
    media_type: str,
    output: str,
    name: str = "",
    size: int = Settings.size,
    fps: float = Settings.fps,
    max_frames: int = Settings.max_frames,
    shard_mb: int = Settings.shard_mb,
    workers: int | None = None,
    quality: int = Settings.quality,
    max_failures: float = 0.05,
    retry_failed: bool = False,
    progress: bool = False,
    log_every: float = LOG_EVERY,
    reading: Reading | None = None,
    fetching: Fetching | None = None,
    engine: Engine | None = None,
) -> Corpus:
    """Pack annotated media into shards at `output` (a folder or an fsspec URL) and describe them in `corpus.json`.

    Shards that an interrupted build completed are kept; the result is byte-identical whatever `workers` and `engine`.
    Of several jobs on one output the last one describes it; the others give back what is complete.
    `size` is the shorter side of stored frames in pixels, `fps` their rate, `max_frames` 0 means all.

    `retry_failed` builds shards again that miss media, after those were mended. `progress` shows a bar on a terminal,
    elsewhere logs a line of JSON every `log_every` seconds.

    Raises:
        FileNotFoundError: an annotation file or the media root is missing.
        ValueError: bad settings or annotations, or an output that holds something else or is in use.
        TooManyFailures: a larger share of media failed than `max_failures`.
    """
    settings = Settings(name or usual_name(output), media_type, size, quality, fps, max_frames, shard_mb)
    settings.check()
    if not 0 <= max_failures <= 1:
        raise UserError(f"--max-failures is {max_failures:g}, must be a share from 0 to 1, such as 0.05")
    fetching = fetching or Fetching()
    fetching.check()
    engine = engine or Engine()
    engine.check()
    output, media_root = local_form(output), local_form(media_root)
    check_root(media_root)
    annotations, reading = expanded(annotations), reading or Reading()
    with open_output(output, part=engine.part) as scratch:
        check_claim(output, plan_of(settings, reading))
        staged, digest = staged_rows(annotations, settings, reading, output, scratch, progress, log_every)
        claim(output, plan_of(settings, reading, digest) | settings.shares(staged.items), scratch)
        tasks = plan_shards(staged, settings, media_root, output, scratch, fetching)
        failures = FailureLog(scratch)
        shown = Progress(staged.items, f"packing {settings.name}", progress, log_every=log_every)
        with shown:
            shards, rows = pack(tasks, engine, workers or os.cpu_count() or 1, retry_failed, failures, shown)
        if len(shards) < len(tasks):
            return Corpus(output, settings.name, media_type, tuple(shards), asdict(settings))
        files = {BUILD: digest_of([join_url(output, BUILD)]), **failures.publish(output)}
        corpus = Corpus(output, settings.name, media_type, tuple(shards), asdict(settings), files)
        report(staged, rows, corpus, failures)
        if failures.count > max_failures * staged.items:
            raise TooManyFailures(
                f"{failures.count} of {staged.items} media failed ({failures.count / staged.items:.1%}, at most "
                f"{max_failures:.1%} allowed): see `python -m sharding.inspect {output} --failures`; mend them and "
                "run this again with --retry-failed, or raise --max-failures"
            )
        write_text(join_url(output, "corpus.json"), corpus.to_json(), scratch)
    return corpus


def usual_name(output: str) -> str:
    """The name of a corpus that is not given one: that of its folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", output.rstrip("/").rsplit("/", 1)[-1])[:60] or "corpus"


def staged_rows(
    annotations: Sequence[str],
    settings: Settings,
    reading: Reading,
    output: str,
    scratch: Path,
    progress: bool,
    log_every: float,
) -> tuple[Staged, str]:
    """(rows on disk, SHA-256 of their annotation files); the files are read once, in an interrupted build hashed only.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, there is nothing to pack, or the rows are of other files
            than those that the corpus at `output` was built of.
    """
    if has_staged_rows(output):
        digest = digest_of(annotations)
        plan = plan_of(settings, reading, digest)
        check_claim(output, plan)
        if (place := staging_place(output, scratch, plan)).exists():
            log.info("annotations: read by an earlier run")
            return open_staged(place), digest
    sha256 = hashlib.sha256()
    staged = stage_annotations(annotations, reading, scratch, sha256, progress, log_every)
    plan = plan_of(settings, reading, sha256.hexdigest())
    check_claim(output, plan)
    return move_staged(staged, staging_place(output, scratch, plan)), sha256.hexdigest()


def stage_annotations(
    annotations: Sequence[str], reading: Reading, scratch: Path, digest: Any, progress: bool, log_every: float
) -> Staged:
    """The rows of annotation files in a file in `scratch`; raises as `staged_rows`. `digest` takes in the files."""
    start = time.monotonic()
    rows = read_rows(annotations, reading, scratch, digest)
    staged = stage(counted(rows, log_every) if progress else rows, scratch / "rows.sqlite", scratch, reading.limit)
    if not staged.items:
        raise UserError(nothing_to_pack(annotations, staged))
    seconds = time.monotonic() - start
    log.info("annotations: %d rows about %d media, read in %.1f seconds", staged.rows, staged.items, seconds)
    return staged


def estimate_corpus(
    annotations: Sequence[str],
    media_root: str,
    output: str,
    settings: Settings,
    reading: Reading,
    fetching: Fetching,
    workers: int | None = None,
    log_every: float = LOG_EVERY,
) -> Estimate:
    """What `build_corpus` with such arguments would give and take; nothing is written. Raises like it."""
    settings.check()
    fetching.check()
    media_root = local_form(media_root)
    check_root(media_root)
    with tempfile.TemporaryDirectory(prefix="singularity-estimate-") as folder:
        scratch = Path(folder)
        staged = stage_annotations(expanded(annotations), reading, scratch, None, True, log_every)
        tasks = plan_shards(staged, settings, media_root, local_form(output), scratch, fetching)
        return estimate_build(staged, tasks, workers or os.cpu_count() or 1)


def nothing_to_pack(annotations: Sequence[str], staged: Staged) -> str:
    """Why there is nothing to pack."""
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        "python -m sharding.build",
        description="Pack images or videos with their texts into webdataset shards.",
        epilog="Exit code: 0 packed; 1 too many media failed; 2 not possible; 130 interrupted.",
    )
    add_annotation_arguments(result)
    add = result.add_argument
    add(
        "--media-root",
        default="",
        metavar="URL",
        help="folder, archive (.tar, .zip) or URL that the media paths start from; not needed where they are URLs",
    )
    add("--media-type", choices=MEDIA_TYPES, help="required unless --corpus says it")
    add(
        "--output",
        required=True,
        metavar="URL",
        help="folder of the packed corpus; run again to go on after an interruption",
    )
    add("--name", default="", help="first part of the shards' file names (default: the output folder's name)")
    add("--size", type=int, help="shorter side of stored frames in pixels (default: as --corpus says, or 224)")
    add("--fps", type=float, help="stored frames a second of video (default: as --corpus says, or 2)")
    add("--max-frames", type=int, help="at most so many frames a clip (default: as --corpus says, or all)")
    add("--shard-mb", type=int, default=Settings.shard_mb, help="aim for shards of this size (default: %(default)s)")
    add("--workers", type=int, default=None, help="processes (default: one a core)")
    add(
        "--engine",
        choices=ENGINES,
        default="processes",
        help="ray: tasks on a running Ray cluster (default: %(default)s)",
    )
    add("--part", default="", metavar="I/N", help="build the I-th of N shares of the shards, as one of N jobs")
    add("--finish", action="store_true", help="build nothing: describe the corpus once all parts are done")
    add_fetching(result.add_argument_group("media from URLs"))
    add("--quality", type=int, default=Settings.quality, help="JPEG quality, 1 to 100 (default: %(default)s)")
    add(
        "--max-failures",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="exit with 1, and no corpus.json, when a larger share of the media failed (default: %(default)s)",
    )
    add(
        "--log-every",
        type=float,
        default=LOG_EVERY,
        metavar="SECONDS",
        help="where the output is no terminal, log a line of JSON so often (default: %(default)g; 0: never)",
    )
    add("--dry-run", action="store_true", help="write nothing; estimate size and time from a sample of the media")
    add("--retry-failed", action="store_true", help="build the shards again that miss media, after mending those")
    return result


def add_fetching(group: argparse._ArgumentGroup) -> None:
    """The flags of `Fetching`."""
    default = Fetching()
    add = group.add_argument
    add("--connections", type=int, default=default.connections, help="of each process at once (default: %(default)s)")
    add("--per-host", type=int, default=default.per_host, help="of these to one web server (default: %(default)s)")
    add(
        "--attempts",
        type=int,
        default=default.attempts,
        help="at what may pass (default: %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=default.timeout,
        metavar="SECONDS",
        help="without a byte, or nearly, until a connection is given up (default: %(default)s)",
    )
    largest = ", ".join(f"{megabytes} for {kind}s" for kind, megabytes in LARGEST_MB.items())
    add("--max-mb", type=positive, default=0, metavar="MB", help=f"larger bodies are failures (default: {largest})")


@command("interrupted: run the same command again to go on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = read_options(vars(parser().parse_args(arguments)))
    options["fetching"] = Fetching(**{field.name: options.pop(field.name) for field in fields(Fetching)})
    engine = Engine(options.pop("engine"), options.pop("part"), options.pop("finish"))
    if options.pop("dry_run"):
        options["name"] = options["name"] or usual_name(options["output"])
        names = {field.name for field in fields(Settings)}
        settings = Settings(**{name: options.pop(name) for name in names & set(options)})
        max_failures = options.pop("max_failures")
        del options["retry_failed"]
        estimate = estimate_corpus(settings=settings, **options)
        sys.stdout.writelines(f"{line}\n" for line in estimate.lines())
        estimate.check(max_failures)
    else:
        build_corpus(progress=True, engine=engine, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
