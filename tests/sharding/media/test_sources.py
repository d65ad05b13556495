"""Where media come from: web servers that fail now and then, stores, archives; what cannot be had is named."""

import io
import json
import os
import tarfile
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sharding.build import build_corpus
from sharding.shards.schema import Corpus, read_index
from storage.web import Fetching

COUNT = 40
QUICK = Fetching(connections=8, per_host=4, attempts=4, timeout=1.0)


def jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((90, 70)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "photos"
    (folder / "a").mkdir(parents=True)
    for number in range(COUNT):
        (folder / "a" / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


@pytest.fixture(scope="module")
def plain(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Packed from local files: what every other way must give."""
    return pack(tmp_path_factory.mktemp("plain"), str(photos))


def pack(tmp_path: Path, root: str, names: list[str] | None = None, **settings) -> Corpus:
    names = names or [f"a/{number}.jpg" for number in range(COUNT)]
    (tmp_path / "a.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    options = {"size": 48, "workers": 1, "name": "x", "fetching": QUICK, "max_failures": 1.0} | settings
    return build_corpus([str(tmp_path / "a.json")], root, "image", str(tmp_path / "out"), **options)


def failures(tmp_path: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()}


class Web(ThreadingHTTPServer):
    """A web server with moods: `moods[path]` is the list of what its first answers are, good ones follow."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.moods: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.release = threading.Event()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            moods = self.server.moods.get(self.path)
            mood = moods.pop(0) if moods else "good"
        try:
            self.answer(mood)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    do_HEAD = do_GET

    def answer(self, mood: str) -> None:
        file = self.server.folder / self.path.lstrip("/")
        if mood.isdigit() or not file.is_file():
            self.send_response(int(mood) if mood.isdigit() else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        whole = len(data)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1]
        if mood == "silent":
            self.server.release.wait(10)
        elif mood == "slow":
            time.sleep(0.05)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[:200] if mood == "cut" else data)
        self.close_connection = mood == "cut"


@pytest.fixture
def web(photos: Path):
    server = Web(photos)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def test_photos_from_a_web_server_become_the_same_shards(web: Web, plain: Corpus, tmp_path: Path) -> None:
    assert pack(tmp_path, web.url).shards == plain.shards


def test_what_fails_now_and_then_is_asked_again(web: Web, plain: Corpus, tmp_path: Path) -> None:
    web.moods = {
        "/a/3.jpg": ["503", "500"],
        "/a/5.jpg": ["cut", "429"],
        "/a/7.jpg": ["silent"],
        "/a/9.jpg": ["502", "cut", "504"],
    }
    assert pack(tmp_path, web.url).shards == plain.shards
    assert [web.asked[f"/a/{number}.jpg"] for number in (3, 5, 7, 9, 11)] == [3, 3, 2, 4, 1]


def test_what_cannot_be_had_is_reported_with_its_reason(web: Web, tmp_path: Path) -> None:
    web.moods = {"/a/1.jpg": ["403"], "/a/2.jpg": ["503"] * 9, "/a/3.jpg": ["cut"] * 9, "/a/4.jpg": ["silent"] * 9}
    names = [f"{web.url}/a/{number}.jpg" for number in range(6)]
    gone = [f"{web.url}/none.jpg", "http://127.0.0.1:9/x.jpg", "http://no-such-host.invalid/x.jpg"]
    corpus = pack(tmp_path, "", names + gone, fetching=Fetching(attempts=2, timeout=0.5))
    assert corpus.samples == 2
    found = failures(tmp_path)
    assert found[names[1]] == "HTTP 403 Forbidden"
    assert found[names[2]] == "HTTP 503 Service Unavailable"
    assert found[names[3]] == "connection closed early"
    assert found[names[4]] == "timed out"
    assert found[gone[0]] == "file not found"
    assert found[gone[1]] == "cannot connect to 127.0.0.1:9"
    assert found[gone[2]].startswith(("host not found: no-such-host.invalid", "HTTP"))
    assert web.asked["/a/1.jpg"] == web.asked["/none.jpg"] == 1  # what is refused is not asked for again
    assert web.asked["/a/2.jpg"] == 2


def test_no_more_connections_than_allowed_go_to_one_host(web: Web, tmp_path: Path) -> None:
    web.moods = {f"/a/{number}.jpg": ["slow"] for number in range(COUNT)}
    pack(tmp_path, web.url, fetching=Fetching(connections=12, per_host=3))
    assert web.busiest == 3


def test_a_slow_photo_does_not_hold_up_the_others_and_keeps_its_place(web: Web, plain: Corpus, tmp_path: Path) -> None:
    web.moods = {"/a/0.jpg": ["silent"]}
    done = threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(lambda: len(web.asked) < COUNT, False)])
    done.start()
    release = threading.Thread(target=lambda: (done.join(), web.release.set()))
    release.start()
    assert pack(tmp_path, web.url, fetching=Fetching(connections=4, timeout=20)).shards == plain.shards
    assert web.asked["/a/0.jpg"] == 1
    release.join()


def test_a_store_with_any_protocol_will_do(photos: Path, plain: Corpus, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in (photos / "a").iterdir():
        store.pipe_file(f"/media/a/{path.name}", path.read_bytes())
    assert pack(tmp_path, "memory://media").shards == plain.shards
    with pytest.raises(FileNotFoundError, match="media root memory://nowhere does not exist"):
        pack(tmp_path, "memory://nowhere")


def archive(path: Path, photos: Path) -> None:
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            tar.add(photos / "a", arcname="./a")
        return
    with zipfile.ZipFile(path, "w") as file:
        for number, photo in enumerate(sorted((photos / "a").iterdir())):
            kind = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            file.write(photo, f"a/{photo.name}", compress_type=kind)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("place", ["local", "web", "memory"])
def test_an_archive_is_a_media_root(photos: Path, plain: Corpus, tmp_path: Path, kind: str, place: str) -> None:
    file = tmp_path / f"photos.{kind}"
    archive(file, photos)
    root = str(file)
    if place == "memory":
        root = f"memory://bucket/photos.{kind}"
        fsspec.filesystem("memory").pipe_file(f"/bucket/photos.{kind}", file.read_bytes())
    if place == "web":
        server = Web(tmp_path)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"{server.url}/photos.{kind}"
    corpus = pack(tmp_path, root)
    if place == "web":
        server.shutdown()
        server.server_close()
    assert corpus.shards == plain.shards


def test_archives_in_a_folder_and_folders_in_an_archive(photos: Path, tmp_path: Path) -> None:
    archive(tmp_path / "one.tar", photos)
    archive(tmp_path / "two.zip", photos)
    corpus = pack(
        tmp_path, str(tmp_path), ["one.tar/a/1.jpg", "two.zip/a/2.jpg", "one.tar/a/99.jpg", "three.zip/x.jpg"]
    )
    assert [row["source"] for row in read_index(corpus, 0).to_pylist()] == ["one.tar/a/1.jpg", "two.zip/a/2.jpg"]
    assert failures(tmp_path) == {
        "one.tar/a/99.jpg": "not in the archive one.tar",
        "three.zip/x.jpg": "archive three.zip not found",
    }
    assert pack(tmp_path / "..", f"{tmp_path}/one.tar/a", ["3.jpg"]).samples == 1


def test_damage_in_an_archive_is_found(photos: Path, tmp_path: Path) -> None:
    archive(tmp_path / "photos.zip", photos)
    data = bytearray((tmp_path / "photos.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "photos.zip") as file:
        place = file.getinfo("a/5.jpg").header_offset
    data[place + 400] ^= 255
    (tmp_path / "photos.zip").write_bytes(data)
    corpus = pack(tmp_path, f"{tmp_path}/photos.zip")
    assert corpus.samples == COUNT - 1
    assert failures(tmp_path)["a/5.jpg"].startswith("damaged archive member")


@pytest.mark.parametrize(
    ("name", "message"), [("a.tar.gz", "gunzip it"), ("a.tgz", "gunzip it"), ("gone.zip", "does not exist")]
)
def test_an_archive_that_will_not_do_is_refused_at_once(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack(tmp_path, f"{tmp_path}/{name}")
    assert not os.path.exists(tmp_path / "out")


def test_a_cut_archive_says_so(photos: Path, tmp_path: Path) -> None:
    archive(tmp_path / "photos.zip", photos)
    (tmp_path / "photos.zip").write_bytes((tmp_path / "photos.zip").read_bytes()[:-50])
    pack(tmp_path, f"{tmp_path}/photos.zip")
    assert set(failures(tmp_path).values()) == {
        f"{tmp_path}/photos.zip cannot be read as an archive (File is not a zip file): is it complete?"
    }
