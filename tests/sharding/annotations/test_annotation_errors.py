"""Unreadable annotations: one error line with file, row and remedy; filtered rows are counted by reason."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sharding.annotations.columns import Columns
from sharding.annotations.config import Reading, load_corpus
from sharding.annotations.reading import expanded, read_rows
from sharding.build import main

CAPTIONED = [{"image": "1.jpg", "caption": "one"}, {"image": "2.jpg", "caption": "two"}]


def sources(path: Path, **reading) -> list[str]:
    return [row.source for row in read_rows([str(path)], Reading(**reading))]


COCO = b'{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}'
QUESTION = b'[{"question_id": 1, "question": "x"}]'
TABLE = b"image,caption\n1.jpg,x\n"


@pytest.mark.parametrize(
    ("name", "content", "reading", "message"),
    [
        ("a.json", b"", {}, "a.json is empty"),
        ("a.csv", b"", {}, "a.csv is empty"),
        ("a.json", b"<html>404</html>", {}, "is not JSON: it begins with '<html>404"),
        ("a.json", b'{"images": [], "info": 1}', {}, "list of records, but is an object with images, info"),
        ("a.json", b'{"images": []}', {"records": "annotations"}, 'has no "annotations", but images: check --corpus'),
        ("a.json", b"[]", {"records": "images"}, "must be a JSON object, but is a list"),
        ("a.json", b'["a", "b"]', {}, "record 1: must be an object, not 'a'"),
        ("a.json", b'[{"caption": "x"}]', {}, 'record 1: no "image" or "video"; its columns are caption'),
        ("a.json", b'[{"image": "a", "start": 5, "end": 2, "caption": "x"}]', {}, "must be seconds, start first"),
        ("a.json", b'[{"image": "a", "start": "soon", "caption": "x"}]', {}, "must be seconds, start first"),
        ("a.csv", TABLE + b"2.jpg,caf\xe9\n", {}, "record 2: is not in utf-8 .byte 0xe9.: name"),
        ("a.csv", TABLE + b"2.jpg\n", {}, "record 2: has 1 fields where 2 columns are expected"),
        (
            "a.csv",
            b"image,text\n1.jpg,x\n",
            {},
            'record 1: no "caption"; its columns are image, text; name it',
        ),
        ("a.csv", TABLE, {"keep": {"split": "val"}}, 'record 1: no "split"; its columns are image'),
        ("a.csv", TABLE, {"encoding": "utf-9"}, "--encoding utf-9: unknown encoding"),
        ("a.parquet", b"PAR1 no", {}, "a.parquet is not a Parquet file, or damaged"),
        ("a.dat", b"x", {}, "its name does not show its format; set --format to one of auto, json"),
        ("a.json", b"[]", {"format": "jsno"}, "--format jsno: unknown format, nearest are json"),
        ("a.json", COCO, {"format": "coco"}, "image_id 5"),
        ("a.json", b'{"annotations": [{"image_id": 5}]}', {"format": "coco"}, 'has no "images", but annotations'),
        ("a.token", b"1.jpg#0 a man\n", {"format": "flickr"}, "record 1: must be FILE#NUMBER, a tab, the caption"),
        ("a.json", QUESTION, {"format": "activitynet_qa"}, "no file with their answers is given: add"),
        (
            "a.json",
            b'{"questions": [{"question_id": 1}]}',
            {"format": "vqa"},
            "no file with their answers is given: add",
        ),
    ],
)
def test_a_wrong_file_is_named_with_the_remedy(
    tmp_path: Path, name: str, content: bytes, reading, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        sources(tmp_path / name, **reading)
    assert str(tmp_path / name) in str(error.value) or "--format" in message or "--encoding utf" in message
    assert "\n" not in str(error.value)


def test_a_question_whose_answer_is_of_another_split_is_reported(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('[{"video_name": "a", "question": "x", "question_id": "a_1"}]')
    (tmp_path / "a.json").write_text('[{"answer": "yes", "question_id": "b_1"}]')
    with pytest.raises(ValueError, match=r"q.json, record 1: question_id 'a_1' has no answer in .*a.json: pass the"):
        list(read_rows([f"{tmp_path}/q.json", f"{tmp_path}/a.json"], Reading(format="activitynet_qa")))


def test_skip_bad_rows_counts_malformed_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,x\n2.jpg\n3.jpg,y,z\n4.jpg,\n,w\n5.jpg,v\n")
    rows = list(read_rows([str(tmp_path / "a.csv")], Reading(skip_bad_rows=True)))
    assert [row.source for row in rows if not row.filtered] == ["1.jpg", "5.jpg"]
    counts = Counter(row.filtered.partition(" fields")[0] for row in rows if row.filtered)
    assert counts == {"bad row: has N": 2, "no caption": 1, "no media path": 1}


def test_bad_rows_are_counted_by_column_and_the_error_names_the_flag(tmp_path: Path) -> None:
    records = [{"image": "1.jpg", "caption": 5}, {"image": "2.jpg", "text": "x"}, {"image": "3.jpg", "y": "it's"}]
    (tmp_path / "a.json").write_text(json.dumps([*CAPTIONED, *records]))
    with pytest.raises(ValueError, match=r'record 3: "caption" must be .*; --skip-bad-rows skips and counts such'):
        sources(tmp_path / "a.json")
    rows = list(read_rows([str(tmp_path / "a.json")], Reading(skip_bad_rows=True)))
    assert Counter(row.filtered for row in rows if row.filtered) == {
        'bad row: "caption" must be a text or a list of texts, not N': 1,
        'bad row: no "caption"': 2,
    }


@pytest.mark.parametrize("big", [0, 3000])
def test_invalid_json_is_reported_with_line_and_column(tmp_path: Path, big: int) -> None:
    good = "\n".join(json.dumps(CAPTIONED[0]) + "," for _ in range(big + 2))
    (tmp_path / "a.json").write_text(f'[\n{good}\n {{"image" "2.jpg"}}]')
    place = rf"line {big + 4}, column 17, after entry {big + 2}$"
    with pytest.raises(ValueError, match=rf"a.json is not JSON \(.*\): {place}"):
        sources(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('\n{"image": "1.jpg", "caption": "x"}\n\n{"image": }\n')
    with pytest.raises(ValueError, match=r"a.jsonl, record 2: line 4, column 11 is not JSON \(Expecting value\)"):
        sources(tmp_path / "a.jsonl")


def test_compressed_files_byte_order_marks_and_patterns_are_read(tmp_path: Path) -> None:
    (tmp_path / "1.json.gz").write_bytes(gzip.compress(json.dumps(CAPTIONED).encode()))
    (tmp_path / "2.csv").write_bytes("image;caption\r\n3.jpg;Zürich\r\n".encode("utf-8-sig"))
    (tmp_path / "3.json").write_bytes(json.dumps(CAPTIONED[:1]).encode("utf-8-sig"))
    (tmp_path / "4.csv").write_bytes("image,caption\n5.jpg,Zürich\n".encode("latin-1"))
    files = expanded([f"{tmp_path}/[1-3].*"])
    rows = list(read_rows(files, Reading()))
    assert [row.source for row in rows] == ["1.jpg", "2.jpg", "3.jpg", "1.jpg"]
    assert rows[2].captions == ("Zürich",)
    assert next(read_rows([str(tmp_path / "4.csv")], Reading(encoding="latin-1"))).captions == ("Zürich",)
    with pytest.raises(FileNotFoundError, match="no annotation file matches"):
        expanded([f"{tmp_path}/*.parquet"])
    assert expanded([f"file://{tmp_path}/2*"]) == [f"file://{tmp_path}/2.csv"]


def test_columns_are_templates_paths_and_alternatives(tmp_path: Path) -> None:
    record = {"folder": "a", "id": 7, "texts": [{"raw": "one"}, {"raw": "two"}], "box.x": "dotted", "when": {"s": 2}}
    (tmp_path / "a.json").write_text(json.dumps([record]))

    def row(**columns):
        return next(read_rows([str(tmp_path / "a.json")], Reading(columns=Columns(**columns))))

    assert row(media="{folder}/{id:06d}.jpg", caption="texts.raw").captions == ("one", "two")
    assert row(media="{folder}/{id:06d}.jpg", caption="texts.raw").source == "a/000007.jpg"
    assert row(media=["path", "folder"], caption="box.x", start="when.s", end=9).source == "a#t=2,9"
    with pytest.raises(ValueError, match=r'record 1: no "{folder}/{nr}.jpg"; its columns are folder, id'):
        row(media="{folder}/{nr}.jpg", caption="texts.raw")
    with pytest.raises(ValueError, match=r"template '\{folder' *: "):
        row(media="{folder")
    (tmp_path / "a.json").write_text(json.dumps([{"folder": "a", "id": "x7", "caption": "one"}]))
    with pytest.raises(ValueError, match=r"record 1: \"\{id:06d\}.jpg\" cannot be filled in"):
        row(media="{id:06d}.jpg")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colums: {media: x}", "unknown key 'colums': nearest are columns"),
        ("columns: {captoin: x}", "unknown key 'columns.captoin': nearest are columns.caption"),
        ("limit: many", r"limit is 'many' \(str\), must be a whole number"),
        ("- a", "is not a configuration"),
        ("a: [", "is not valid YAML: line"),
    ],
)
def test_an_invalid_yaml_is_reported_with_the_nearest_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A Parquet table about ten photos, two rows each, of two splits."""
    rows = [
        {"file": f"{number % 10}.jpg", "text": f"text {number}", "split": "train" if number % 10 < 6 else "val"}
        for number in range(20)
    ]
    rows += [{"file": "0.jpg", "text": " ", "split": "train"}, {"file": None, "text": "lost", "split": "train"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "media").mkdir()
    for number in range(10):
        Image.fromarray(np.full((48, 64, 3), number * 20, np.uint8)).save(tmp_path / "media" / f"{number}.jpg")
    return tmp_path


MAPPED = ["--columns", "media=file", "caption=text"]


def build(table: Path, *flags: str) -> int:
    common = ["--annotations", str(table / "a.parquet"), "--media-type", "image", "--media-root", str(table / "media")]
    return main([*common, "--output", str(table / "out"), "--workers", "1", *flags])


def test_the_account_counts_packed_failed_and_filtered_rows(table: Path, caplog) -> None:
    caplog.set_level("INFO", "sharding")
    (table / "media" / "2.jpg").write_bytes(b"")
    assert build(table, *MAPPED, "--keep", "split=train", "--limit", "5", "--max-failures", "0.5") == 0
    for line in (
        "22 rows = 8 packed + 2 failed + 12 filtered",
        "8 x filtered: split is not train",
        "2 x filtered: not about the first 5 media (--limit)",
        "1 x filtered: no caption",
        "1 x filtered: no media path",
        "5 media = 4 packed + 1 failed",
    ):
        assert line in caplog.text


def test_another_reading_of_the_same_file_is_another_corpus(table: Path, capsys) -> None:
    assert build(table, *MAPPED) == 0
    assert build(table, *MAPPED, "--keep", "split=val") == 2
    assert "has a corpus built with another reading" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--columns", "media=file", "captoin=text"], "there is no 'captoin', nearest is caption"),
        (["--columns", "media"], "--columns media: must be NAME=VALUE"),
        ([*MAPPED, "--keep", "split=test"], "all 22 rows of .* are filtered"),
        (["--corpus", "nowhere.yaml"], "--corpus nowhere.yaml does not exist; configs/corpora/ has the included"),
        ([*MAPPED, "--limit", "-1"], "--limit is -1"),
        ([*MAPPED, "--size", "4"], "--size must be at least 16"),
        ([*MAPPED, "--annotations", "nowhere.json"], "annotation file nowhere.json does not exist"),
        ([*MAPPED, "--media-root", "nowhere"], "media root nowhere does not exist"),
    ],
)
def test_wrong_flags_get_one_line(table: Path, capsys, flags: list[str], message: str) -> None:
    assert build(table, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_missing_required_flags_are_reported(table: Path, capsys) -> None:
    assert main(["--output", str(table / "out")]) == 2
    assert "--annotations is missing" in capsys.readouterr().err
    assert main(["--output", str(table / "out"), "--annotations", "x.json"]) == 2
    assert "--media-type is missing: give it, or a --corpus that sets it" in capsys.readouterr().err


def test_a_dry_run_of_what_would_fail_ends_with_an_error(table: Path, capsys) -> None:
    for media in (table / "media").glob("*.jpg"):
        media.write_bytes(b"no picture")
    assert build(table, *MAPPED, "--dry-run") == 1
    assert "media tried failed (100.0%, at most 5.0% allowed)" in capsys.readouterr().err
    assert build(table, *MAPPED, "--dry-run", "--max-failures", "1") == 0


def test_a_dry_run_estimates_what_a_build_gives_and_writes_nothing(table: Path, capsys) -> None:
    assert build(table, *MAPPED, "--dry-run") == 0
    assert not (table / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "22 rows = 20 to pack + 2 filtered"
    assert "10 media in 1 shards; 10 of them tried" in lines
    assert any(line.startswith("time: ") for line in lines)
    size, unit = next(line.split()[1:3] for line in lines if line.startswith("size: "))
    assert build(table, *MAPPED) == 0
    written = sum(path.stat().st_size for path in (table / "out").glob("out-*"))
    assert unit == "kB"
    assert float(size) == pytest.approx(written / 1e3, abs=60)
