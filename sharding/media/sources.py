"""Sources of media: local files, any fsspec URL, web servers, archives; remote ones are prefetched."""

from __future__ import annotations

import functools
import io
import mmap
import os
import queue
import re
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

import fsspec

from runtime.errors import AccessError, MissingError, UserError
from sharding.media.archives import Archive, split_archive
from sharding.media.frames import MediaError
from storage.fetching import Fetching
from storage.policy import StoreError, check_bucket, describe_error, retry, storage_errors
from storage.urls import join_url, local_form
from storage.web import web_client

WINDOW = {"image": 1024, "video": 64}  # media: how far finished ones may precede a slow one
PREFETCHED = 2  # media in transfer or waiting to be decoded, for each connection
OPEN_ARCHIVES = 8
COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2|txz)$", re.IGNORECASE)
WEB = ("http://", "https://")
QUOTED = re.compile(r"%[0-9a-fA-F]{2}")  # in a name: it may come from an address

Fetched = bytes | BinaryIO  # an image's bytes, or a clip's open file


class Media:
    """The media of one shard under a root (folder, archive or URL); `scratch` is a local folder for clips on their way.

    Use as a context manager; closing it cancels the transfers.
    """

    def __init__(self, root: str, media_type: str, scratch: Path, fetching: Fetching) -> None:
        root = local_form(root)
        self.root = os.path.abspath(root) if root and "://" not in root else root
        self.media_type, self.scratch, self.fetching = media_type, scratch, fetching
        self.stop = threading.Event()
        self._archive = functools.lru_cache(OPEN_ARCHIVES)(functools.partial(open_archive, folder=scratch))
        self._listing = threading.Lock()

    def __enter__(self) -> Media:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the transfers."""
        self.stop.set()

    def fetched(self, sources: Sequence[str]) -> Iterator[tuple[int, Fetched | MediaError]]:
        """(index in `sources`, media or the reason), local files in order, remote ones in order of arrival.

        Raises PermissionError: the store refuses the credentials, for all sources.
        """
        indices = iter(range(len(sources)))
        local = (self.location(source).startswith("/") for source in sources)
        if all(local):
            yield from ((index, self.fetch(sources[index])) for index in indices)
            return
        window = WINDOW[self.media_type]
        done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        pending: dict[Future[Any], int] = {}
        with ThreadPoolExecutor(self.fetching.connections) as pool:
            following = next(indices, None)
            try:
                while pending or following is not None:
                    few = len(pending) <= self.fetching.connections  # starting many at once is cheaper than one by one
                    while (
                        few
                        and following is not None
                        and len(pending) < PREFETCHED * self.fetching.connections
                        and following - min(pending.values(), default=following) < window
                    ):
                        future = self.start(pool, sources[following])
                        pending[future] = following
                        future.add_done_callback(done.put)
                        following = next(indices, None)
                    future = done.get()
                    index = pending.pop(future)
                    yield index, self.outcome(future, sources[index])
            finally:
                self.stop.set()
                for future in pending:
                    future.cancel()
                pool.shutdown(wait=False, cancel_futures=True)

    def start(self, pool: ThreadPoolExecutor, source: str) -> Future[Any]:
        """Begin to fetch a distant source."""
        url = self.location(source)
        if url.startswith(WEB) and ("://" in source or not split_archive(url)):
            file = io.BytesIO() if self.media_type == "image" else tempfile.TemporaryFile(dir=self.scratch)  # noqa: SIM115
            bounds = self.fetching.bounds(self.media_type)
            return web_client(self.fetching).fetch(url, cast(BinaryIO, file), bounds)
        return pool.submit(self.fetch, source)

    def outcome(self, future: Future[Any], source: str) -> Fetched | MediaError:
        """The media or why it cannot be read; raises errors that all other sources would meet."""
        try:
            found = future.result()
        except StoreError as error:
            quoted = error.kind is FileNotFoundError and "://" not in source and QUOTED.search(source)
            remedy = f" (names are quoted when they are sent: write {unquote(source)!r}?)" if quoted else ""
            return MediaError(f"{error}{remedy}")
        return found.getvalue() if isinstance(found, io.BytesIO) else found

    def location(self, source: str) -> str:
        """A source's URL, or its absolute path where it is a local file."""
        if "://" in source:
            return local_form(source)
        if self.root.startswith(WEB):
            return web_address(self.root, source)
        return join_url(self.root, source) if self.root else os.path.abspath(source)

    def fetch(self, source: str) -> Fetched | MediaError:
        """The bytes or the open file of one medium, or the reason why it cannot be read."""
        url = self.location(source)
        try:
            if url.startswith("/"):
                return self._fetch(url, False)
            return retry(self._fetch, url, "://" in source, attempts=self.fetching.attempts, stop=self.stop)
        except MediaError as error:
            return error
        except Exception as error:  # clients raise all sorts of things; one file must not end a build
            found = describe_error(error)
            if not url.startswith(("/", *WEB)) and found.kind is PermissionError:
                raise AccessError(f"cannot read {url}: {found}") from error
            return MediaError(str(found))

    def _fetch(self, url: str, absolute: bool) -> Fetched:
        if not absolute and (inside := split_archive(url)):
            with self._listing:  # one thread lists the archive, the others wait
                archive = self._archive(inside[0])
            return archive.read(inside[1])
        if url.startswith("/"):
            return read_local(url, whole=self.media_type == "image")
        filesystem, path = fsspec.url_to_fs(url)
        if self.media_type == "image":
            return filesystem.cat_file(path)
        return download(filesystem, path, self.scratch)


def web_address(root: str, name: str) -> str:
    """The address of a file below a folder of a web server; special characters are percent-encoded.

    Names of archives' members stay as they are: they are looked up, and not sent.
    """
    url = join_url(root, name)
    archive, member = split_archive(url) or (url, "")
    outer = len(join_url(root, ""))
    if len(archive) < outer:
        return url  # the root is an archive, or inside of one
    return url[:outer] + quote(archive[outer:]) + ("/" + member if member else "")


def open_archive(url: str, folder: Path) -> Archive:
    """An archive; raises MediaError if it cannot be read, other errors if they may be transient."""
    try:
        return Archive(url, folder)
    except ValueError as error:
        raise MediaError(str(error)) from None
    except FileNotFoundError:
        raise MediaError(f"archive {url.rsplit('/', 1)[-1]} not found") from None


def read_local(path: str, whole: bool) -> Fetched:
    """A file's bytes, or the open file; raises MediaError for what is not a file: pipes and devices have no end."""
    file = open(path, "rb", opener=open_at_once)  # noqa: SIM115 (an open clip is closed by who decodes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise MediaError("not a regular file")
    if not whole:
        return file
    with file:
        return file.read()


def open_at_once(path: str, flags: int) -> int:
    """`os.open` that does not wait for a writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def download(filesystem: Any, path: str, scratch: Path) -> BinaryIO:
    """A remote file as an open, unlinked local one: it is deleted when it is closed."""
    descriptor, name = tempfile.mkstemp(dir=scratch)
    os.close(descriptor)
    try:
        filesystem.get_file(path, name)
        return open(name, "rb")
    finally:
        os.unlink(name)


@contextmanager
def opened(media: Fetched) -> Iterator[bytes | mmap.mmap]:
    """A media's bytes: mapped, where it is a file, so that a long clip costs no memory."""
    if isinstance(media, bytes):
        yield media
        return
    with media:
        if os.fstat(media.fileno()).st_size == 0:
            yield b""
            return
        with mmap.mmap(media.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def check_root(root: str) -> None:
    """Check that the folder, archive or store that media paths start from exists, where that can be known.

    Raises FileNotFoundError: it does not exist. ValueError: it is a compressed tar. PermissionError, OSError: it is
    remote and cannot be reached.
    """
    if COMPRESSED_TAR.search(root):
        raise UserError(f"media root {root} is compressed as a whole, single files cannot be read from it: gunzip it")
    inside = split_archive(root)
    base = local_form(inside[0] if inside else root)
    if not root or base.startswith(WEB):
        return  # sources are URLs of their own; web servers do not list folders
    with storage_errors(base, "read"):
        filesystem, path = fsspec.url_to_fs(base)
        found = retry(filesystem.exists, path)
    if not found:
        check_bucket(base)
        raise MissingError(f"media root {root} does not exist: check --media-root")
