"""Rows on disk: media in order of first appearance, each once with all its texts, in memory that does not grow."""

import json
import pickle
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from packed import build_command, contents, pack, write_photos
from places import ROOT

from runtime.progress import counted
from sharding.annotations.items import Item, Row
from sharding.annotations.staging import open_staged, stage
from sharding.shards.plan import ShardSettings, plan_shards
from storage.fetching import Fetching


def staged(rows: list[Row], folder: Path, limit: int = 0):
    return stage(rows, folder / "rows.sqlite", folder, limit)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.lists(some.tuples(some.sampled_from("abcdefg"), some.text(max_size=4)), max_size=40), some.integers(0, 5))
def test_rows_are_merged_in_the_order_in_which_media_appear(tmp_path: Path, pairs, limit: int) -> None:
    rows = [Row(source, (text,)) for source, text in pairs]
    found = staged(rows, tmp_path, limit)
    expected: dict[str, list[str]] = {}
    for source, text in pairs:
        if source in expected or not limit or len(expected) < limit:
            expected.setdefault(source, []).append(text)
    assert list(found.between(0, found.items)) == [
        Item(source, len(texts), texts) for source, texts in expected.items()
    ]
    assert found.rows == len(rows)
    assert found.kept == sum(map(len, expected.values()))
    assert sum(found.filtered.values()) == found.rows - found.kept


def test_questions_and_choices_without_an_id_are_numbered(tmp_path: Path) -> None:
    question = {"question_id": "", "question": "what?", "answers": ["a"], "weights": [1.0]}
    choice = {"question_id": "", "options": ["a", "b"], "answer": 1}
    rows = [Row("v", question=question), Row("w", ("x",)), Row("v", question={**question, "question_id": "7"})]
    rows += [Row("v", question=question), Row("v", choice=choice), Row(filtered="why"), Row(filtered="why")]
    found = staged(rows, tmp_path)
    first = found.between(0, 1)[0]
    assert [each["question_id"] for each in first.questions] == ["v#0", "7", "v#2"]
    assert first.choices == [{**choice, "question_id": "v#0"}]
    assert first.rows == 4
    assert found.filtered == {"why": 2}
    assert open_staged(tmp_path / "rows.sqlite") == found


def test_pickled_tasks_are_small_and_read_their_items_later(tmp_path: Path) -> None:
    rows = [Row(f"{number}.jpg", ("a caption of some length",)) for number in range(5000)]
    found = staged(rows, tmp_path)
    plan = ShardSettings("x", "image", 224, 90, 2.0, 0, 256)
    tasks = plan_shards(found, plan, "media", "out", tmp_path, Fetching())
    assert sum(len(task.items) for task in tasks) == 5000
    assert max(len(pickle.dumps(task)) for task in tasks) < 1000
    again = pickle.loads(pickle.dumps(tasks[1]))
    assert [item.source for item in again.items] == [f"{number}.jpg" for number in range(313, 626)]
    assert again.items[-1].captions == ["a caption of some length"]


def test_a_full_disk_is_reported_and_leaves_no_partial_rows(photos: Path, tmp_path: Path) -> None:
    records = [{"image": "0.jpg", "caption": f"a long caption {number} " * 20} for number in range(5000)]
    (tmp_path / "long.json").write_text(json.dumps(records))
    words = build_command(photos, tmp_path / "out", "--annotations", str(tmp_path / "long.json"), "--workers", "1")
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**19, 2**19))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, preexec_fn=small)
    assert done.returncode == 2
    assert "error: annotation rows cannot be staged in" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / ".partial").exists()
    assert subprocess.run(words, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0


def test_reading_logs_its_progress(caplog) -> None:
    caplog.set_level("INFO", "runtime")
    rows = [Row("a", ("x",))] * 10_000
    assert list(counted(rows, log_every=1e-9)) == rows
    assert [json.loads(record.message) for record in caplog.records] == [
        {"stage": "annotations", "done": 4096},
        {"stage": "annotations", "done": 8192},
    ]


PEAK = """
import sys
from pathlib import Path
from sharding.annotations.items import Row
from sharding.annotations import staging
staging.CACHE_KB = 1024  # else the caches, which fill up first, hide what is looked for
rows = (Row(f"{number * 7919 % 100003}/{number % 50000}.jpg", (f"caption {number} of usual length, more or less",))
        for number in range(int(sys.argv[2])))
found = staging.stage(rows, Path(sys.argv[1]) / "rows.sqlite", Path(sys.argv[1]))
assert found.rows == int(sys.argv[2])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)  # not ru_maxrss, which begins with that of the parent process
"""


@pytest.mark.parametrize(("few", "many"), [(2_000, 200_000)])
def test_memory_does_not_grow_with_rows(tmp_path: Path, few: int, many: int) -> None:
    peaks = []
    for count in (few, many):
        folder = tmp_path / str(count)
        folder.mkdir()
        words = [sys.executable, "-c", PEAK, str(folder), str(count)]
        peaks.append(float(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 20, peaks  # MB; the rows alone are 60


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path, 150, (12, 9), (1600, 1200))


def test_a_killed_build_resumes_with_its_staged_rows(photos: Path, tmp_path: Path, caplog) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(build_command(photos, out, "--workers", "1"), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (out / "build.json").exists():  # written when the rows are staged
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((out / ".partial").glob("rows-*.sqlite"))) == 1
    caplog.set_level("INFO", "sharding")
    pack(photos, out, name="out")
    assert "annotations: read by an earlier run" in caplog.text
    assert not (out / ".partial").exists()
    pack(photos, tmp_path / "whole", name="out")
    assert contents(out) == contents(tmp_path / "whole")


def test_staged_rows_of_other_annotations_are_not_used(photos: Path, tmp_path: Path) -> None:
    (photos / "0.jpg").unlink()
    with pytest.raises(ValueError, match="media failed"):
        pack(photos, tmp_path / "out", max_failures=0.0)
    assert len(list((tmp_path / "out" / ".partial").glob("rows-*.sqlite"))) == 1
    file = photos.parent / "photos.json"
    file.write_text(file.read_text().replace("photo 7", "photo seven"))
    with pytest.raises(ValueError, match="built with another annotations_sha256"):
        pack(photos, tmp_path / "out")
