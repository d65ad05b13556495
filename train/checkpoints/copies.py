"""Copies of checkpoints on any storage of fsspec, from which a run resumes after its disk is lost."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from runtime.activity import progress
from runtime.errors import AccessError, UserError
from runtime.units import data_size
from storage.files import temporary_path
from storage.policy import BUCKETS, check_bucket
from storage.urls import check_no_credentials, hide_secrets
from train.checkpoints.best import BEST, MARKER, best_version
from train.checkpoints.writing import STATE, complete_checkpoints

log = logging.getLogger(__name__)

SETTINGS, METRICS = "config.yaml", "metrics.jsonl"


class RemoteCheckpoints:
    """The checkpoints of one run below a URL. A folder is complete once its marker, written last, is there."""

    def __init__(self, url: str, storage: Mapping[str, str]) -> None:
        """storage: fsspec's options. Raises ValueError for credentials in the URL, or a protocol unknown to fsspec."""
        check_no_credentials(url, storage)
        try:
            files, root = fsspec.core.url_to_fs(url, **dict(storage))
        except (ValueError, ImportError) as error:
            raise UserError(f"checkpoint_url={url}: {error}") from None
        self._files = DirFileSystem(root.rstrip("/") or root, files)  # gcsfs keeps a trailing slash
        self._url, self._storage = url, storage
        self._copied = ""  # the checkpoint that this process has copied whole
        self._failed: tuple[Path, Path, int] | None = None

    def check(self) -> None:
        """Raise UserError where the bucket does not exist."""
        check_bucket(self._url, self._storage)

    def steps(self) -> list[str]:
        """Names of the complete ones, oldest first."""
        return self._complete("step_", STATE)

    def _complete(self, prefix: str, marker: str) -> list[str]:
        """Names of the folders that begin so and hold `marker`, in order; without patterns, which URLs may contain."""
        try:
            names = sorted(path.rstrip("/").rpartition("/")[-1] for path in self._files.ls("", detail=False))
        except FileNotFoundError:
            return []
        return [name for name in names if name.startswith(prefix) and self._files.exists(f"{name}/{marker}")]

    def upload(self, path: Path, settings: Path, keep: int) -> bool:
        """Copy a complete checkpoint with the best model that it names, the run's settings and its metrics so far.

        The newest `keep` are kept. Of a checkpoint that was copied before, only files that may have changed are copied
        again. A failure is only logged; returns whether everything was copied.
        """
        self._failed = None
        try:
            self._upload(path, settings, keep)
        except Exception as error:  # each store has its own errors
            self._failed = (path, settings, keep)
            log.error("%s was not copied to %s (%s): retrying with the next checkpoint", path, self._url, reason(error))
        return self._failed is None

    def retry(self) -> None:
        """Repeat the last upload at the end of a run, if it failed."""
        if self._failed is None or self.upload(*self._failed):
            return
        log.error("The run has ended, and %s is not in %s: copy it and %s_* there", self._failed[0], self._url, BEST)

    def _upload(self, path: Path, settings: Path, keep: int) -> None:
        if self._copied != path.name and not self._holds(path, STATE):
            self._copied = ""
            self._put_all_but(path, STATE)
        step = _best_step((path / STATE).read_bytes())
        best = None if step is None else best_version(path.parent, step)
        if best and not self._holds(best, MARKER):
            self._put_all_but(best, MARKER)
            self._put_whole(best / MARKER, f"{best.name}/{MARKER}")
        for file in (settings, settings.parent / METRICS, path / STATE):
            if file.is_file():
                self._put_whole(file, f"{path.name}/{file.name}")
        self._copied = path.name
        self._prune(path.name, keep)

    def _holds(self, folder: Path, marker: str) -> bool:
        """Whether an earlier upload has copied all of a folder."""
        there = f"{folder.name}/{marker}"
        return bool(self._files.exists(there)) and self._files.cat_file(there) == (folder / marker).read_bytes()

    def _put_all_but(self, folder: Path, marker: str) -> None:
        """Copy a folder without its marker; another one, of a run that went back to an earlier step, is removed."""
        if self._files.exists(f"{folder.name}/{marker}"):
            self._files.rm_file(f"{folder.name}/{marker}")
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / marker):
            name = path.relative_to(folder.parent).as_posix()
            self._files.makedirs(name.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), name, callback=_Reporting(f"uploading {path.relative_to(folder)}"))

    def _put_whole(self, path: Path, target: str) -> None:
        """Copy a file atomically, as buckets do by themselves."""
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        if self._url.partition("://")[0] in BUCKETS:
            self._files.put_file(str(path), target)
            return
        self._files.put_file(str(path), f"{target}.part")
        self._files.mv(f"{target}.part", target)

    def _prune(self, newest: str, keep: int) -> None:
        """Keep `newest` and those before it, `keep` in all, and the best models that they name."""
        steps = self.steps()
        kept = [name for name in steps if name <= newest][-keep:]
        for name in set(steps) - set(kept):
            self._remove(name, STATE)
        named = {_best_step(self._files.cat_file(f"{name}/{STATE}")) for name in kept}
        wanted = {best_version(Path(), step).name for step in named if step is not None}
        for name in set(self._complete(f"{BEST}_", MARKER)) - wanted:
            self._remove(name, MARKER)

    def _remove(self, name: str, marker: str) -> None:
        """Remove a folder, its marker first; fsspec's own `rm` reads names as patterns."""
        self._files.rm_file(f"{name}/{marker}")
        if isinstance(self._files.fs, LocalFileSystem):
            shutil.rmtree(Path(self._files.path) / name)
            return
        for path in self._files.find(name):
            self._files.rm_file(path)

    def fetch(self, folder: Path) -> None:
        """Fetch the newest checkpoint, its best model, the settings and the metrics to a run's folder without any.

        Raises AccessError where the copies cannot be read.
        """
        if complete_checkpoints(folder / "checkpoints"):
            return
        try:
            for name in self.steps()[-1:]:
                self._fetch(name, folder)
        except Exception as error:  # each store has its own errors
            raise AccessError(
                f"checkpoint_url={self._url}: its copies cannot be fetched to {folder} ({reason(error)}): restore the "
                "access, or start a new run with another checkpoint_url or without one"
            ) from error

    def _fetch(self, name: str, folder: Path) -> None:
        log.info("Fetching %s from %s", name, self._url)
        final = folder / "checkpoints" / name
        temporary = self._fetch_folder(final)
        if not (temporary / SETTINGS).is_file():  # made before December 2026
            self._files.get_file(SETTINGS, str(temporary / SETTINGS))
        step = _best_step((temporary / STATE).read_bytes())
        best = None if step is None else best_version(final.parent, step)
        if best and self._files.exists(f"{best.name}/{MARKER}"):
            shutil.rmtree(best, ignore_errors=True)
            os.replace(self._fetch_folder(best), best)
        for file in (SETTINGS, METRICS):
            if (temporary / file).is_file():
                os.replace(temporary / file, folder / file)
        os.replace(temporary, final)

    def _fetch_folder(self, final: Path) -> Path:
        """Fetch the folder of the same name to a temporary one, to be renamed to `final`; returns it."""
        temporary = temporary_path(final)
        shutil.rmtree(temporary, ignore_errors=True)
        for path in self._files.find(final.name):
            target = temporary / Path(path).relative_to(final.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(path, str(target), callback=_Reporting(f"fetching {path}"))
        return temporary


def _best_step(state: bytes) -> int | None:
    """The version of the best model that a checkpoint's state names."""
    try:
        return json.loads(state).get("best_step")
    except (ValueError, AttributeError):  # damaged, which is reported when it is loaded
        return None


class _Reporting(fsspec.Callback):
    """Reports the progress of a copy."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        progress(what)

    def relative_update(self, inc: int = 1) -> None:
        """Count `inc` more bytes."""
        super().relative_update(inc)
        progress(f"{self._what}, {data_size(self.value)}")


def reason(error: Exception) -> str:
    """The text of an error without secrets."""
    return f"{type(error).__name__}: {hide_secrets(str(error))}"
