"""The folder that a build writes to: claimed for one set of settings, locked, cleared of what a killed build left."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from sharding.annotations.config import Reading
from sharding.errors import UserError
from sharding.plan import Settings
from sharding.remote import again, naming
from sharding.schema import VERSION, join_url, plain_scheme
from sharding.writing import publish

BUILD = "build.json"  # says what a build writes there
PARTIAL = ".partial"  # folder inside a local output that holds unfinished files
CLEARING = 5.0  # seconds that the last part of a build may take to clear up
STAGED = "rows-*.sqlite"  # files in it that an interrupted build leaves to the next one

log = logging.getLogger(__name__)


def local_form(url: str) -> str:
    """A local folder as a plain path, any other URL with its scheme in lower case."""
    return plain_scheme(url).removeprefix("file://")


@contextmanager
def open_output(output: str, among_others: bool = False, part: str = "") -> Iterator[Path]:
    """Hold `output` for one build; yields a local folder for unfinished files, removed at the end.

    among_others: files that no build of this tool made may lie there.
    part: this is one of several jobs, such as 2/8, that write there at the same time.

    Raises:
        ValueError: another build is writing there, or it is a folder of other things.
    """
    if "://" in output:
        scratch = Path(tempfile.mkdtemp(prefix="singularity-build-"))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        lock_folder(lock, output, shared=bool(part))
        others = any(path.name != PARTIAL for path in folder.iterdir())
        if others and not among_others and not (folder / BUILD).exists():  # in this order: a part may just write it
            raise UserError(f"{output} is not empty and holds no build of this tool: choose another --output")
        if part:
            with part_folder(folder, part) as scratch:
                yield scratch
            if (folder / "corpus.json").exists() and lock_alone(lock):  # no other part still works in there
                shutil.rmtree(folder / PARTIAL, ignore_errors=True)
            return
        clear_partial(folder / PARTIAL)  # what a killed build left
        (folder / PARTIAL).mkdir(exist_ok=True)
        try:
            yield Path(tempfile.mkdtemp(dir=folder / PARTIAL))  # a name of its own: no older process writes there
        except BaseException:
            clear_partial(folder / PARTIAL)
            raise
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    finally:
        os.close(lock)


def clear_partial(folder: Path) -> None:
    """Delete unfinished files; staged rows stay, and the folder where there are any."""
    staged = set(folder.glob(STAGED))
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path not in staged:
            path.unlink(missing_ok=True)
    if folder.is_dir() and not staged:
        folder.rmdir()


def staging_place(output: str, scratch: Path, plan: dict[str, Any]) -> Path:
    """Where the rows of a plan are staged: inside a local output, for an interrupted build to find them again."""
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    folder = scratch if "://" in output else Path(output) / PARTIAL
    return folder / STAGED.replace("*", digest)


@contextmanager
def part_folder(folder: Path, part: str) -> Iterator[Path]:
    """Hold one job's share of the local output `folder`; yields a folder in it for unfinished files."""
    name = f"part-{part.replace('/', '-of-')}"
    (folder / PARTIAL).mkdir(exist_ok=True)
    with open(folder / PARTIAL / f"{name}.lock", "w") as lock:
        lock_folder(lock.fileno(), f"part {part} of {folder}")
        for left in (folder / PARTIAL).glob(f"{name}-*"):  # by a killed job
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder / PARTIAL))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def lock_folder(descriptor: int, output: str, shared: bool = False) -> None:
    """Lock an open folder until it is closed, or until this process dies; file systems without locks pass.

    A shared lock is waited for: the last part of a build holds the folder alone for the moment of its clearing up.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    patient = Retrying(
        retry=retry_if_exception_type(BlockingIOError),
        stop=stop_after_delay(CLEARING if shared else 0),
        wait=wait_fixed(0.1),
        reraise=True,
    )
    try:
        patient(fcntl.flock, descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another build is writing to {output}: wait until it is done, or choose another --output"
        ) from None
    except OSError:
        log.debug("%s: its file system has no locks", output)


def lock_alone(descriptor: int) -> bool:
    """Turn a shared lock into one that nobody shares; False, and no lock at all, where others hold it too."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # first: of two that do this at once the later one must get it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def plan_of(settings: Settings, reading: Reading, annotations: Sequence[str]) -> dict[str, Any]:
    """What decides the bytes of a corpus, besides its media; for `build.json`."""
    return {
        "version": VERSION,
        **asdict(settings),
        "annotations_sha256": digest_of(annotations),
        "reading": asdict(reading),
    }


def check_claim(output: str, plan: dict[str, Any]) -> bool:
    """Whether `build.json` is there; raises ValueError when the shards there are of another build than `plan`."""
    found = read_claim(join_url(output, BUILD))
    if found is None:
        return False
    different = sorted(key for key in plan if plan[key] != found.get(key))
    if different:
        raise UserError(
            f"{output} holds a corpus built with another {', '.join(different)}: "
            "choose another --output, or delete that folder first"
        )
    return True


def read_claim(url: str) -> dict[str, Any] | None:
    """What `build.json` says; None where there is none."""
    with naming(url, "read"):
        filesystem, path = fsspec.url_to_fs(url)
        try:
            return json.loads(again(filesystem.cat_file, path))
        except FileNotFoundError:
            return None


def claim(output: str, plan: dict[str, Any], scratch: Path) -> None:
    """Note in `build.json` what is built here; raise ValueError when the shards there are of another build."""
    if not check_claim(output, plan):
        write_text(join_url(output, BUILD), json.dumps(plan, indent=1, ensure_ascii=False) + "\n", scratch)


def digest_of(files: Sequence[str]) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with naming(file, "read"):
            digest = again(with_contents, digest, file)
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
    with naming(url, "delete"):
        filesystem, path = fsspec.url_to_fs(url)
        if again(filesystem.exists, path):
            again(filesystem.rm_file, path)
