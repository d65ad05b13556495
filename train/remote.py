"""Copies of checkpoints on any storage that fsspec knows; a run whose disk is lost goes on from there."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import fsspec

from loaders.failures import check_no_credentials, hide_secrets
from sharding.errors import AccessError, UserError
from sharding.schema import join_url
from train.checkpoints import STATE, complete_checkpoints

log = logging.getLogger(__name__)

SETTINGS = "config.yaml"


class RemoteCheckpoints:
    """The checkpoints of one run below a URL; each complete or absent there too: its state.json is written last."""

    def __init__(self, url: str, storage: Mapping[str, str]) -> None:
        """storage: fsspec's options. Raises ValueError for credentials in the URL, or a protocol unknown to fsspec."""
        check_no_credentials(url, storage)
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **dict(storage))
        except (ValueError, ImportError) as error:
            raise UserError(f"checkpoint_url={url}: {error}") from None
        self._url = url

    def steps(self) -> list[str]:
        """Names of the complete ones, oldest first."""
        found = self._files.glob(join_url(self._root, f"step_*/{STATE}"))
        return sorted(path.rsplit("/", 2)[-2] for path in found)

    def upload(self, path: Path, settings: Path, keep: int) -> None:
        """Copy a complete checkpoint and the run's settings; keep the newest `keep`. A failure is logged, no more."""
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.put_file(str(settings), join_url(self._root, SETTINGS))
            target = join_url(self._root, path.name)
            files = sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())
            for name in [name for name in files if name != STATE] + [STATE]:
                self._files.makedirs(join_url(target, name).rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path / name), join_url(target, name))
            for old in self.steps()[:-keep]:
                self._files.rm_file(join_url(self._root, f"{old}/{STATE}"))  # first: it is no longer complete
                self._files.rm(join_url(self._root, old), recursive=True)
        except Exception as error:  # each store has errors of its own
            log.error("%s is not copied to %s (%s): the next checkpoint tries again", path, self._url, reason(error))

    def fetch(self, folder: Path) -> None:
        """Bring the newest checkpoint and the settings to a run's folder that holds no checkpoint.

        Raises ConnectionError where the copies cannot be read.
        """
        if complete_checkpoints(folder / "checkpoints"):
            return
        try:
            for name in self.steps()[-1:]:
                self._fetch(name, folder)
        except Exception as error:  # each store has errors of its own
            raise AccessError(
                f"checkpoint_url={self._url}: what lies there cannot be brought to {folder} ({reason(error)}): mend "
                "the way there, or start a new run with another checkpoint_url, or without"
            ) from error

    def _fetch(self, name: str, folder: Path) -> None:
        log.info("Fetching %s from %s", name, self._url)
        final = folder / "checkpoints" / name
        aside = final.with_name(f".{final.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        source = join_url(self._root, name)
        for path in self._files.find(source):
            target = aside / path[len(source) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(path, str(target))
        self._files.get_file(join_url(self._root, SETTINGS), str(folder / SETTINGS))
        os.replace(aside, final)


def reason(error: Exception) -> str:
    """An error in words that hold no secrets."""
    return f"{type(error).__name__}: {hide_secrets(str(error))}"
