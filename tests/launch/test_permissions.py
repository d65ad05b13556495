"""Everything that the commands write may be read by whom the umask lets, on a disk that colleagues share."""

import json
import os
from pathlib import Path

import pytest
from small_run import job, run_jobs

from eval.compare import main as compare
from eval.report.__main__ import main as report
from eval.search.__main__ import main as search
from loaders import preview, vocab
from model.export import main as export
from sharding.answers import main as answers
from sharding.build import main as build
from sharding.index import main as index
from sharding.inspect import main as inspect
from sharding.shapes import write_shapes
from storage.cache import DiskCache

UMASK = 0o027  # neither the usual one nor a private one: files are 640 and folders 750


@pytest.fixture
def shared_disk(tmp_path):
    """A folder for all that is written under that umask."""
    before = os.umask(UMASK)
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    os.umask(before)


def unlike_the_umask(folder: Path) -> dict[str, str]:
    """Files and folders with other permissions than new ones have."""
    paths = [path for path in [folder, *folder.rglob("*")] if not path.is_symlink()]
    assert len(paths) > 5
    usual = {True: 0o777 & ~UMASK, False: 0o666 & ~UMASK}
    modes = {path: path.stat().st_mode & 0o777 for path in paths}
    return {str(path): oct(mode) for path, mode in modes.items() if mode != usual[path.is_dir()]}


def test_what_packing_and_its_tools_write(shared_disk, monkeypatch):
    monkeypatch.chdir(shared_disk)
    write_shapes(shared_disk / "drawn", images=12, clips=3, test_items=3, size=32)
    (shared_disk / "drawn/media/broken.jpg").write_bytes(b"no picture")
    rows = json.loads((shared_disk / "drawn/images_train.json").read_text())
    rows.append({"image": "broken.jpg", "caption": "a broken one"})
    (shared_disk / "drawn/images_train.json").write_text(json.dumps(rows))
    usual = ["--media-root", "drawn/media", "--workers", "2"]
    for name, kind in (("images_train", "image"), ("clips_train", "video"), ("qa_train", "video")):
        words = ["--annotations", f"drawn/{name}.json", *usual, "--media-type", kind, "--output", name]
        assert build([*words, "--max-failures", "0.5"]) == 0
    assert index(["images_train", "--output", "indexed"]) == 0
    assert answers(["qa_train", "--output", "answers.json"]) == 0
    assert inspect(["images_train", "--html", "corpus.html", "--sheet", "sheet.png"]) == 0
    assert vocab.main(["images_train", "--output", "words/vocab.txt"]) == 0
    assert preview.main(["images_train", "--tokenizer", "words", "--output", "preview.png"]) == 0
    cache = DiskCache("cache", 10**6)
    assert cache.reserve({"aa": 3}) == {"aa": True}
    cache.put("aa", b"abc")
    cache.close()
    assert unlike_the_umask(shared_disk) == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_run_and_its_tools_write(shared_disk, corpora):
    run, cache = shared_disk / "run", f"feature_cache={shared_disk}/features"
    settings = [f"output_dir={run}", cache, "max_steps=2", "save_every=1", "tensorboard=true", "gallery=2"]
    tiny = corpora / "tiny.yaml"
    again = [f"checkpoint={run}", f"output_dir={shared_disk}/evaluation", cache]
    run_jobs(shared_disk, [job("pretrain", tiny, *settings, "stop_key=images"), job("evaluate", tiny, *again)])
    assert report([str(run), "--output", str(shared_disk / "report.html")]) == 0
    assert compare([str(run), str(run), "--json", str(shared_disk / "compared.json")]) == 0
    where = ["--output", str(shared_disk / "hits.jpg"), "--cache", str(shared_disk / "searched")]
    assert search([str(run), str(corpora / "images_test"), "a red circle", *where]) == 0
    for name in ("copy", "first.pth"):
        assert export([str(run), str(shared_disk / name)]) == 0
    assert unlike_the_umask(shared_disk) == {}
