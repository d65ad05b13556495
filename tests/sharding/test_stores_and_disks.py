"""Packing from and to stores with failing requests, and onto full disks: the same bytes, or a clear error."""

import os
import subprocess
from pathlib import Path

import fsspec
import pytest
from faulty_proxy import Faults
from needs import lacks, leave_out
from object_stores import MakeFaulty, Store
from packed import build_command, contents, pack, write_photos
from places import ROOT

from sharding.shards.verification import verify_corpus
from storage.fetching import Fetching

COUNT = 96
FAILING = Faults(error=0.05, throttle=0.03, cut=0.05, slow=0.02, slow_seconds=0.3, seed=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("stores"), COUNT, (64, 48))


@pytest.fixture(scope="module")
def local(photos: Path) -> dict[str, bytes]:
    """The files of a build from disk to disk: what every other way must give."""
    build(photos, str(photos), str(photos.parent / "local"))
    return contents(photos.parent / "local")


def build(photos: Path, root: str, output: str, **settings):
    return pack(photos, output, media_root=root, fetching=Fetching(timeout=5), **settings)


def stored(url: str) -> dict[str, bytes]:
    filesystem, path = fsspec.url_to_fs(url)
    return {name.rsplit("/", 1)[-1]: filesystem.cat_file(name) for name in filesystem.find(path)}


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_from_a_store_to_a_store_is_the_same_as_from_disk_to_disk(store: Store, photos: Path, local) -> None:
    corpus = build(photos, store.fill(photos, "media"), store.url("out"))
    assert stored(store.url("out")) == local
    assert build(photos, store.url("media"), store.url("out")) == corpus
    assert not verify_corpus(store.url("out"), decode=True)


@pytest.mark.parametrize("store", ["s3", "gcs", "http"], indirect=True)
def test_failing_reads_do_not_change_the_shards(
    store: Store, faulty: MakeFaulty, photos: Path, local, tmp_path: Path
) -> None:
    store.fill(photos, "media")
    proxy = faulty(store, FAILING)
    build(photos, store.url("media", proxy), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == local
    assert sum(count for kind, count in proxy.counts().items() if kind) >= 5


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_failing_writes_do_not_change_the_shards(store: Store, faulty: MakeFaulty, photos: Path, local) -> None:
    proxy = faulty(store, Faults(error=0.15, cut=0.1, seed=2))
    build(photos, str(photos), store.url("out", proxy))
    assert sum(count for kind, count in proxy.counts().items() if kind) >= 2
    proxy.faults = Faults()
    assert stored(store.url("out")) == local


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_a_permanent_store_error_is_reported_and_the_build_resumes(
    store: Store, faulty: MakeFaulty, photos: Path, local
) -> None:
    proxy = faulty(store, Faults(permanent="x-000001", permanent_status=403))
    with pytest.raises(OSError, match=r"cannot (write|read) .*/out/x-000001.*access refused"):
        build(photos, str(photos), store.url("out"))
    proxy.faults = Faults()
    assert "corpus.json" not in stored(store.url("out"))
    build(photos, str(photos), store.url("out"))
    assert stored(store.url("out")) == local


def run(photos: Path, output: str | Path, **options) -> subprocess.CompletedProcess[str]:
    words = build_command(photos, output, "--name", "x")
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)


def test_media_with_access_denied_stop_the_build(s3: Store, faulty: MakeFaulty, photos: Path, tmp_path: Path) -> None:
    url = s3.fill(photos, "media")
    faulty(s3, Faults(permanent=r"media/70\.jpg", permanent_status=403))
    with pytest.raises(OSError, match=r"cannot read s3://.*/media/70.jpg: access refused"):
        build(photos, url, str(tmp_path / "out"))


def test_missing_credentials_are_reported_in_one_line(s3: Store, photos: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= {key: value for key, value in os.environ.items() if "ENDPOINT" in key}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}
    done = run(photos, s3.url("out"), env=environment)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: cannot read {s3.url('out')}")
    assert "credentials" in line
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of one megabyte."""
    leave_out(lacks("mount", root="a file system of a test's own has to be mounted"))
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_reported_and_the_build_resumes(photos: Path, local, small_disk: Path, workers: int) -> None:
    size = sum(map(len, local.values()))
    (small_disk / "ballast").write_bytes(b"x" * (2**20 - size * 2 // 3))
    with pytest.raises(OSError, match=f"No space left on device.*{small_disk}/out|staged in {small_disk}/out"):
        build(photos, str(photos), str(small_disk / "out"), workers=workers)
    printed = run(photos, small_disk / "out")
    assert printed.returncode == 2
    assert printed.stderr.strip().endswith("free some space and run the same command again to continue")
    assert not (small_disk / "out" / "corpus.json").exists()
    (small_disk / "ballast").unlink()
    build(photos, str(photos), str(small_disk / "out"), workers=workers)
    assert contents(small_disk / "out") == local


def test_a_read_only_disk_is_reported(photos: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = run(photos, small_disk / "out")
    assert done.returncode == 2
    assert f"Read-only file system: '{small_disk}/out'" in done.stderr
    assert "Traceback" not in done.stderr
