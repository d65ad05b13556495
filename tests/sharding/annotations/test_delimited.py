"""CSV and TSV: unclosed quotes swallow no rows, valid rows are read unchanged, each row is counted."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.annotations.columns import Columns
from sharding.annotations.config import Reading
from sharding.annotations.reading import read_rows

HEAD = "image,caption\n"


def outcome(tmp_path: Path, text: str | bytes, name: str = "a.csv", **reading) -> list[tuple[str, ...]]:
    """(source, captions ...) of each row, or ("bad row", reason)."""
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = read_rows([str(tmp_path / name)], Reading(skip_bad_rows=True, **reading))
    return [tuple(row.filtered.split(": ", 1)) if row.filtered else (row.source, *row.captions) for row in rows]


@pytest.mark.parametrize(
    ("body", "good", "bad"),
    [
        ('0.jpg,zero\n1.jpg,"a 5 foot man\n2.jpg,two\n3.jpg,three\n', [0, 2, 3], {2: "opened and never closed"}),
        ('0.jpg,zero\n1.jpg,one\n2.jpg,"a man\n', [0, 1], {3: "opened and never closed"}),
        ('0.jpg,zero\n1.jpg,"a man', [0], {2: "opened and never closed"}),
        ('0.jpg,"a man\n1.jpg,"one"\n2.jpg,two\n', [1, 2], {1: "opened and never closed"}),
        ('0.jpg,"a man\n1.jpg,who is 6 foot 3"\n2.jpg,two\n', [1, 2], {1: "closed only in a later row"}),
        ('0.jpg,zero\n1.jpg,"a "big" dog"\n2.jpg,two\n', [0, 2], {2: "must be doubled"}),
        ('0.jpg,zero\r1.jpg,"one\r2.jpg,two\r', [0, 2], {2: "opened and never closed"}),
        ('0.jpg,"a \\"big\\" dog"\n1.jpg,one\n', [1], {1: "must be doubled"}),
        ('0.jpg,"a man\n1.jpg,one\n\n2.jpg,two" \n3.jpg,x\n', [1, 2, 3], {1: "closed only in a later row"}),
        ('0.jpg,"a\n1.jpg,"b\n2.jpg,"c\n3.jpg,"d\n', [], {1: "never closed", 2: "", 3: "", 4: "never closed"}),
    ],
)
def test_an_unclosed_quote_affects_only_its_row(tmp_path: Path, body: str, good: list[int], bad) -> None:
    found = outcome(tmp_path, HEAD + body)
    assert [row[0] for row in found if row[0].endswith(".jpg")] == [f"{n}.jpg" for n in good]
    number, reason = next(iter(bad.items()))
    with pytest.raises(ValueError, match=rf"a.csv, record {number}: a quote .*{reason}") as error:
        list(read_rows([str(tmp_path / "a.csv")], Reading()))
    assert "\n" not in str(error.value)
    for number, reason in bad.items():
        assert found[number - 1][0] == "bad row"
        assert reason in found[number - 1][1]


def test_rows_inside_a_quote_are_detected_if_media_is_the_last_column(tmp_path: Path) -> None:
    body = '"a man,clip1.mp4\nsix foot 3",clip2.mp4\na dog,clip3.mp4\n'
    found = outcome(tmp_path, "caption,video\n" + body)
    assert found[0] == (
        "bad row",
        "a quote is opened, and closed only in a later row: close it, or double it where it is part of the text",
    )
    assert found[-1] == ("clip3.mp4", "a dog")


@pytest.mark.parametrize(
    ("body", "captions"),
    [
        ('0.jpg,a 5" tall dog\n1.jpg,"one, two"\n', ['a 5" tall dog', "one, two"]),
        (
            '0.jpg,"two\nlines, with a comma\n\nand 3 more"\n1.jpg,one\n',
            ["two\nlines, with a comma\n\nand 3 more", "one"],
        ),
        ('0.jpg,"a ""big"" dog"\n1.jpg,"""quoted"""\n', ['a "big" dog', '"quoted"']),
        ('0.jpg,"blanks behind"  \n1.jpg,"and" \r\n', ["blanks behind", "and"]),
        ("0.jpg,zero\r\n1.jpg,one\r\n", ["zero", "one"]),
        ("0.jpg,zero\r1.jpg,one", ["zero", "one"]),
        ('0.jpg,"in line1\r\nor line2"\r\n1.jpg,"line1\nline2"\n', ["in line1\r\nor line2", "line1\nline2"]),
        ('0.jpg,"it shows:\n1.jpg, a dog\n2.jpg, a cat"\n', ["it shows:\n1.jpg, a dog\n2.jpg, a cat"]),
        ('0.jpg,"it shows:\n1.jpg,dog\nand more"\n', ["it shows:\n1.jpg,dog\nand more"]),
        ('0.jpg,"1. open\n2. close, then wait 2.5 s"\n1.jpg,x\n', ["1. open\n2. close, then wait 2.5 s", "x"]),
    ],
)
def test_valid_rows_are_read_unchanged(tmp_path: Path, body: str, captions: list[str]) -> None:
    assert outcome(tmp_path, HEAD + body) == [(f"{n}.jpg", caption) for n, caption in enumerate(captions)]


def test_a_caption_of_several_lines_may_come_first(tmp_path: Path) -> None:
    body = '"line1, x\nline2, y",0.jpg\n"see\nb1.jpg, b2.jpg\nand so on",1.jpg\n'
    captions = ["line1, x\nline2, y", "see\nb1.jpg, b2.jpg\nand so on"]
    assert outcome(tmp_path, "caption,image\n" + body) == [(f"{n}.jpg", text) for n, text in enumerate(captions)]


@pytest.mark.parametrize("body", ['0.jpg,"Hello" he said\n', '"0.jpg"\t,"Hello" he said\n'])
def test_text_behind_a_closing_quote_is_read_as_pandas_does(tmp_path: Path, body: str) -> None:
    assert outcome(tmp_path, HEAD + body) == [("0.jpg", "Hello he said")]


def test_quotes_of_a_tsv_are_text(tmp_path: Path) -> None:
    body = 'image\tcaption\n0.jpg\t"a 5 foot man\n1.jpg\tsix "big" dogs"\n'
    assert outcome(tmp_path, body, "a.tsv") == [("0.jpg", '"a 5 foot man'), ("1.jpg", 'six "big" dogs"')]


def test_the_header_may_hold_other_delimiters_and_names_twice(tmp_path: Path) -> None:
    text = '"image, path, or URL";caption;;\n0.jpg;a, b;;\n'
    assert outcome(tmp_path, text, columns=Columns(media="image, path, or URL")) == [("0.jpg", "a, b")]
    with pytest.raises(ValueError, match=r'a.csv has 2 columns named "caption": rename all but one'):
        outcome(tmp_path, "image,caption,caption\n0.jpg,a,b\n")
    with pytest.raises(ValueError, match=r"a.csv, its first line: a quote is opened and never closed"):
        outcome(tmp_path, 'image,"caption\n0.jpg,a\n')
    with pytest.raises(ValueError, match="--delimiter '::': must be one character"):
        outcome(tmp_path, HEAD, delimiter="::")


def test_a_row_in_another_encoding_is_malformed_and_utf_16_is_reported(tmp_path: Path) -> None:
    found = outcome(tmp_path, HEAD.encode() + b"0.jpg,caf\xe9\n1.jpg,caf\xc3\xa9\n")
    assert found[0][0] == "bad row"
    assert found[1:] == [("1.jpg", "café")]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        with pytest.raises(ValueError, match=r"a.csv is in UTF-16: save it as UTF-8"):
            outcome(tmp_path, HEAD.encode(encoding))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet='ab1 ,"\n\r\\;é', max_size=12), min_size=1, max_size=5), st.data())
def test_a_written_table_is_read_back_and_a_missing_quote_loses_no_row(tmp_path_factory, texts, data) -> None:
    folder = tmp_path_factory.mktemp("csv")
    texts = [text.strip() or "x" for text in texts]
    rows = ['"' + text.replace('"', '""') + '"' for text in texts]
    body = [f"{n}.jpg,{row}\n" for n, row in enumerate(rows)]
    assert outcome(folder, HEAD + "".join(body)) == [(f"{n}.jpg", text) for n, text in enumerate(texts)]
    broken = data.draw(st.integers(0, len(rows) - 1))
    lone = [f"{n}.jpg,text {n}\n" for n in range(len(rows))]
    lone[broken] = f'{broken}.jpg,"{"".join(c for c in texts[broken] if c not in chr(34) + chr(10) + chr(13))}\n'
    found = outcome(folder, HEAD + "".join(lone))
    assert len(found) == len(lone)
    assert [row[0] for row in found] == ["bad row" if n == broken else f"{n}.jpg" for n in range(len(rows))]
