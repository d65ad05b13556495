"""JSON as programs write it: invalid values are repaired, lines and lists are detected, errors are one line."""

import bz2
import gzip
import json
import lzma
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.annotations.columns import Columns
from sharding.annotations.config import Reading
from sharding.annotations.formats import json_text
from sharding.annotations.items import Row
from sharding.annotations.reading import read_rows

ZERO = '{"image": "0.jpg", "caption": "zero"}'
ONE = '{"image": "1.jpg", "caption": "one"}'


def rows(path: Path, content: str | bytes, **reading) -> list[Row]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows([str(path)], Reading(**reading)))


def error(path: Path, content: str | bytes, **reading) -> str:
    """What is said of a file; one line that names it."""
    with pytest.raises(ValueError, match=path.name) as raised:
        rows(path, content, **reading)
    assert "\n" not in str(raised.value)
    assert "codec" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("half", [r"\ud83d", r"\ude00", r"\uDE00", r"\ud83d\ud83d", r"\ude00\ud83d"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_half_a_surrogate_pair_is_a_question_mark(tmp_path: Path, name: str, half: str) -> None:
    marks = "?" * half.count("\\")
    record = f'{{"image": "caf{half}.jpg", "caption": "{half} \\ud83d\\ude00 \\\\ude00 {half}", "{half}": 1}}'
    text = f"[{ZERO}, {record}]" if name == "a.json" else f"{ZERO}\n{record}"
    assert rows(tmp_path / name, text)[1] == Row(f"caf{marks}.jpg", (f"{marks} 😀 \\ude00 {marks}",))
    assert rows(tmp_path / "b.json", r'[{"image": "\ud83d\u00e9.jpg", "caption": "x"}]')[0].source == "?é.jpg"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_nan_is_a_missing_value_and_numbers_may_have_any_size(tmp_path: Path, name: str) -> None:
    records = [
        '{"image": "0.jpg", "caption": "NaN", "score": [NaN, -Infinity, 1e999], "start": NaN, "end": NaN}',
        '{"image": "1.jpg", "caption": NaN}',
        '{"image": NaN, "caption": "x"}',
        '{"image": "3.jpg", "question": "Infinity?", "question_id": 12345678901234567890, "answer": [NaN, 2.0]}',
        '{"image": "4.jpg", "caption": "-9", "n": -9223372036854775809, "m": [1.5e300, 1e-999, 123456789012345678]}',
    ]
    found = rows(tmp_path / name, "[" + ", ".join(records) + "]" if name == "a.json" else "\n".join(records))
    assert [row.filtered or row.source for row in found] == ["0.jpg", "no caption", "no media path", "3.jpg", "4.jpg"]
    assert found[0].captions == ("NaN",)
    assert found[3].question["question_id"] == "12345678901234567890"
    assert found[3].question["answers"] == ["2"]


def test_identifiers_match_whatever_their_size_and_form(tmp_path: Path) -> None:
    images = '[{"id": 42.0, "file_name": "a.jpg"}, {"id": 12345678901234567890, "file_name": "b.jpg", "area": NaN}]'
    texts = '[{"image_id": 42, "caption": "x"}, {"image_id": 12345678901234567890, "caption": "y"}]'
    (tmp_path / "a.json").write_text(f'{{"images": {images}, "annotations": {texts}}}')
    found = list(read_rows([str(tmp_path / "a.json")], Reading(format="coco", columns=Columns(media="file_name"))))
    assert [(row.source, *row.captions) for row in found] == [("a.jpg", "x"), ("b.jpg", "y")]


def test_json_lines_and_lists_are_detected_whatever_the_file_name(tmp_path: Path) -> None:
    expected = [Row("0.jpg", ("zero",)), Row("1.jpg", ("one",))]
    for lines in (f"{ZERO}\n{ONE}\n", f"{ZERO}\r\n{ONE}"):
        assert rows(tmp_path / "a.json", lines) == expected
    for text in (f"[{ZERO},\n{ONE}]", f"\n [\n{ZERO}, {ONE}\n]"):
        assert rows(tmp_path / "a.jsonl", text) == expected
        assert rows(tmp_path / "a.txt", text, format="jsonl") == expected
    assert "must be a JSON list of records, but is an object with image, caption" in error(tmp_path / "a.json", ZERO)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{ZERO}", "truncated: is it complete"),
        (f"[{ZERO}, {ONE[:20]}", r"after entry 1"),
        (f"[{ZERO}][{ONE}]", "several lists a file each"),
        (f"[{ZERO},]", "unallowed token"),
        (f"[{ZERO.replace(chr(34), chr(39))}]", "invalid char"),
        (f"[{ZERO}, // no\n{ONE}]", "comments are not enabled"),
        (f"[{ZERO}]\0\0", "more follows behind its end"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (b'[{"image": "caf\xe9.jpg"}]', "not in UTF-8: save it so"),
        (b'[{"image": "\xed\xa0\x80.jpg"}]', "not in UTF-8: save it so"),
        (f"[{ZERO}]".encode("utf-16-le"), "is in UTF-16: save it as UTF-8"),
    ],
)
def test_invalid_json_is_reported_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in error(tmp_path / "a.json", text)


def test_a_malformed_line_affects_no_other_line(tmp_path: Path) -> None:
    bad = [b"\xff\xfe", b"[" * 100_000, b'{"image": "\xed\xa0\x80"}', b"{'image': 1}", b"7", b"\0\0"]
    content = b"\n".join([ZERO.encode(), *bad, ONE.encode()])
    found = rows(tmp_path / "a.jsonl", content, skip_bad_rows=True)
    assert [row.source for row in found if not row.filtered] == ["0.jpg", "1.jpg"]
    assert len(found) == len(bad) + 2
    assert "a.jsonl, record 2: line 2 is not in UTF-8 (byte 0xff)" in error(tmp_path / "a.jsonl", content)


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_a_damaged_compressed_file_is_reported(tmp_path: Path, ending: str, pack: Callable) -> None:
    data = pack(json.dumps([{"image": f"{n}.jpg", "caption": str(n * 7919)} for n in range(999)]).encode())
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    for content in (data[: len(data) // 2], bytes(flipped), ZERO):
        assert "cannot be decompressed" in error(tmp_path / f"a.json.{ending}", content)
    assert len(rows(tmp_path / f"a.json.{ending}", data)) == 999
    assert len(rows(tmp_path / f"a.jsonl.{ending}", pack(f"{ZERO}\n{ONE}\n".encode()))) == 2


def test_a_zip_of_one_file_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.json.zip", "w") as archive:
        archive.writestr("a.json", f"[{ZERO}]")
    assert list(read_rows([str(tmp_path / "a.json.zip")], Reading())) == [Row("0.jpg", ("zero",))]
    assert "cannot be decompressed" in error(tmp_path / "b.json.zip", "PK")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.text('ab"\\', max_size=3), VALUES, max_size=4), max_size=6), st.integers(1, 40))
def test_json_written_by_python_is_read_with_any_block_size(tmp_path_factory, records, block) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    kept = [{"image": f"{n}.jpg", "caption": json.dumps(each), "more": each} for n, each in enumerate(records)]
    kept.append({"image": "last.jpg", "caption": "\ud800 NaN", "more": math.nan})  # so that it has to be mended
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "BLOCK", block)
        found = rows(path, json.dumps(kept))
    assert [(row.source, *row.captions) for row in found[:-1]] == [
        (each["image"], each["caption"]) for each in kept[:-1]
    ]
    assert found[-1] == Row("last.jpg", ("? NaN",))
