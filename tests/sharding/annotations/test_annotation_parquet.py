"""Parquet as Spark, pandas, Polars and Hugging Face write it: values as meant, or a row error with the remedy."""

import datetime
import decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.annotations.columns import Columns
from sharding.annotations.config import Reading
from sharding.annotations.items import Row
from sharding.annotations.reading import read_rows

PLAIN = {"image": ["0.jpg", "1.jpg"], "caption": ["zero", "one"]}
EXPECTED = [Row("0.jpg", ("zero",)), Row("1.jpg", ("one",))]


def rows(path: Path, table: pa.Table | dict, **reading) -> list[Row]:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path / "a.parquet")
    return list(read_rows([str(path / "a.parquet")], Reading(**reading)))


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"x"]).buffers())
OTHERS = {
    "nanoseconds": pa.array([1234567891, None], pa.timestamp("ns")),
    "far away": pa.array([2**62, 0], pa.timestamp("us")),
    "durations": pa.array([1, 2], pa.duration("ns")),
    "times": pa.array([1, 2], pa.time64("ns")),
    "not UTF-8": NOT_UTF8,
    "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
    "decimal": pa.array([decimal.Decimal("1.5"), None]),
    "nested": pa.array([{"a": [{"b": b"\xff"}]}, None]),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "uuid": pa.array([b"0" * 16, b"1" * 16], pa.uuid()),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_unused_columns_of_any_type_are_ignored(tmp_path: Path, kind: str) -> None:
    assert rows(tmp_path, {**PLAIN, "other": OTHERS[kind]}) == EXPECTED
    with pytest.raises(ValueError, match=r'record 1: no "text"; its columns are image, caption, other'):
        rows(tmp_path, {**PLAIN, "other": OTHERS[kind]}, columns=Columns(caption="text"))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_texts_of_every_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({name: pa.array(values, pa.string()).cast(kind) for name, values in PLAIN.items()})
    assert rows(tmp_path, table) == EXPECTED


def test_a_text_that_is_not_utf_8_is_an_error_of_its_row(tmp_path: Path) -> None:
    table = {"image": ["0.jpg", "1.jpg"], "caption": NOT_UTF8}
    with pytest.raises(ValueError, match=r'a.parquet, record 1: "caption" is not in UTF-8 \(byte 0xe9\)'):
        rows(tmp_path, table)
    assert [bool(row.filtered) for row in rows(tmp_path, table, skip_bad_rows=True)] == [True, False]


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ([b"0.jpg"], r"media must be a text, not b'0.jpg'"),
        ([True], "media must be a text, not True"),
        ([datetime.date(2020, 1, 1)], r"media must be a text, not datetime.date"),
        ([["0.jpg", "1.jpg"]], r"media must be one path or URL, not 2 .*write one record for each"),
        ([{"bytes": b"JPEG", "path": "0.jpg"}], r"media must be .* not the file's bytes in the table.*write each to a"),
        ([[{"bytes": b"JPEG", "path": None}]], r"media must be .* not the file's bytes in the table"),
    ],
)
def test_an_invalid_media_value_is_a_row_error(tmp_path: Path, media: list, message: str) -> None:
    with pytest.raises(ValueError, match=r"a.parquet, record 1: " + message):
        rows(tmp_path, {"image": media, "caption": ["zero"]})
    assert rows(tmp_path, {"image": media, "caption": ["zero"]}, skip_bad_rows=True)[0].filtered


@pytest.mark.parametrize("media", [["0.jpg"], [["0.jpg"]], [{"bytes": None, "path": "0.jpg"}], [[{"path": "0.jpg"}]]])
def test_a_media_value_with_one_name_is_that_name(tmp_path: Path, media: list) -> None:
    assert rows(tmp_path, {"image": media, "caption": ["zero"]}) == EXPECTED[:1]


@pytest.mark.parametrize("name", ["caption", "question", "answer", "question_id"])
def test_bytes_are_not_accepted_as_text(tmp_path: Path, name: str) -> None:
    table = {"image": ["0.jpg"], **({} if name == "caption" else {"question": ["what?"]}), name: [b"x"]}
    with pytest.raises(ValueError, match=rf'record 1: "{name}" must be a text.*, not b\'x\''):
        rows(tmp_path, table)


def test_whole_numbers_in_columns_of_floats_are_whole(tmp_path: Path) -> None:
    nan = float("nan")
    table = {"image": [7.0, 1e5], "question": ["a?", "b?"], "question_id": [42.0, nan], "answer": [2.0, 2.5]}
    found = rows(tmp_path, {**table, "start": [nan, 1.5], "end": [nan, None], "split": [1.0, 1.0]}, keep={"split": "1"})
    assert [row.source for row in found] == ["7", "100000#t=1.5"]
    assert [row.question["question_id"] for row in found] == ["42", ""]
    assert [row.question["answers"] for row in found] == [["2"], ["2.5"]]
    columns = Columns(media="{image}/{image:06d}.jpg", caption="question", question="")
    assert rows(tmp_path, table, columns=columns)[0].source == "7/000007.jpg"
    choice = {"image": ["0.jpg", "1.jpg"], "caption": [["a", "b"], ["c"]], "answer": [1.0, nan]}
    assert [row.choice["answer"] for row in rows(tmp_path, choice, columns=Columns(options="caption"))] == [1, -1]


def test_ids_of_a_csv_that_pandas_wrote_as_floats_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "image,question,question_id\n0.jpg,a?,42.0\n1.jpg,b?,\n2.jpg,c?,v1.0\n3.jpg,d?,1e+16\n"
    )
    found = [row.question["question_id"] for row in read_rows([str(tmp_path / "a.csv")], Reading())]
    assert found == ["42", "", "v1.0", "10000000000000000"]


def test_duplicate_column_names_are_an_error_if_used(tmp_path: Path) -> None:
    arrays = [pa.array(["0.jpg"]), pa.array(["a"]), pa.array(["b"])]
    with pytest.raises(ValueError, match=r'a.parquet has 2 columns named "caption": rename all but one'):
        rows(tmp_path, pa.Table.from_arrays(arrays, ["image", "caption", "caption"]))
    arrays = [pa.array(["0.jpg"]), pa.array(["zero"]), pa.array(["b"]), pa.array(["c"])]
    assert rows(tmp_path, pa.Table.from_arrays(arrays, ["image", "caption", "x", "x"])) == EXPECTED[:1]
