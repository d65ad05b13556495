"""The folder of a run: whether this run may use it, its files, and the lock that excludes other processes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from model.backbones import adopt_pixels
from runtime.errors import UserError, file_errors
from runtime.settings import EVALUATION, FIXED, FREE, build, change_on_resume, flatten, read_layers
from storage.files import recover_folders, remove_temporary, write_text
from train.checkpoints.writing import checkpoint_step, complete_checkpoints
from train.config.settings import RunConfig, to_yaml

log = logging.getLogger(__name__)

WAIT_FOR_STOPPING = 90.0  # seconds given to a run that is just saving its last checkpoint


class RunFolder:
    """All files of a run. `claim` locks the folder for this process until `release` or the end of the process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.settings = self.path / "config.yaml"  # resolved
        self.finished = self.path / "finished.json"  # present once the run is complete
        self._lock: IO[str] | None = None

    def claim(self, config: RunConfig) -> None:
        """Take the folder for this run, or raise UserError.

        A folder is free when it is new or empty, when it holds the same run, unfinished, and `resume` is on, and when
        another run left no checkpoint there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir={self.path} is a file: choose another output_dir")
        existing = self.settings.is_file()
        others = self.path.is_dir() and any(not _is_expected(entry.name) for entry in self.path.iterdir())
        if not existing and others:
            raise UserError(f"output_dir={self.path} is not empty and is not a run folder: choose another output_dir")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_or_raise()
        recover_folders(self.checkpoints)
        if existing:
            self._check_same(config)

    def begin(self, config: RunConfig) -> None:
        """Write the resolved configuration and remove temporary files of an interrupted process."""
        remove_temporary(self.checkpoints)
        remove_temporary(self.path)
        write_text(self.settings, to_yaml(config), sync=True)  # a power cut must not leave an empty one

    def note_stopping(self) -> None:
        """Note in the lock that this run is about to exit, for a successor that waits for the folder."""
        if self._lock is not None:
            _write_note(self._lock, "stopping")

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        with file_errors(self.finished):
            self.finished.write_text(json.dumps(summary) + "\n")

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lock_or_raise(self) -> None:
        handle = (self.path / ".lock").open("a+")
        waited = 0.0
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                note = _read_note(handle)
                if note.get("state") != "stopping" or waited >= WAIT_FOR_STOPPING:
                    handle.close()
                    raise UserError(
                        f"output_dir={self.path} is in use by a running process ({note.get('pid', '?')} on "
                        f"{note.get('host', '?')}): wait for it, stop it, or choose another output_dir"
                    ) from None
                if not waited:
                    log.info("Waiting for process %s, which is saving its last checkpoint", note.get("pid"))
                time.sleep(0.5)
                waited += 0.5
            except OSError as error:  # a file system without locks
                log.warning("%s could not be locked (%s): make sure that no other run uses it", self.path, error)
                break
        self._lock = handle
        _write_note(handle, "running")

    def _check_same(self, config: RunConfig) -> None:
        if not config.resume:
            raise UserError(
                f"output_dir={self.path} is in use by an earlier run and resume is off: choose another output_dir, "
                "or set resume=true to resume that run"
            )
        if self.finished.is_file():
            raise UserError(
                f"output_dir={self.path} holds a run that is finished: choose another output_dir, or remove "
                f"the folder to train again"
            )
        steps = [checkpoint_step(path) for path in complete_checkpoints(self.checkpoints)]
        if not self.settings.read_bytes().strip(b"\0 \n"):
            log.warning("%s is empty, probably after a power failure: using this command's settings", self.settings)
            return
        changes = _changes(self.settings, config)
        difference = "; ".join(changes[FIXED][:3])
        if difference and steps:
            raise UserError(
                f"output_dir={self.path} is in use by a run with other settings ({difference}): choose another "
                "output_dir, or repeat that run's settings to resume it"
            )
        if changes[EVALUATION] and steps and config.stop_key is not None:
            log.warning(
                "Other evaluation settings chose the best checkpoint so far (%s): later scores may not be comparable",
                "; ".join(changes[EVALUATION][:3]),
            )
        if steps:
            log.info("Resuming the run in %s from step %d", self.path, steps[-1])
        else:
            log.info("The earlier run in %s saved no checkpoint: starting from the beginning", self.path)


def _changes(path: Path, config: RunConfig) -> dict[str, list[str]]:
    """The differences of `config` from the resolved configuration at `path`, as text, by their effect."""
    earlier = build(RunConfig, read_layers(RunConfig, path))
    adopt_pixels(earlier.vision_encoder, earlier.vision_encoder.type)  # not recorded by runs of before December 2026
    there, here = flatten(earlier), flatten(config)
    changes: dict[str, list[str]] = {FIXED: [], EVALUATION: [], FREE: []}
    for key in dict.fromkeys([*here, *there]):
        if there.get(key) != here.get(key):
            text = f"{key} is {there.get(key)!r} in that run, {here.get(key)!r} here"
            changes[change_on_resume(RunConfig, key) or FIXED].append(text)
    return changes


def _write_note(handle: IO[str], state: str) -> None:
    with file_errors(handle.name):
        handle.seek(0)
        handle.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "state": state}, handle)
        handle.flush()


def _read_note(handle: IO[str]) -> dict[str, Any]:
    handle.seek(0)
    try:
        return json.loads(handle.read())
    except json.JSONDecodeError:
        return {}


def _is_expected(name: str) -> bool:
    """Whether a folder may hold it before its first run: evaluations of other checkpoints, files of failed starts."""
    return name.startswith((".", "stacks_rank_")) or name in ("evaluation", "metrics.json", "logs")
