"""`make photos`: the photos left out for the test, and inputs that it refuses before any training."""

import json
import subprocess

import pytest
from small_run import ROOT

from launch.photos import main, write_parts


def test_all_captions_of_a_photo_are_in_one_part_and_the_users_file_stays(tmp_path):
    names = [f"{number:02}.jpg" for number in range(25)]
    rows = [{"image": name, "caption": f"view {view}"} for view in range(5) for name in names]
    captions = tmp_path / "train.json"
    captions.write_text(json.dumps(rows))
    write_parts(captions, tmp_path / "captions")
    assert json.loads(captions.read_text()) == rows
    parts = {name: json.loads((tmp_path / f"captions/{name}.json").read_text()) for name in ("train", "test")}
    photos = {name: [row["image"] for row in part] for name, part in parts.items()}
    assert set(photos["test"]) == {"00.jpg", "10.jpg", "20.jpg"}
    assert set(photos["train"]) == set(names) - set(photos["test"])
    assert {name: len(part) for name, part in photos.items()} == {"train": 110, "test": 15}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "is not JSON"),
        ('{"image": "a.jpg"}', "is not a list of photos"),
        ('["a.jpg"]', "is not a list of photos"),
        (json.dumps([{"image": "a.jpg", "caption": str(number)} for number in range(50)]), "has 1 photos"),
        (None, "No such file"),
    ],
)
def test_captions_that_cannot_be_parted_are_one_line(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "train.json").write_text(content)
    assert main([str(tmp_path / "train.json"), str(tmp_path / "captions")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def photos(folder, *words):
    """Run the script in `folder`; returns its exit code and what it said."""
    command = ["bash", str(ROOT / "launch/photos.sh"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_the_script_asks_for_folder_and_captions_and_refuses_results_of_others(tmp_path):
    code, said = photos(tmp_path, "", "", "", "photos")  # `make photos` without them
    assert code == 2
    assert said.startswith("Usage: bash launch/photos.sh FOLDER CAPTIONS")
    wrong = photos(tmp_path, "yours", "yours/train.json", "", "photos", "weight")
    assert wrong == (code, f"error: FROM is weight: must be weights or nothing\n{said}")
    assert not (tmp_path / "photos").exists()
    (tmp_path / "photos/steps").mkdir(parents=True)
    (tmp_path / "photos/steps/inputs").write_text("mine mine/train.json \n")
    code, said = photos(tmp_path, "yours", "yours/train.json", "", "photos")
    assert code == 2
    assert "photos has results of other inputs (mine mine/train.json ): give another folder" in said
    code, said = photos(tmp_path, "mine", "mine/train.json", "", "photos", "nothing")
    assert code == 2
    assert "photos has results of other inputs (mine mine/train.json ): give another folder" in said
