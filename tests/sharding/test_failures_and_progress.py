"""What failed is listed and grouped, decides the exit code, and progress is readable by people and by machines."""

import json
import os
import pty
import subprocess
import termios
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from packed import build_command, pack, write_photos
from places import ROOT

from sharding.build import main
from sharding.reasons import KINDS, count_kinds, kind_of, summary
from sharding.shards.failures import FailureLog, read_failures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """200 photos, a tenth of them missing, one cut, one empty, two of them no pictures."""
    folder = write_photos(tmp_path, 200, (80, 60))
    for number in range(3, 200, 10):
        (folder / f"{number}.jpg").unlink()
    (folder / "6.jpg").write_bytes((folder / "6.jpg").read_bytes()[:-300])
    (folder / "9.jpg").write_bytes(b"")
    for number in (7, 150):
        (folder / f"{number}.jpg").write_text("<html>404</html>")
    return folder


@pytest.mark.parametrize(("share", "code"), [("0.1", 1), ("0.12", 0), ("1", 0), ("0", 1), ("5", 2), ("-0.1", 2)])
def test_the_share_of_failures_decides_the_exit_code(
    photos: Path, tmp_path: Path, share: str, code: int, caplog, capsys
) -> None:
    caplog.set_level("INFO", "sharding")
    assert main(build_command(photos, tmp_path / "out", "--max-failures", share, "--workers", "1")[3:]) == code
    assert (tmp_path / "out" / "corpus.json").exists() == (code == 0)
    if code != 2:
        assert "200 rows = 176 packed + 24 failed" in caplog.text
        assert "20 x file not found" in caplog.text
    if code == 1:
        assert "24 of 200 media failed (12.0%" in (error := capsys.readouterr().err)
        assert "sharding.inspect" in error


@pytest.mark.parametrize("workers", [1, 2])
def test_every_failure_is_in_the_table_in_order_of_the_annotations(photos: Path, tmp_path: Path, workers: int) -> None:
    pack(photos, tmp_path / "out", workers=workers, max_failures=0.2)
    failures = list(read_failures(str(tmp_path / "out")))
    expected = [number for number in range(200) if number % 10 == 3 or number in (6, 7, 9, 150)]
    assert [failure["source"] for failure in failures] == [f"{number}.jpg" for number in expected]
    assert {failure["rows"] for failure in failures} == {1}
    assert Counter(kind_of(failure["reason"]) for failure in failures) == {
        "file not found": 20,
        "unreadable image: cannot identify image file": 2,
        "truncated JPEG: its picture has no end-of-image marker": 1,
        "empty file": 1,
    }


def test_where_there_is_no_terminal_the_log_has_lines_of_json(photos: Path, tmp_path: Path) -> None:
    def logged(*flags: str) -> list[dict]:
        words = build_command(photos, tmp_path / "out", "--workers", "2", "--max-failures", "1", *flags)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]

    lines = logged("--log-every", "0.1")
    assert len(lines) >= 2
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)
    last = lines[-1]
    assert last["stage"] == "packing out"
    assert (last["done"], last["total"], last["packed"], last["failed"]) == (200, 200, 176, 24)
    assert 0 < last["bytes"] < sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert last["items_per_s"] > 0
    assert last["eta_s"] == 0
    (line,) = logged("--log-every", "0.1")
    assert (line["done"], line["items_per_s"], line["eta_s"]) == (200, 0, 0)  # an earlier run's work is not a rate
    assert logged("--log-every", "0") == []


def test_a_terminal_shows_a_bar_with_rate_bytes_failures_and_time_left(photos: Path, tmp_path: Path) -> None:
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 110))
    words = build_command(photos, tmp_path / "out", "--workers", "1", "--max-failures", "1")
    process = subprocess.Popen(words, cwd=ROOT, stderr=child, stdout=child)
    os.close(child)
    shown = b""
    while True:
        try:
            block = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        shown += block
    os.close(parent)
    assert process.wait() == 0
    text = shown.decode()
    assert "packing out: 100%" in text
    assert "200/200" in text
    assert "item/s" in text or "s/item" in text
    assert "kB, 24 failed" in text
    assert '{"stage"' not in text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("truncated: 25 of 300 bytes", "truncated: 7 of 1024 bytes"),
        ("no frame at 6 seconds or later", "no frame at 7.25 seconds or later"),
        ("cannot open 'a b.jpg'", "cannot open 'c.jpg'"),
        ("https://a.example/x?y=1: timed out", "https://b.example: timed out"),
        ("[Errno 5] /mnt/a: input/output error", "[Errno 5] /mnt/b/c: input/output error"),
    ],
)
def test_reasons_that_differ_in_particulars_are_one_kind(one: str, other: str) -> None:
    assert kind_of(one) == kind_of(other) != one


@pytest.mark.parametrize(
    ("one", "other"), [("HTTP 404", "HTTP 403"), ("errno 5 x", "errno 28 x"), ("404, Not Found", "429, Not Found")]
)
def test_numbers_that_are_the_reason_stay(one: str, other: str) -> None:
    assert kind_of(one) != kind_of(other)


def test_a_flood_of_different_reasons_is_bounded_and_nothing_is_lost(tmp_path: Path) -> None:
    reasons = [chr(97 + number // 676) + chr(97 + number // 26 % 26) + chr(97 + number % 26) for number in range(5000)]
    kinds: Counter[str] = Counter()
    count_kinds(kinds, reasons)
    assert len(kinds) <= KINDS + 1
    assert kinds.total() == 5000
    assert list(summary(kinds))[-1].endswith("more kinds of reasons, all in failures.parquet")
    log = FailureLog(tmp_path)
    for shard in reversed(range(50)):
        part = reasons[shard * 100 : shard * 100 + 100]
        log.add(shard, [{"source": reason, "rows": 2, "reason": reason} for reason in part])
    (tmp_path / "out").mkdir()
    log.publish(str(tmp_path / "out"))
    assert (log.count, log.rows) == (5000, 10000)
    assert [row["source"] for row in read_failures(str(tmp_path / "out"))] == reasons
    assert pq.ParquetFile(tmp_path / "out" / "failures.parquet").num_row_groups == 1
