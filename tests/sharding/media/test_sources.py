"""Sources of media: web servers with transient errors, stores, archives; failures are reported with a reason."""

import json
import os
import shutil
import tarfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from packed import failures_of, rows_of, write_photos
from web_servers import Handler, serving

from sharding.build import build_corpus
from sharding.shards.schema import Corpus
from storage.fetching import Fetching

COUNT = 40
QUICK = Fetching(connections=8, per_host=4, attempts=4, timeout=1.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("sources"), COUNT, (8, 8), (90, 70))


@pytest.fixture(scope="module")
def plain(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Packed from local files: what every other way must give."""
    return pack(tmp_path_factory.mktemp("plain"), str(photos))


def pack(tmp_path: Path, root: str, names: list[str] | None = None, **settings) -> Corpus:
    names = names or [f"{number}.jpg" for number in range(COUNT)]
    (tmp_path / "a.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    options = {"size": 48, "workers": 1, "name": "x", "fetching": QUICK, "max_failures": 1.0} | settings
    return build_corpus([str(tmp_path / "a.json")], root, "image", str(tmp_path / "out"), **options)


class Answer(Handler):
    """A file of the server's folder, or 404; `answers[path]` is the list of what its first answers are, instead."""

    server: Any

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            answer = (self.server.answers.get(self.path) or ["good"]).pop(0)
        try:
            self.send(answer)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def send(self, answer: str) -> None:
        file = self.server.folder / self.path.lstrip("/")
        if answer.isdigit() or not file.is_file():
            return self.say(int(answer) if answer.isdigit() else 404)
        if answer == "silent":
            self.server.release.wait(10)
        elif answer == "slow":
            time.sleep(0.05)
        elif answer == "cut":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", str(file.stat().st_size))
            self.end_headers()
            return self.wfile.write(file.read_bytes()[:200])
        return self.say(200, file.read_bytes())


@pytest.fixture
def web(photos: Path):
    state = {"folder": photos, "answers": {}, "asked": Counter(), "busy": 0, "busiest": 0}
    with serving(Answer, **state, lock=threading.Lock(), release=threading.Event()) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        server.handle_error = lambda *_: None  # a client that went away is no news
        yield server
        server.release.set()


def test_transient_errors_are_retried(web, plain: Corpus, tmp_path: Path) -> None:
    web.answers = {
        "/3.jpg": ["503", "500"],
        "/5.jpg": ["cut", "429"],
        "/7.jpg": ["silent"],
        "/9.jpg": ["502", "cut", "504"],
    }
    assert pack(tmp_path, web.url).shards == plain.shards
    assert [web.asked[f"/{number}.jpg"] for number in (3, 5, 7, 9, 11)] == [3, 3, 2, 4, 1]


def test_failed_downloads_are_reported_with_their_reason(web, tmp_path: Path) -> None:
    web.answers = {"/1.jpg": ["403"], "/2.jpg": ["503"] * 9, "/3.jpg": ["cut"] * 9, "/4.jpg": ["silent"] * 9}
    names = [f"{web.url}/{number}.jpg" for number in range(6)]
    gone = [f"{web.url}/none.jpg", "http://127.0.0.1:9/x.jpg", "http://no-such-host.invalid/x.jpg"]
    corpus = pack(tmp_path, "", names + gone, fetching=Fetching(attempts=2, timeout=0.5))
    assert corpus.samples == 2
    found = failures_of(tmp_path / "out")
    assert found.pop(gone[2]).startswith(("host not found: no-such-host.invalid", "HTTP"))
    assert found == {
        names[1]: "HTTP 403 Forbidden",
        names[2]: "HTTP 503 Service Unavailable",
        names[3]: "connection closed early",
        names[4]: "timed out",
        gone[0]: "file not found",
        gone[1]: "cannot connect to 127.0.0.1:9",
    }
    assert web.asked["/1.jpg"] == web.asked["/none.jpg"] == 1  # what is refused is not asked for again
    assert web.asked["/2.jpg"] == 2


def test_connections_per_host_are_limited(web, tmp_path: Path) -> None:
    web.answers = {f"/{number}.jpg": ["slow"] for number in range(COUNT)}
    pack(tmp_path, web.url, fetching=Fetching(connections=12, per_host=3))
    assert web.busiest == 3


def test_a_slow_download_blocks_no_other_and_keeps_its_position(web, plain: Corpus, tmp_path: Path) -> None:
    web.answers = {"/0.jpg": ["silent"]}

    def release_when_all_are_asked_for() -> None:
        while len(web.asked) < COUNT:
            time.sleep(0.01)
        web.release.set()

    release = threading.Thread(target=release_when_all_are_asked_for)
    release.start()
    assert pack(tmp_path, web.url, fetching=Fetching(connections=4, timeout=20)).shards == plain.shards
    assert web.asked["/0.jpg"] == 1
    release.join()


def test_media_are_read_from_any_fsspec_store(photos: Path, plain: Corpus, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(photos), "/media", recursive=True)
    assert pack(tmp_path, "memory://media").shards == plain.shards
    with pytest.raises(FileNotFoundError, match="media root memory://nowhere does not exist"):
        pack(tmp_path, "memory://nowhere")


def archive(path: Path, photos: Path) -> Path:
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            tar.add(photos, arcname=".")
        return path
    with zipfile.ZipFile(path, "w") as file:
        for number, photo in enumerate(sorted(photos.iterdir())):
            kind = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            file.write(photo, photo.name, compress_type=kind)
    return path


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("place", ["local", "web", "memory"])
def test_an_archive_is_a_media_root(
    photos: Path, plain: Corpus, tmp_path: Path, kind: str, place: str, request: pytest.FixtureRequest
) -> None:
    root = str(archive(tmp_path / f"photos.{kind}", photos))
    if place == "memory":
        fsspec.filesystem("memory").put_file(root, f"/bucket/photos.{kind}")
        root = f"memory://bucket/photos.{kind}"
    if place == "web":
        (tmp_path / "served").mkdir()
        shutil.move(root, tmp_path / "served")
        root = request.getfixturevalue("http").fill(tmp_path / "served", "served") + f"/photos.{kind}"
    assert pack(tmp_path, root).shards == plain.shards


def test_archives_in_a_folder_and_folders_in_an_archive(photos: Path, tmp_path: Path) -> None:
    archive(tmp_path / "one.tar", photos.parent)
    archive(tmp_path / "two.zip", photos)
    names = ["one.tar/photos/1.jpg", "two.zip/2.jpg", "one.tar/photos/99.jpg", "three.zip/x.jpg"]
    pack(tmp_path, str(tmp_path), names)
    assert [row["source"] for row in rows_of(tmp_path / "out")] == names[:2]
    assert failures_of(tmp_path / "out") == {
        names[2]: "not in the archive one.tar",
        names[3]: "archive three.zip not found",
    }
    (tmp_path / "inner").mkdir()
    assert pack(tmp_path / "inner", f"{tmp_path}/one.tar/photos", ["3.jpg"]).samples == 1


def test_damage_in_an_archive_is_found(photos: Path, tmp_path: Path) -> None:
    path = archive(tmp_path / "photos.zip", photos)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        data[file.getinfo("5.jpg").header_offset + 400] ^= 255
    path.write_bytes(data)
    assert pack(tmp_path, str(path)).samples == COUNT - 1
    assert failures_of(tmp_path / "out")["5.jpg"].startswith("damaged archive member")


@pytest.mark.parametrize(
    ("name", "message"), [("a.tar.gz", "gunzip it"), ("a.tgz", "gunzip it"), ("gone.zip", "does not exist")]
)
def test_an_unusable_archive_is_an_error_before_the_build(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack(tmp_path, f"{tmp_path}/{name}")
    assert not os.path.exists(tmp_path / "out")


def test_a_truncated_archive_is_reported(photos: Path, tmp_path: Path) -> None:
    path = archive(tmp_path / "photos.zip", photos)
    path.write_bytes(path.read_bytes()[:-50])
    pack(tmp_path, str(path))
    assert set(failures_of(tmp_path / "out").values()) == {
        f"{path} cannot be read as an archive (File is not a zip file): is it complete?"
    }
