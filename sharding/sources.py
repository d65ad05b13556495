"""Where media come from: local files, any fsspec URL, web servers, archives; distant ones are fetched ahead."""

from __future__ import annotations

import asyncio
import functools
import mmap
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
import fsspec

from sharding.archives import Archive, split_archive
from sharding.media import MediaError
from sharding.remote import ATTEMPTS, again, again_async, credentials_missing, naming, reason_of
from sharding.schema import join_url

WINDOW = {"image": 1024, "video": 64}  # media: how far finished ones may run ahead of one that is slow to come
AHEAD = 2  # media under way or waiting to be decoded, for each connection
OPEN_ARCHIVES = 8
COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2|txz)$", re.IGNORECASE)
WEB = ("http://", "https://")
AGENT = "Mozilla/5.0 (compatible; singularity-at-scale)"  # some hosts refuse clients without a name

Fetched = bytes | BinaryIO  # an image's bytes, or a clip's open file


@dataclass(frozen=True)
class Fetching:
    """How media are fetched over a network; it changes no byte of the result."""

    connections: int = 16  # at once, of each worker process
    per_host: int = 8  # of these to one host
    attempts: int = ATTEMPTS
    timeout: float = 30.0  # seconds without a byte

    def check(self) -> None:
        """Raise ValueError, with the remedy, for settings that cannot work."""
        if min(self.connections, self.per_host, self.attempts) < 1 or self.timeout <= 0:
            raise ValueError("--connections, --per-host and --attempts must be at least 1, --timeout above 0")


class Media:
    """The media of one shard under a root (folder, archive or URL); `scratch` is a local folder for clips on their way.

    Use as a context manager; closing it ends what is under way.
    """

    def __init__(self, root: str, media_type: str, scratch: Path, fetching: Fetching) -> None:
        self.root, self.media_type, self.scratch, self.fetching = root, media_type, scratch, fetching
        self.stop = threading.Event()
        self._archive = functools.lru_cache(OPEN_ARCHIVES)(functools.partial(open_archive, folder=scratch))
        self._listing = threading.Lock()

    def __enter__(self) -> Media:
        return self

    def __exit__(self, *_: object) -> None:
        """End what is under way."""
        self.stop.set()

    def fetched(self, sources: Sequence[str]) -> Iterator[tuple[int, Fetched | MediaError]]:
        """(place in `sources`, media or why it cannot be read), local files in order, distant ones as they come.

        Raises:
            PermissionError: the store refuses the credentials, so that no source would be better off.
        """
        places = iter(range(len(sources)))
        local = (self.location(source).startswith("/") for source in sources)
        if all(local):
            yield from ((place, self.fetch(sources[place])) for place in places)
            return
        window = WINDOW[self.media_type]
        with ThreadPoolExecutor(self.fetching.connections) as pool:
            pending: dict[Future[Fetched | MediaError], int] = {}
            following = next(places, None)
            try:
                while pending or following is not None:
                    while (
                        following is not None
                        and len(pending) < AHEAD * self.fetching.connections
                        and following - min(pending.values(), default=following) < window
                    ):
                        pending[self.start(pool, sources[following])] = following
                        following = next(places, None)
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        yield pending.pop(future), future.result()
            finally:
                self.stop.set()
                for future in pending:
                    future.cancel()
                pool.shutdown(wait=False, cancel_futures=True)

    def start(self, pool: ThreadPoolExecutor, source: str) -> Future[Fetched | MediaError]:
        """Begin to fetch: photos from the web in the client's own loop, which costs half of what threads do."""
        url = self.location(source)
        absolute = "://" in source
        if self.media_type == "image" and url.startswith(WEB) and (absolute or not split_archive(url)):
            filesystem, path = fsspec.url_to_fs(url, **web_options(self.fetching))
            return asyncio.run_coroutine_threadsafe(self.fetch_from_web(filesystem, path), filesystem.loop)
        return pool.submit(self.fetch, source)

    async def fetch_from_web(self, filesystem: Any, path: str) -> Fetched | MediaError:
        """`fetch` of a photo on a web server, as a coroutine."""
        try:
            return await again_async(filesystem._cat_file, path, attempts=self.fetching.attempts)
        except Exception as error:  # as in `fetch`
            return MediaError(reason_of(error))

    def location(self, source: str) -> str:
        """A source's URL, or its absolute path where it is a local file."""
        url = source if "://" in source else join_url(self.root, source) if self.root else source
        url = url.removeprefix("file://")
        return url if "://" in url else os.path.abspath(url)

    def fetch(self, source: str) -> Fetched | MediaError:
        """One media's bytes or open file, or why it cannot be read."""
        url = self.location(source)
        try:
            if url.startswith("/"):
                return self._fetch(url, False)
            return again(self._fetch, url, "://" in source, attempts=self.fetching.attempts, stop=self.stop)
        except MediaError as error:
            return error
        except Exception as error:  # clients raise all sorts of things; one file must not end a build
            if not url.startswith(("/", *WEB)) and (problem := credentials_missing(error)):
                raise PermissionError(f"cannot read {url}: {problem}") from error
            return MediaError(reason_of(error))

    def _fetch(self, url: str, absolute: bool) -> Fetched:
        if not absolute and (inside := split_archive(url)):
            with self._listing:  # one thread lists the archive, the others wait
                archive = self._archive(inside[0])
            return archive.read(inside[1])
        if url.startswith("/"):
            return read_local(url, whole=self.media_type == "image")
        options = web_options(self.fetching) if url.startswith(WEB) else {}
        filesystem, path = fsspec.url_to_fs(url, **options)
        if self.media_type == "image":
            return filesystem.cat_file(path)
        return download(filesystem, path, self.scratch)


def open_archive(url: str, folder: Path) -> Archive:
    """An archive; raises MediaError when it cannot be read, and what `again` knows to be transient."""
    try:
        return Archive(url, folder)
    except ValueError as error:
        raise MediaError(str(error)) from None
    except FileNotFoundError:
        raise MediaError(f"archive {url.rsplit('/', 1)[-1]} not found") from None


def read_local(path: str, whole: bool) -> Fetched:
    """A file's bytes, or the open file."""
    file = open(path, "rb")  # noqa: SIM115 (an open clip is closed by who decodes it)
    if not whole:
        return file
    with file:
        return file.read()


def download(filesystem: Any, path: str, scratch: Path) -> BinaryIO:
    """A distant file as an open local one that has no name any more: it goes when it is closed."""
    descriptor, name = tempfile.mkstemp(dir=scratch)
    os.close(descriptor)
    try:
        filesystem.get_file(path, name)
        return open(name, "rb")
    finally:
        os.unlink(name)


def web_options(fetching: Fetching) -> dict[str, Any]:
    """Options of fsspec's client of web servers; the same for all shards of a process, which so share connections."""
    seconds = fetching.timeout
    client = {
        "timeout": aiohttp.ClientTimeout(total=None, connect=None, sock_connect=seconds, sock_read=seconds),
        "headers": {"User-Agent": AGENT},
        "trust_env": True,
        "limits": (fetching.connections, fetching.per_host),
    }
    return {"client_kwargs": client, "get_client": connect}


async def connect(loop: asyncio.AbstractEventLoop, **settings: Any) -> aiohttp.ClientSession:
    """A session with bounded connections, in all and to each host."""
    limit, per_host = settings.pop("limits")
    connector = aiohttp.TCPConnector(limit=limit, limit_per_host=per_host, ttl_dns_cache=300)
    return aiohttp.ClientSession(loop=loop, connector=connector, **settings)


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
    """Make sure that the place that media paths start from is there, as far as that can be told.

    Raises:
        FileNotFoundError: it does not exist. ValueError: it is a compressed tar. PermissionError, OSError: it is remote
            and cannot be reached.
    """
    if COMPRESSED_TAR.search(root):
        raise ValueError(f"media root {root} is compressed as a whole, single files cannot be read from it: gunzip it")
    inside = split_archive(root)
    place = (inside[0] if inside else root).removeprefix("file://")
    if not root or place.startswith(WEB):
        return  # sources are URLs of their own; web servers do not list folders
    with naming(place, "read"):
        filesystem, path = fsspec.url_to_fs(place)
        found = again(filesystem.exists, path)
    if not found:
        raise FileNotFoundError(f"media root {root} does not exist: check --media-root")
