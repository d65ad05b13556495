"""The commands of docs/packing.md work unchanged on a small corpus of Shapes."""

import importlib
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import ROOT

from sharding.shards.schema import read_corpus, read_index

PAGE = ROOT / "docs" / "packing.md"
ELSEWHERE = re.compile(r"\.\.\.|s3://|https://|\bFILES\b|^ray |^sbatch ")  # what a test cannot have or fill in


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [re.sub(r"\s#.*", "", line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not ELSEWHERE.search(line)]


@pytest.fixture
def folder(shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page's commands find: photos and clips with their annotations, a table, a tar of clips."""
    shutil.copytree(shapes.folder / "media", tmp_path / "photos")
    (tmp_path / "clips").symlink_to(tmp_path / "photos")
    (tmp_path / "media").symlink_to(tmp_path / "photos")
    records = json.loads((shapes.folder / "images_train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records))
    rows = [{"file": record["image"], "text": "x", "split": "train"} for record in records[:20]]
    rows[3]["split"] = "val"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    shutil.copy(shapes.folder / "clips_train.json", tmp_path / "clips.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> int:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], command
    return importlib.import_module(words[2]).main(words[3:])


def with_tar(folder: Path) -> None:
    """The clips in a tar, and annotations of its members."""
    records = json.loads((folder / "clips.json").read_text())
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "00000.tar", "w") as tar:
        for record in records:
            tar.add(folder / "clips" / record["video"], Path(record["video"]).name)
            record["video"] = f"00000.tar/{Path(record['video']).name}"
    (folder / "clips.json").write_text(json.dumps(records))
    shutil.rmtree(folder / "data" / "clips")


def test_every_command_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = commands()
    assert len(lines) >= 10
    for line in lines:
        if "tars/" in line:
            with_tar(folder)
        command = line.replace("URL", "data/photos")
        if "KEY" in command:
            key = read_index(read_corpus("data/photos"), 0)["key"][0].as_py()
            command = command.replace("KEY", key).replace("--frame 3", "--frame 0")
        assert run(command) == 0, line
    assert (folder / "clips.html").stat().st_size > 10_000
    assert (folder / "sheet.png").is_file()
    assert read_corpus("data/mine").samples == 19
    assert read_corpus("data/clips").media_type == "video"
