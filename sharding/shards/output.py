"""The folder that a build writes to: claimed for one set of settings, locked, cleared of what a killed build left."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec

from runtime.errors import UserError
from sharding.annotations.config import Reading
from sharding.shards.plan import ShardSettings
from sharding.shards.schema import VERSION
from sharding.shards.writing import publish
from storage.locks import HeldError, Lock
from storage.policy import check_bucket, retry, storage_errors
from storage.urls import join_url

BUILD = "build.json"  # the plan of the build that writes there
PARTIAL = ".partial"  # folder inside a local output that holds unfinished files
LOCK = "lock"  # file in it
CLEARING = 5.0  # seconds that the last part of a build may take to clear up
STAGED = "rows-*.sqlite"  # files in it that an interrupted build leaves to the next one


@contextmanager
def open_output(output: str, among_others: bool = False, part: str = "") -> Iterator[Path]:
    """Hold `output` for one build; yields a local folder for unfinished files, removed at the end.

    among_others: files of other origin may be there.
    part: this is one of several jobs, such as 2/8, that write there at the same time.
    Raises ValueError: another build is writing there, or it is a folder of other things.
    """
    if "://" in output:
        scratch = Path(tempfile.mkdtemp(prefix="singularity-build-"))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return
    folder = Path(output)
    refuse_others(folder, among_others)
    partial = folder / PARTIAL
    made = [partial, *itertools.takewhile(lambda path: not path.exists(), [folder, *folder.parents])]
    beside = [] if part else list(partial.glob("part-*.lock"))
    try:
        with locked(Lock(partial / LOCK, bool(part), beside), output, CLEARING if part else 0) as lock:
            try:
                refuse_others(folder, among_others)  # once more: no other process can start to write now
                with part_folder(folder, part) if part else whole_folder(folder) as scratch:
                    yield scratch
            except BaseException:
                if not part or lock.make_exclusive():
                    leave_partial(partial, keep_rows=True)
                raise
            # Of several parts the last one removes what is left.
            if not part or ((folder / "corpus.json").exists() and lock.make_exclusive()):
                leave_partial(partial, keep_rows=False)
    finally:
        for path in made:  # innermost first
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def refuse_others(folder: Path, among_others: bool) -> None:
    """Raise UserError where the output is a file, or holds things that no build of this tool made and may not."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output, a folder")
    if among_others or not folder.exists():
        return
    others = any(path.name != PARTIAL for path in folder.iterdir())
    if others and not (folder / BUILD).exists():  # in this order: a part may just write it
        raise UserError(f"{folder} is not empty and is not a corpus: choose another --output")


@contextmanager
def locked(lock: Lock, what: str, seconds: float = 0) -> Iterator[Lock]:
    """Hold a lock; raises UserError where another build has it.

    Who shares it waits a moment: the last part of a build holds the folder alone while it clears up.
    """
    try:
        lock.acquire(seconds)
    except HeldError as held:
        raise UserError(
            f"another build is writing to {what} ({held}): wait for it, or choose another --output"
        ) from None
    try:
        yield lock
    finally:
        lock.release()


def clear_partial(folder: Path, keep_rows: bool) -> None:
    """Delete unfinished files; the lock stays, and staged rows where they are to be kept."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK and not (keep_rows and path.match(STAGED)):
            path.unlink(missing_ok=True)


def leave_partial(folder: Path, keep_rows: bool) -> None:
    """`clear_partial`, and where nothing stays, the lock goes, too: from then on another build may hold one."""
    clear_partial(folder, keep_rows)
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()


def has_staged_rows(output: str) -> bool:
    """Whether an interrupted build may have left its rows in a local output."""
    return "://" not in output and any((Path(output) / PARTIAL).glob(STAGED))


def staging_folder(output: str, scratch: Path, plan: dict[str, Any]) -> Path:
    """The staging folder of a plan's rows: inside a local output, so that a resumed build finds them."""
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    folder = scratch if "://" in output else Path(output) / PARTIAL
    return folder / STAGED.replace("*", digest)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder for unfinished files, cleared of what a killed build left."""
    clear_partial(folder / PARTIAL, keep_rows=True)
    yield Path(tempfile.mkdtemp(dir=folder / PARTIAL))  # a unique name: no older process writes there


@contextmanager
def part_folder(folder: Path, part: str) -> Iterator[Path]:
    """Hold one job's share of the local output `folder`; yields a folder in it for unfinished files."""
    partial, name = folder / PARTIAL, f"part-{part.replace('/', '-of-')}"
    with locked(Lock(partial / f"{name}.lock"), f"part {part} of {folder}"):
        for left in partial.glob(f"{name}-*"):  # by a killed job
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=partial))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def plan_of(settings: ShardSettings, reading: Reading, annotations_sha256: str = "") -> dict[str, Any]:
    """The settings that decide a corpus' bytes, for `build.json`; works before annotations are read."""
    annotations = {"annotations_sha256": annotations_sha256} if annotations_sha256 else {}
    how = {name: value for name, value in asdict(reading).items() if name != "extra_columns"}
    reading_settings = how | reading.recorded_columns()
    return {"version": VERSION, **asdict(settings), **annotations, "reading": reading_settings}


def check_claim(output: str, plan: dict[str, Any]) -> bool:
    """Whether `build.json` is there; raises ValueError when the shards there are of another build than `plan`."""
    found = read_claim(join_url(output, BUILD))
    if found is None:
        return False
    different = sorted(key for key in plan if plan[key] != found.get(key))
    if different:
        raise UserError(
            f"{output} has a corpus built with another {', '.join(different)}: "
            "choose another --output, or delete that folder first"
        )
    return True


def read_claim(url: str) -> dict[str, Any] | None:
    """The contents of `build.json`; None where there is none."""
    with storage_errors(url, "read"):
        filesystem, path = fsspec.url_to_fs(url)
        try:
            return json.loads(retry(filesystem.cat_file, path))
        except FileNotFoundError:
            check_bucket(url)  # now, and not when all annotations are read
            return None


def claim(output: str, plan: dict[str, Any], scratch: Path) -> None:
    """Note in `build.json` what is built here; raise ValueError when the shards there are of another build."""
    if not check_claim(output, plan):
        write_text(join_url(output, BUILD), json.dumps(plan, indent=1, ensure_ascii=False) + "\n", scratch)


def digest_of(files: Sequence[str]) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with storage_errors(file, "read"):
            digest = retry(with_contents, digest, file)
    return digest.hexdigest()


def with_contents(digest: Any, file: str) -> Any:
    """A copy of a digest that has taken in a file."""
    result = digest.copy()
    with fsspec.open(file, "rb") as handle:
        while block := handle.read(2**20):
            result.update(block)
    return result


def write_text(url: str, text: str, scratch: Path) -> None:
    """Write a small file so that it is whole or absent."""
    path = scratch / url.rsplit("/", 1)[-1]
    path.write_text(text, encoding="utf-8")
    publish(path, url)


def remove(url: str) -> None:
    """Delete a file if it is there."""
    with storage_errors(url, "delete"):
        filesystem, path = fsspec.url_to_fs(url)
        if retry(filesystem.exists, path):
            retry(filesystem.rm_file, path)
