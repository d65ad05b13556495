"""Parquet is read in one module, without Arrow's threads, which may abort a process that ends while they run."""

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from places import ROOT

from runtime.errors import ROOMS
from sharding.build import build_corpus
from storage.parquet import ParquetError, parquet_file, read_batches, read_schema, read_table

# Functions of pyarrow and pandas that start threads by default.
READING = (
    r"\b(pq|pd|(pa|pyarrow)\.\w+)\.(ParquetDataset|ParquetFile|read_\w+)\(|pyarrow\.(dataset|csv|json|feather)|"
    r"\.group_by\(|from (pyarrow\.parquet|pandas) import"
)

RUN = """
import importlib, os, sys, threading, time

def foreign():  # threads that Python did not start
    return len(os.listdir("/proc/self/task")) - threading.active_count()

module = importlib.import_module(sys.argv[1])
import cv2, numpy, storage.parquet  # these start threads when they are imported, by some commands only later
before = foreign()
code = module.main(sys.argv[2:])
ends = time.monotonic() + 5  # Python counts a thread of its own that ends no longer, before the kernel does
while foreign() > before and time.monotonic() < ends:
    time.sleep(0.01)
sys.stderr.write(f"{code} {foreign() - before}")
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packed photos, and one that failed."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        Image.fromarray(np.full((40, 50, 3), number * 80, np.uint8)).save(folder / f"{number}.jpg")
    records = [{"image": f"{number}.jpg", "caption": f"text {number}"} for number in range(4)]
    (folder / "a.json").write_text(json.dumps(records))
    build_corpus([str(folder / "a.json")], str(folder), "image", str(folder / "out"), workers=1, max_failures=1.0)
    return folder / "out"


@pytest.mark.parametrize(
    "words",
    [
        ["sharding.verify"],
        ["sharding.verify", "--decode"],
        ["sharding.inspect"],
        ["sharding.inspect", "--stats"],
        ["sharding.inspect", "--failures"],
        ["sharding.inspect", "--sheet", "sheet.png", "--html", "page.html"],
    ],
    ids=" ".join,
)
def test_a_command_leaves_no_thread_of_arrow_behind(corpus: Path, tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, "-c", RUN, words[0], str(corpus), *words[1:]]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stderr.splitlines()[-1] == "0 0", done.stderr


ARCHIVE = """
import os, sys
from pathlib import Path
from sharding.media.archives import Archive
before = len(os.listdir("/proc/self/task"))
assert Archive(sys.argv[1], Path(sys.argv[2])).read("0.jpg")
assert Archive(sys.argv[1], Path(sys.argv[2])).read("1.jpg")
sys.exit(len(os.listdir("/proc/self/task")) - before)
"""


def test_listing_an_archive_leaves_no_thread_behind_either(corpus: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(2):
            archive.write(corpus.parent / f"{number}.jpg", f"{number}.jpg")
    command = [sys.executable, "-c", ARCHIVE, str(tmp_path / "a.zip"), str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)


def test_no_other_module_reads_parquet() -> None:
    paths = [path for folder in (*ROOMS, "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if re.search(READING, path.read_text())}
    assert found == {"storage/parquet.py"}


def test_a_file_is_read_from_a_path_bytes_or_an_open_file(tmp_path: Path) -> None:
    table = pa.table({"a": range(10_000), "b": ["x"] * 10_000})
    folder = tmp_path / "a=1"  # no column of its own, as pyarrow.dataset would make it
    folder.mkdir()
    pq.write_table(table, folder / "t.parquet")
    data = (folder / "t.parquet").read_bytes()
    for source in (folder / "t.parquet", str(folder / "t.parquet"), data, io.BytesIO(data)):
        assert read_table(source).equals(table)
        assert read_table(source, ["b"]).column_names == ["b"]
        with parquet_file(source) as file:
            assert pa.Table.from_batches(read_batches(file)).equals(table)
        assert read_schema(source).names == ["a", "b"]


def test_damage_is_a_one_line_error_and_errors_of_the_disk_stay(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": ["some text"] * 50}), buffer, write_page_checksum=True, compression="none")
    data = buffer.getvalue()
    for damaged in (b"", b"PAR1", data[:-9], b"\0" * 60 + data[60:], data.replace(b"text", b"next", 1)):
        with pytest.raises(ParquetError, match=r"\w") as error:
            read_table(damaged)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.parquet")
