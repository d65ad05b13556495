"""Names below a web server are file names with any characters; URL schemes may be in upper case."""

import functools
import io
import json
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from web_servers import Handler, serving

from sharding.build import build_corpus
from sharding.media.sources import web_address
from sharding.shards.schema import read_index

NAMES = ["a#b?.jpg", "a b%20c.jpg", "c/100%.jpg", "d+e&f=g;h,i.jpg", "é日.jpg", "?x=1", "%2e.jpg", "it's (1) [2]~.jpg"]


class Files(Handler, SimpleHTTPRequestHandler):
    pass


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), shade, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server with a photo of its own shade for each of NAMES."""
    folder = tmp_path / "web" / "my dir"
    (folder / "c").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(picture(number * 30))
    with serving(functools.partial(Files, directory=str(tmp_path / "web"))) as web:
        yield f"http://127.0.0.1:{web.server_port}"


def packed(tmp_path: Path, names: list[str], root: str, annotations: str = "") -> dict[str, float]:
    """The mean shade of each source that was packed; none may fail."""
    (tmp_path / "a.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    out = tmp_path / "out"
    corpus = build_corpus([annotations or str(tmp_path / "a.json")], root, "image", str(out), workers=1, max_failures=1)
    assert pq.read_table(out / "failures.parquet").to_pylist() == []
    tar = (out / corpus.shards[0].name).read_bytes()
    found = {}
    for row in read_index(corpus, 0).to_pylist():
        frame = Image.open(io.BytesIO(tar[row["offsets"][0] :][: row["sizes"][0]]))
        found[row["source"]] = float(np.asarray(frame).mean())
    return found


@pytest.mark.parametrize("root", ["my dir", "my%20dir/"])
def test_names_below_a_web_server_are_quoted(tmp_path: Path, server: str, root: str) -> None:
    found = packed(tmp_path, NAMES, f"{server.replace('http', 'HTTP')}/{root}")
    assert found == {name: pytest.approx(number * 30, abs=2) for number, name in enumerate(NAMES)}


def test_a_name_that_is_already_quoted_is_not_found_with_a_remedy(tmp_path: Path, server: str) -> None:
    names = ["c/100%25.jpg", "d+e&f=g;h,i.jpg", "none.jpg"]
    (tmp_path / "a.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    out = str(tmp_path / "out")
    build_corpus([str(tmp_path / "a.json")], f"{server}/my dir", "image", out, workers=1, max_failures=1)
    said = {row["source"]: row["reason"] for row in pq.read_table(f"{out}/failures.parquet").to_pylist()}
    assert said == {
        "c/100%25.jpg": "file not found (names are quoted when they are sent: write 'c/100%.jpg'?)",
        "none.jpg": "file not found",
    }


def test_a_source_that_is_a_url_is_not_changed(tmp_path: Path, server: str) -> None:
    url = f"{server.replace('http', 'Http')}/my%20dir/%C3%A9%E6%97%A5.jpg?size=1#t"
    assert packed(tmp_path, [url], f"{server}/elsewhere") == {url: pytest.approx(120, abs=2)}


def test_schemes_may_be_in_upper_case(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(picture(30))
    root = f"File://{tmp_path}"
    assert packed(tmp_path, ["1.jpg", f"FILE://{tmp_path}/1.jpg"], root, f"{root}/a.json") == {
        "1.jpg": pytest.approx(30, abs=2),
        f"FILE://{tmp_path}/1.jpg": pytest.approx(30, abs=2),
    }


@pytest.mark.parametrize(
    ("root", "name", "address"),
    [
        ("http://h/d", "a#b?.jpg", "http://h/d/a%23b%3F.jpg"),
        ("http://h/d/", "a b.tar/c d#.jpg", "http://h/d/a%20b.tar/c d#.jpg"),
        ("http://h/a.zip", "c d#.jpg", "http://h/a.zip/c d#.jpg"),
        ("http://h/a.tar/in", "c d#.jpg", "http://h/a.tar/in/c d#.jpg"),
        ("http://h", "a/b.jpg", "http://h/a/b.jpg"),
    ],
)
def test_members_of_archives_keep_their_names(root: str, name: str, address: str) -> None:
    assert web_address(root, name) == address
