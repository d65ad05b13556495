"""A build opens each annotation file once, whatever its format, and notes the SHA-256 of all of them."""

import gzip
import hashlib
import json
import os
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sharding.build import main

RECORDS = [{"image": f"{number}.jpg", "caption": f"number {number}"} for number in range(3)]
LINES = "\n".join(map(json.dumps, RECORDS))
COCO = {
    "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)],
    "annotations": [{"image_id": number, "caption": f"number {number}"} for number in range(3)],
}
QUESTIONS = {"data_subtype": "val", "questions": [{"question_id": n, "question": "what?"} for n in range(3)]}
ANSWERS = {"annotations": [{"question_id": n, "image": f"{n}.jpg", "answer": "x"} for n in range(3)]}
FILES: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "list": ({"a.json": json.dumps(RECORDS).encode()}, []),
    "list that has to be mended": ({"a.json": json.dumps([*RECORDS, {"image": None, "x": float("nan")}]).encode()}, []),
    "lines": ({"a.jsonl": LINES.encode(), "b.json": LINES.encode(), "c.json": json.dumps(RECORDS).encode()}, []),
    "table": ({"a.csv": b"image,caption\n0.jpg,x\n1.jpg,y\n"}, []),
    "parquet": ({}, []),
    "compressed": ({"a.json.gz": gzip.compress(json.dumps(RECORDS).encode())}, []),
    "coco": ({"a.json": json.dumps(COCO).encode()}, ["--format", "coco", "--columns", "media=file_name"]),
    "vqa": (
        {"b.json": json.dumps(QUESTIONS).encode(), "a.json": json.dumps(ANSWERS).encode()},
        ["--format", "vqa", "--columns", "media=image"],
    ),
}

opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "media").mkdir()
    for number in range(3):
        Image.fromarray(np.full((48, 64, 3), number * 80, np.uint8)).save(tmp_path / "media" / f"{number}.jpg")
    return tmp_path


def build(corpus: Path, files: list[str], flags: list[str]) -> None:
    words = ["--annotations", *files, "--media-root", str(corpus / "media"), "--media-type", "image", *flags]
    assert main([*words, "--output", str(corpus / "out"), "--workers", "1"]) == 0


@pytest.mark.parametrize("form", FILES)
def test_each_file_is_opened_once(corpus: Path, form: str) -> None:
    contents, flags = FILES[form]
    for name, data in contents.items():
        (corpus / name).write_bytes(data)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), corpus / "a.parquet")
    files = [str(corpus / name) for name in contents or ["a.parquet"]]
    opened.clear()
    build(corpus, files, flags)
    assert {file: opened.count(file) for file in files} == dict.fromkeys(files, 1)
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    assert json.loads((corpus / "out" / "build.json").read_text())["annotations_sha256"] == digest


def test_a_remote_file_is_fetched_once(corpus: Path) -> None:
    (corpus / "coco.json").write_text(json.dumps(COCO))
    fetched = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(corpus))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            fetched.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/coco.json"
    build(corpus, [url], FILES["coco"][1])
    server.shutdown()
    assert fetched == ["/coco.json"]
    assert len(os.listdir(corpus / "out")) == 5
