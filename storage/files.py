"""Files and folders written atomically: under a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.activity import progress
from runtime.errors import file_errors
from runtime.units import data_size

PIECE = 64 << 20  # bytes flushed between two reports of progress, a multiple of the page size


def temporary_path(path: Path, writer: str = "") -> Path:
    """The temporary path to which `path` is written first; writers that must not share it pass distinct names."""
    return path.with_name(f".{path.name}.{writer}.part" if writer else f".{path.name}.part")


def remove_temporary(folder: Path) -> None:
    """Remove temporary files of killed writers in a folder; no process may be writing there."""
    for left in folder.glob(".*.part"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path, sync: bool = False, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a new file beside `path`, which is renamed to `path` at the end and removed after an error.

    It has the permissions of any new file, even if the block replaces it by a private one. Errors of the disk name
    `path`, also those that safetensors and PyTorch wrap. sync: flush it to the disk.
    """
    temporary = temporary or temporary_path(path, secrets.token_hex(4))
    try:
        with file_errors(path, temporary):
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            if sync:
                flush(temporary)
            os.replace(temporary, path)
            if sync:
                flush(path.parent)
    finally:
        with contextlib.suppress(OSError):  # of a read-only disk
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write a file in UTF-8 atomically."""
    with atomic_file(path, sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which replaces an earlier one at the end; see `atomic_file`."""
    temporary = temporary_path(path)
    try:
        with file_errors(path, temporary):
            shutil.rmtree(temporary, ignore_errors=True)  # of a writer that was killed
            temporary.mkdir(parents=True)
            yield temporary
            replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, path: Path) -> None:
    """Rename a complete folder to `path`; an earlier one is first moved to where `recover_folders` finds it."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(temporary, path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folders(parent: Path) -> None:
    """Restore a folder whose replacement by `replace_folder` was interrupted."""
    for old in parent.glob(".*.old"):
        path = old.with_name(old.name[1:].removesuffix(".old"))
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def remove_folder(path: Path) -> None:
    """Rename a folder and remove it, so that no reader sees it with files missing."""
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def flush(*paths: Path) -> None:
    """Flush files and folders to the disk; reports progress after every piece of a file."""
    for path in paths:
        progress(f"flushing {path.name}")
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            size = 0 if path.is_dir() else os.fstat(handle).st_size
            if size > PIECE:
                _flush_pieces(handle, path.name, size)
            os.fsync(handle)
        finally:
            os.close(handle)


def _flush_pieces(handle: int, name: str, size: int) -> None:
    with mmap.mmap(handle, size) as view:
        for start in range(0, size, PIECE):
            view.flush(start, min(PIECE, size - start))
            progress(f"flushing {name}, {data_size(start)} of {data_size(size)}")
