"""Every command names a bucket that does not exist."""

import json
from pathlib import Path

import pytest
from object_stores import Store
from PIL import Image

from loaders.bench import main as bench
from sharding.answers import main as answers
from sharding.build import main as build
from sharding.index import main as index
from sharding.inspect import main as inspect
from sharding.verify import main as verify


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_a_bucket_that_does_not_exist_is_named(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scheme = store.root.partition("://")[0]
    url = f"{scheme}://no-such-bucket-{tmp_path.name[-1]}x/folder"
    Image.new("RGB", (48, 32)).save(tmp_path / "0.jpg")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "0.jpg", "caption": "x"}]))
    media = ["--media-root", str(tmp_path), "--media-type", "image", "--workers", "1"]
    here, remote = str(tmp_path / "out"), ["--media-root", url, *media[2:]]
    words = {
        "build --output": (build, ["--annotations", str(tmp_path / "a.json"), *media, "--output", url]),
        "build --annotations": (build, ["--annotations", url + "/a.json", *media, "--output", here]),
        "build pattern": (build, ["--annotations", url + "/*.json", *media, "--output", here]),
        "build --media-root": (build, ["--annotations", str(tmp_path / "a.json"), *remote, "--output", here]),
        "index": (index, [url]),
        "index named": (index, [url + "/x-{000..001}.tar"]),
        "inspect": (inspect, [url]),
        "inspect --failures": (inspect, [url, "--failures"]),
        "verify": (verify, [url]),
        "verify --repair": (verify, [url, "--repair"]),
        "answers": (answers, [url, "--output", str(tmp_path / "answers.json")]),
        "bench": (bench, [url, "--seconds", "0.2"]),
    }
    bucket = url.split("/")[2]
    printed = {}
    for name, (command, arguments) in words.items():
        code = command(arguments)
        printed[name] = code, capsys.readouterr().err.strip().splitlines()[-1]
    message = f"bucket {bucket} does not exist: create it, or check the name"
    wrong = {name: line for name, line in printed.items() if line[0] != 2 or message not in line[1]}
    assert not wrong
