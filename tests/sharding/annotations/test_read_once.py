"""A build opens each annotation file once, whatever its format, and notes the SHA-256 of all of them."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import Faults
from object_stores import MakeFaulty, Store
from packed import write_photos

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
    write_photos(tmp_path, 3, (64, 48))
    return tmp_path


def build(corpus: Path, files: list[str], flags: list[str]) -> None:
    words = ["--annotations", *files, "--media-root", str(corpus / "photos"), "--media-type", "image", *flags]
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


def test_a_remote_file_is_fetched_once(corpus: Path, http: Store, faulty: MakeFaulty) -> None:
    (corpus / "remote").mkdir()
    (corpus / "remote" / "coco.json").write_text(json.dumps(COCO))
    http.fill(corpus / "remote", "remote")
    proxy = faulty(http, Faults())
    build(corpus, [http.url("remote/coco.json", proxy)], FILES["coco"][1])
    assert [seen.path.rpartition("/")[2] for seen in proxy.log if seen.method == "GET"] == ["coco.json"]
    assert len(list((corpus / "out").iterdir())) == 5
