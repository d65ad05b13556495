"""Annotation files of any store, compressed or not: each is opened once, and read and hashed in one traversal."""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.compression import compr
from fsspec.utils import infer_compression

from runtime.errors import MissingError, UserError
from storage.policy import BucketError, causes, retry, status_of, storage_errors

BLOCK = 2**20  # bytes of a remote file read at a time
# Errors of decompression; OSErrors without a number are, too.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an annotation file; `number` counts them from 1."""

    file: str
    number: int
    fields: dict[str, Any]
    filtered: str = ""  # why a reader leaves it out
    fault: str = ""  # why it cannot be understood
    columns: tuple[str, ...] = ()  # of its file, where only some of them are read

    def value(self, key: str) -> Any:
        """The value under a key; raises ValueError without one."""
        if key not in self.fields:
            raise UserError(f'{self.location}: no "{key}"; its columns are {self.names}: check --corpus')
        return self.fields[key]

    @property
    def names(self) -> str:
        """The names of its columns, for messages."""
        return ", ".join(self.columns or self.fields)

    @property
    def location(self) -> str:
        """File and number, for messages."""
        return f"{self.file}, record {self.number}"


class Resuming(io.RawIOBase):
    """A file of a remote store; a read that fails is retried from where it began."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to len(buffer) bytes into `buffer`."""
        data = retry(self._read_at, self.file.tell(), len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read_at(self, position: int, size: int) -> bytes:
        self.file.seek(position)
        return self.file.read(size)


class View(io.RawIOBase):
    """An open annotation file with its own position; closing it leaves the file open."""

    def __init__(self, file: AnnotationFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.RawIOBase."""
        self.position = offset + (0, self.position, self.file.size)[whence]
        return self.position

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Read up to len(buffer) bytes into `buffer`."""
        count = self.file.read_into(buffer, self.position)
        self.position += count
        return count


class AnnotationFile:
    """An annotation file, opened once, however often its format has to look into it; a remote one is copied first.

    digest: a hash object that takes in the file's bytes as they are first read; `finish` adds those that were not.
    """

    def __init__(self, name: str, scratch: Path | None = None, digest: Any = None) -> None:
        self.name, self.digest, self.hashed = name, digest, 0
        with reading_errors(name):
            local = name.removeprefix("file://")
            self._file = download(name, scratch) if "://" in local else open(local, "rb", buffering=0)  # noqa: SIM115
            self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> AnnotationFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; this deletes a copy."""
        self._file.close()

    def read_into(self, buffer: Any, position: int) -> int:
        """Fill `buffer` from `position` on; returns how many bytes there were."""
        count = os.preadv(self._file.fileno(), [buffer], position)
        if self.digest and position <= self.hashed < position + count:
            self.digest.update(memoryview(buffer)[self.hashed - position : count])
            self.hashed = position + count
        return count

    def finish(self, digest: Any) -> None:
        """Let `digest` have taken in the whole file."""
        self.digest = digest
        buffer = bytearray(BLOCK)
        while self.read_into(buffer, self.hashed):
            pass

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Its bytes from the start, decompressed (.gz, .bz2, .xz, .zst, .zip), without a byte order mark.

        Raises ValueError: it is in UTF-16, or cannot be decompressed.
        """
        packed = infer_compression(self.name)
        with reading_errors(self.name), io.BufferedReader(View(self), BLOCK) as raw:
            handle: IO[bytes] = compr[packed](raw, mode="rb") if packed else raw
            start = handle.read(4)
            if start[:2] in BOMS or b"\0\0" in (start[::2], start[1::2]):
                raise UserError(f"annotation file {self.name} is in UTF-16: save it as UTF-8")
            handle.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            yield handle


def record_of(file: AnnotationFile, number: int, value: Any) -> Record:
    """The record of a JSON value, which must be an object."""
    if isinstance(value, dict):
        return Record(file.name, number, value)
    return Record(file.name, number, {}, fault=f"must be an object, not {str(value)[:60]!r}")


def file_names(files: Iterable[AnnotationFile]) -> str:
    """The names of files, for messages."""
    return ", ".join(file.name for file in files)


def download(name: str, scratch: Path | None) -> IO[bytes]:
    """An unlinked copy of a remote file, which is deleted when it is closed."""
    copy = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
    with retry(fsspec.open(name, "rb").open) as remote:
        shutil.copyfileobj(Resuming(remote), copy, BLOCK)
    copy.flush()
    return copy


@contextmanager
def reading_errors(file: str) -> Iterator[None]:
    """Errors inside the block become those of an annotation file.

    Raises FileNotFoundError: it does not exist. OSError: a remote store fails again and again, or refuses the
    credentials. ValueError: it cannot be decompressed.
    """
    try:
        with storage_errors(file, "read annotations from"):
            yield
    except DAMAGED as error:
        raise UserError(decompression_error(file, error)) from None
    except BucketError:
        raise
    except OSError as error:
        if infer_compression(file) and type(error) in (OSError, gzip.BadGzipFile) and error.errno is None:
            raise UserError(decompression_error(file, error)) from None
        absent = any(isinstance(cause, FileNotFoundError) for cause in causes(error))
        if absent and status_of(error) in (None, 404):
            raise MissingError(f"annotation file {file} does not exist: check --annotations") from None
        if not isinstance(error, IsADirectoryError):
            raise
        raise UserError(f"{file} is a folder: --annotations are files, such as {file.rstrip('/')}/*.json") from None


def check_exists(file: str) -> None:
    """Raise MissingError where an annotation file does not exist, UserError where it is a folder."""
    with reading_errors(file):
        filesystem, path = fsspec.url_to_fs(file)
        if retry(filesystem.info, path)["type"] == "directory":
            raise IsADirectoryError(file)


def decompression_error(file: str, error: Exception) -> str:
    """The message for a compressed file that cannot be decompressed."""
    return f"annotation file {file} cannot be decompressed ({error}): is it complete, and compressed as its name says?"
