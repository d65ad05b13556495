"""Samples of other tools' tars: each becomes a row of the index, or a failure with its reason."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from sharding.index import main
from sharding.shards.failures import read_failures
from sharding.shards.foreign import Contents, Sample, read_contents, row_of
from sharding.shards.indexing import index_shards
from sharding.shards.schema import read_index
from sharding.shards.verification import verify_corpus


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 99, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(members: list[tuple], **options) -> bytes:
    """A tar of (name, data) and of (name, link, type)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data, *kind in members:
            info = tarfile.TarInfo(name)
            if kind:
                info.type, info.linkname = kind[0], data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(members: list[tuple], **options) -> Contents:
    return read_contents(io.BytesIO(tar_of(members, **options)), 0.0)


def said(text: bytes | object, ending: str = "json") -> dict | str:
    """The row of a sample whose KEY.json (or .txt) says this, or why there is none."""
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    contents = read([("a.jpg", jpeg()), (f"a.{ending}", data)])
    return contents.rows[0] if contents.rows else contents.failures[0]["reason"]


def test_links_are_resolved(tmp_path: Path) -> None:
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members = [
        ("early.jpg", "blobs/7f", soft),
        ("early.txt", b"early"),
        ("a.jpg", jpeg(1)),
        ("a.txt", b"a"),
        ("b.jpg", "a.jpg", hard),
        ("b.txt", "a.txt", hard),
        ("c/c.jpg", "../b.jpg", soft),
        ("c/c.json", b'{"caption": "c"}'),
        ("blobs/7f", jpeg(2)),
        ("gone.jpg", "none.jpg", soft),
        ("gone.txt", b"gone"),
        ("notext.jpg", jpeg(3)),
        ("notext.txt", "none.txt", soft),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    corpus = index_shards(str(tmp_path), max_failures=1)
    with tarfile.open(tmp_path / "x.tar") as tar:
        for row in read_index(corpus, 0).to_pylist():
            data = tar.extractfile(row["key"] + ".jpg").read()
            with open(tmp_path / "x.tar", "rb") as file:
                file.seek(row["offsets"][0])
                assert file.read(row["sizes"][0]) == data
    captions = {row["key"]: row["captions"] for row in read_index(corpus, 0).to_pylist()}
    assert captions == {"early": ["early"], "a": ["a"], "b": ["a"], "c/c": ["c"]}
    assert {row["source"]: row["reason"] for row in read_failures(str(tmp_path))} == {
        "gone": "gone.jpg is a link to none.jpg, which is not in the archive",
        "notext": "notext.txt is a link to none.txt, which is not in the archive",
    }
    assert not verify_corpus(str(tmp_path), decode=True)


def test_a_row_that_points_into_another_sample_is_a_fault(tmp_path: Path) -> None:
    members = [("a.jpg", jpeg(1)), ("b.jpg", "a.jpg", tarfile.LNKTYPE)]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    index_shards(str(tmp_path))
    data = (tmp_path / "x.tar").read_bytes()
    header = bytearray(data[1536:2048])
    header[0:5], header[148:156] = b"c.jpg", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(data[:1536] + bytes(header) + data[2048:])
    assert any("the tar has a.jpg here" in str(fault) for fault in verify_corpus(str(tmp_path)))


@pytest.mark.parametrize("encoding", ["latin-1", "gbk"])
def test_a_name_that_is_not_utf8_is_indexed(tmp_path: Path, encoding: str, capsys) -> None:
    name = "é" if encoding == "latin-1" else "日本"
    members = [("0.jpg", jpeg()), (f"{name}.jpg", jpeg(1)), (f"{name}.txt", b"x"), ("2.jpg", jpeg(2))]
    (tmp_path / "0.tar").write_bytes(tar_of(members, encoding=encoding, format=tarfile.GNU_FORMAT))
    (tmp_path / "1.tar").write_bytes(tar_of([("0.jpg", jpeg())]))
    assert main([str(tmp_path), "--workers", "1"]) == 0
    corpus = index_shards(str(tmp_path))
    key = name.encode(encoding).decode("utf-8", "backslashreplace")
    assert read_index(corpus, 0)["key"].to_pylist() == ["0", key, "2"]
    assert not verify_corpus(str(tmp_path), decode=True)


def test_duplicate_names_are_resolved_or_reported() -> None:
    pairs = [("a.jpg", jpeg(1)), ("a.txt", b"one"), ("b.jpg", jpeg(2)), ("a.jpg", jpeg(3)), ("a.txt", b"two")]
    contents = read(pairs)
    assert [(row["key"], row["captions"]) for row in contents.rows] == [("a", ["one"]), ("b", [])]
    assert contents.rows[0]["offsets"] == [512]
    assert contents.failures == [
        {"source": "a", "rows": 1, "reason": "is in the tar 2 times, with different contents: the first is indexed"}
    ]
    contents = read([*pairs[:4], ("b.jpg", jpeg(2))])  # two pictures, one text; the same picture twice
    assert [row["key"] for row in contents.rows] == ["b"]
    assert [row["source"] for row in contents.failures] == ["a"]
    assert "jpg more than once in the tar, with different contents" in contents.failures[0]["reason"]


def test_an_index_with_keys_of_earlier_versions_is_valid(tmp_path: Path, monkeypatch) -> None:
    """Keys keep the dots of their folders; earlier versions had underscores there."""
    (tmp_path / "x.tar").write_bytes(tar_of([("v1.0/x.jpg", jpeg(1)), ("v1_0/x.jpg", jpeg(2))]))
    assert read_index(index_shards(str(tmp_path)), 0)["key"].to_pylist() == ["v1.0/x", "v1_0/x"]
    assert not verify_corpus(str(tmp_path), decode=True)
    for path in (tmp_path / "x.parquet", tmp_path / "corpus.json"):
        path.unlink()
    (tmp_path / "x.tar").write_bytes(tar_of([("v1.0/x.jpg", jpeg(1)), ("v1.0/y.jpg", jpeg(2))]))
    with monkeypatch.context() as earlier:
        earlier.setattr("sharding.shards.foreign.row_of", with_underscores)
        corpus = index_shards(str(tmp_path))
    assert read_index(corpus, 0)["key"].to_pylist() == ["v1_0/x", "v1_0/y"]
    assert not verify_corpus(str(tmp_path))


def with_underscores(sample: Sample, *settings) -> tuple[dict, bool]:
    sample.key = sample.key.replace(".", "_")
    return row_of(sample, *settings)


def test_other_files_are_counted_and_pictures_without_a_key_are_failures(tmp_path: Path, caplog) -> None:
    clutter = ["._a.jpg", "d/._b.txt", "__MACOSX/._a.jpg", "__MACOSX/a.jpg", ".DS_Store"]
    members = [("a.jpg", jpeg()), *((name, b"\0\5\x16\7") for name in clutter), ("README", b"x"), (".z.jpg", jpeg())]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    with caplog.at_level("INFO"):
        corpus = index_shards(str(tmp_path), max_failures=1)
    assert read_index(corpus, 0)["key"].to_pylist() == ["a"]
    assert "5 x file of macOS" in caplog.text
    assert "1 x file without an ending" in caplog.text
    assert [row["source"] for row in read_failures(str(tmp_path))] == [".z.jpg"]
    caplog.clear()
    with caplog.at_level("INFO"):
        index_shards(str(tmp_path), max_failures=1)  # the index is kept
    assert "5 x file of macOS" in caplog.text


def test_several_pictures_of_a_sample_are_a_remark() -> None:
    contents = read([("a.png", jpeg(1)), ("a.JPG", jpeg(2)), ("a.mask.png", jpeg(3))])
    assert contents.rows[0]["offsets"] == [2048]
    assert contents.remarks == {"mask.png, png in the same sample: jpg is taken": 1}
    contents = read([("a.jpg", jpeg()), ("a.000.png", jpeg(1)), ("a.000.jpg", jpeg(2)), ("a.001.jpg", jpeg(3))])
    assert len(contents.rows[0]["offsets"]) == 2
    assert contents.remarks == {"000.png, jpg in the same sample: the numbered frames are taken": 1}


def test_a_text_behind_a_second_dot_is_a_remark() -> None:
    contents = read([("a.v1.jpg", jpeg()), ("a.v1.txt", b"a caption")])
    assert contents.rows[0]["captions"] == []
    [remark] = contents.remarks
    assert remark.startswith("v1.txt: not read, as a key ends at the first dot")


@pytest.mark.parametrize(
    ("text", "ending", "found"),
    [
        *(
            ("  café 日本\r\n".encode(form), "txt", ["café 日本"])
            for form in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
        ),
        *(('{"caption": "é"}'.encode(form), "json", ["é"]) for form in ("utf-8", "utf-8-sig", "utf-16", "utf-32")),
        ("café".encode("latin-1"), "txt", "its txt is not UTF-8 at byte 3: convert it"),
        ("日本".encode("gbk"), "txt", "its txt is not UTF-8 at byte 0: convert it"),
        ("text".encode("utf-16-le"), "txt", "its txt holds NUL characters"),
        (b"\xff\xfea", "txt", "its txt is not UTF-16"),
        *((empty, "txt", []) for empty in (b"", b" \r\n", b"\xef\xbb\xbf")),
        ({"caption": None, "text": "b"}, "json", ["b"]),
        ({"caption": float("nan"), "text": "b"}, "json", ["b"]),
        ({"captions": [None, "a", "", float("nan")]}, "json", ["a"]),
        ({"captions": [], "caption": "b"}, "json", ["b"]),
        ({"caption": " "}, "json", []),
        (b"[" * 100_000, "json", "its JSON cannot be read"),
        (b'{"fps": %s, "caption": "a"}' % (b"9" * 5000), "json", "its JSON cannot be read"),
        *(({"caption": value}, "json", "its caption is not a text") for value in (0, {"en": "x"})),
        *(({"captions": value}, "json", "its caption is not a text") for value in ([["a"]], ["a", 7])),
        ({"question": 7}, "json", "its question is not a text"),
        ({"questions": "why?"}, "json", "its questions are not a list"),
        ({"questions": [{"question": ["why?"]}]}, "json", "its question is not a text"),
        ({"question": "why?", "answer": {"a": 1}}, "json", "its answer is not a text"),
        ({"choices": [{"options": "ab"}]}, "json", "its choice has no list of options"),
        ({"choices": [{"options": ["a", "b"], "answer": 2}]}, "json", "its choice has the answer '2', and 2 options"),
        ({"choices": {"options": ["a"]}}, "json", "its choices are not a list"),
        *((value, "json", "its JSON is not an object") for value in (["a"], "a")),
    ],
)
def test_captions_of_a_sample_or_its_failure(text: object, ending: str, found: list[str] | str) -> None:
    row = said(text, ending)
    assert row["captions"] == found if isinstance(row, dict) else row.startswith(found)


def test_questions_and_their_answers() -> None:
    def asked(given: dict) -> list[tuple]:
        return [
            (each["question_id"], each["question"], each["answers"], each["weights"])
            for each in said(given)["questions"]
        ]

    assert asked({"question": None, "answer": "a"}) == asked({"question": ""}) == asked({"questions": [None]}) == []
    assert asked({"question": "q?", "answer": None, "question_id": None}) == [("a", "q?", [], [])]
    assert asked({"question": "q?", "answer": ["x", None, "x"]}) == [("a", "q?", ["x"], [1.0])]
    assert asked({"questions": [{"question": "q?", "answers": ["x", "y"]}, {"question": None}]}) == [
        ("a#0", "q?", ["x", "y"], [0.5, 0.5])
    ]
    ours = {"question_id": "7", "question": "q?", "answers": ["x", "y"], "weights": [0.75, 0.25]}
    assert asked({"questions": [ours]}) == [("7", "q?", ["x", "y"], [0.75, 0.25])]
    assert said({"choices": [None, {"options": ["a", "b"], "answer": None}]})["choices"] == [
        {"question_id": "", "options": ["a", "b"], "answer": -1}
    ]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1, 0, True, "x", 10**400])
def test_invalid_numbers_give_the_default(value: object) -> None:
    data = json.dumps({"fps": value, "duration": value, "frame_times": [value, 1.0]}).encode()
    contents = read([("a.000.jpg", jpeg()), ("a.001.jpg", jpeg(1)), ("a.json", data)])
    (row,) = contents.rows
    assert (row["fps"], row["duration"], contents.rate_assumed) == (1.0, 2.0, True)
    assert row["frame_times"] in ([0.0, 1.0], [value, 1.0])
    contents = read([("a.000.jpg", jpeg()), ("a.001.jpg", jpeg(1)), ("a.json", b'{"fps": "25", "duration": "2.5"}')])
    assert (contents.rows[0]["fps"], contents.rows[0]["duration"]) == (25.0, 2.5)


def test_a_folder_of_compressed_tars_is_an_error(tmp_path: Path, capsys, caplog) -> None:
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz"):
        pass
    assert main([str(tmp_path)]) == 2
    assert "1 compressed tars, such as 0.tar.gz" in capsys.readouterr().err
    (tmp_path / "1.tar").write_bytes(tar_of([("a.jpg", jpeg())]))
    assert index_shards(str(tmp_path)).samples == 1
    assert "left out 1 compressed tars, such as 0.tar.gz" in caplog.text


def test_a_damaged_first_header_loses_one_sample() -> None:
    data = bytearray(tar_of([("a.jpg", jpeg()), ("b.jpg", jpeg(1))]))
    data[5] ^= 1
    contents = read_contents(io.BytesIO(bytes(data)), 0.0)
    assert [row["key"] for row in contents.rows] == ["b"]
    assert [damage.offset for damage in contents.damages] == [0]
