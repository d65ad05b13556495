"""Builds that are interrupted, run twice, retried, or write to a store: no data is lost or incomplete."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import fsspec
import pytest
from packed import build_command, contents, pack, write_photos
from places import ROOT

from sharding.shards.output import open_output
from sharding.shards.schema import read_corpus, read_index
from sharding.shards.verification import verify_corpus
from storage.locks import Lock

COUNT = 256  # four shards of 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("interruptions"), COUNT, (12, 9), (1200, 900))


def command(photos: Path, output: Path, workers: int) -> list[str]:
    return build_command(photos, output, "--name", "x", "--workers", str(workers))


def killed(words: list[str], moment: float, alone: bool) -> bool:
    """Start a build and kill it after so many seconds; whether it was still running.

    alone: the parent only, its workers must end by themselves and harm nothing until then; else all at once, as when
    a machine dies.
    """
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        if alone:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


SLOW = [pytest.param(workers, 20, marks=pytest.mark.slow) for workers in (1, 2, 4)]


@pytest.mark.parametrize(("workers", "kills"), [(1, 2), (2, 4), (4, 2), *SLOW])
def test_killed_builds_end_in_the_same_bytes(photos: Path, tmp_path: Path, workers: int, kills: int) -> None:
    """Moments are spread over the whole life of a build; of two kills in one folder the second hits a resumed build."""
    more = ["--size", "448", "--shard-mb", "1"]  # 18 shards
    started = time.monotonic()
    subprocess.run(command(photos, tmp_path / "whole", workers) + more, cwd=ROOT, check=True, capture_output=True)
    life = time.monotonic() - started
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".tar")]) == 18
    rng = random.Random(workers)
    moments = [life * (number + rng.random()) / kills for number in range(kills)]
    rng.shuffle(moments)
    for number, moment in enumerate(moments):
        words = command(photos, tmp_path / f"cut{number // 2}", workers) + more
        while not killed(words, moment, alone=rng.random() < 0.5):  # it was faster than the first
            assert contents(tmp_path / f"cut{number // 2}") == whole
            shutil.rmtree(tmp_path / f"cut{number // 2}")
            moment /= 2
        found = contents(tmp_path / f"cut{number // 2}") if (tmp_path / f"cut{number // 2}").exists() else {}
        for name, data in found.items():  # whatever has its final name is whole
            assert data == whole[name], f"{name}, killed after {moment:.2f} of {life:.2f} s"
        if number % 2:
            subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
            assert contents(tmp_path / f"cut{number // 2}") == whole


def test_complete_shards_are_not_rebuilt(photos: Path, tmp_path: Path) -> None:
    corpus = pack(photos, tmp_path / "out")
    (tmp_path / "out" / corpus.shards[2].index_name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert pack(photos, tmp_path / "out") == corpus
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert [name for name in before if before[name] != after[name]] == [corpus.shards[2].name]


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_control_c_ends_at_once_with_one_line(photos: Path, tmp_path: Path, wait: float) -> None:
    process = subprocess.Popen(
        command(photos, tmp_path / "out", 2), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "out" / "build.json").exists():
        time.sleep(0.02)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "interrupted: run the same command again" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_two_builds_do_not_write_to_one_folder(photos: Path, tmp_path: Path) -> None:
    with open_output(str(tmp_path / "out")):
        with pytest.raises(ValueError, match="another build is writing to"):
            pack(photos, tmp_path / "out")
    assert pack(photos, tmp_path / "out").samples == COUNT


def test_only_the_last_part_removes_temporary_files(tmp_path: Path) -> None:
    """All shards may be complete, and described, while another part still writes its account of them."""
    output = tmp_path / "out"
    with open_output(str(output), part="1/2") as slow:
        with open_output(str(output), part="2/2"):
            (output / "corpus.json").write_text("{}")
            (output / "build.json").write_text("{}")
        assert slow.exists()
    assert not slow.parent.exists()


def test_a_part_waits_for_the_removal_of_temporary_files(tmp_path: Path) -> None:
    output = tmp_path / "out"
    clearing = Lock(output / ".partial" / "lock")
    clearing.acquire()
    threading.Timer(0.5, clearing.release).start()
    with open_output(str(output), part="1/2") as scratch:
        assert scratch.exists()


def test_retry_failed_packs_repaired_files(photos: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(photos.parent, tmp_path / "mine")) / "photos"
    whole = pack(photos, tmp_path / "whole")
    good = (photos / "70.jpg").read_bytes()
    (photos / "70.jpg").write_bytes(good[:5000])
    with pytest.raises(ValueError, match="run the same command with --retry-failed"):
        pack(photos, tmp_path / "out", max_failures=0.0)
    assert not (tmp_path / "out" / "corpus.json").exists()
    assert pack(photos, tmp_path / "out").samples == COUNT - 1
    (photos / "70.jpg").write_bytes(good)
    assert pack(photos, tmp_path / "out").samples == COUNT - 1
    again = pack(photos, tmp_path / "out", retry_failed=True)
    assert again.shards == whole.shards
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_remote_output_holds_the_same_and_is_resumed(photos: Path, tmp_path: Path) -> None:
    local = pack(photos, tmp_path / "out")
    store = fsspec.filesystem("memory")
    remote = pack(photos, "memory://bucket/out")
    assert remote.shards == local.shards == read_corpus("memory://bucket/out").shards
    assert not verify_corpus("memory://bucket/out", decode=True)
    store.rm(f"/bucket/out/{local.shards[1].index_name}")
    store.rm("/bucket/out/corpus.json")
    assert pack(photos, "memory://bucket/out").shards == local.shards
    assert read_index(remote, 1).num_rows == 64
    assert pack(photos, f"file://{tmp_path}/other").shards == local.shards
    with pytest.raises(ValueError, match="built with another size"):
        pack(photos, "memory://bucket/out", size=64)


def test_an_unwritable_output_is_reported(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(command(photos, tmp_path / "file" / "out", 1), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "file") in done.stderr
    assert done.stderr.count("\n") == 1
