"""Byte ranges of files in a local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import fsspec

from storage.ranges import ByteRange
from storage.urls import join_url


class LocalStore:
    """Reads files below a folder, of which the last used `open_files` stay open. Safe for threads."""

    def __init__(self, url: str, open_files: int) -> None:
        """url: a path, or file://."""
        self.url = url
        self._folder = str(fsspec.url_to_fs(url)[1])
        self._file = lru_cache(open_files)(self._open)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range; see `Store`."""
        files = [self._file(each.name) for each in ranges]
        for file, each in zip(files, ranges, strict=True):  # all of them first, so that the disk reads many at once
            os.posix_fadvise(file.descriptor, each.start, each.size, os.POSIX_FADV_WILLNEED)
        return [os.pread(file.descriptor, each.size, each.start) for file, each in zip(files, ranges, strict=True)]

    def close(self) -> None:
        """Close the files; the next read reopens them."""
        self._file.cache_clear()

    def _open(self, name: str) -> OpenFile:
        try:
            return OpenFile(os.path.join(self._folder, name))
        except FileNotFoundError:
            raise FileNotFoundError(f"{join_url(self.url, name)} is missing") from None


class OpenFile:
    """A file that is closed with the last reference to it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        """Close it."""
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
