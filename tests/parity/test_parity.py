"""The recorded cases of the official code, where they are beside the checkout, and the command that compares them."""

import json
import shutil

import pytest
import torch
from places import SHARED

from tests.parity.__main__ import COMPARISONS, compare_case, find_cases, main
from tests.parity.comparison import as_lists

GOLDEN = SHARED / "golden"
CASES = find_cases(GOLDEN) if GOLDEN.is_dir() else []


@pytest.mark.shared
@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_every_recorded_case_is_within_tolerance(folder):
    result = compare_case(folder)
    assert result.passed, (result.worst, result.worst_of, result.notes)


@pytest.mark.shared
@pytest.mark.parametrize("folder", CASES[:1], ids=lambda folder: folder.name)
def test_a_changed_weight_fails_the_command(folder, tmp_path, capsys):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    (copy / "ckpt.pth").chmod(0o644)
    copy.chmod(0o755)
    content = torch.load(copy / "ckpt.pth", weights_only=False)
    content["model"]["vision_layernorm.bias"][0] += 0.01
    torch.save(content, copy / "ckpt.pth")
    assert main([str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def changed_token(case):
    path = case / "tables/tokenizer.json"
    table = json.loads(path.read_text())
    table["rows"][3]["input_ids"][1] += 1
    path.write_text(json.dumps(table))


def changed_learning_rate(case):
    path = case / "tables/lr_schedule.json"
    cases = json.loads(path.read_text())
    cases[0]["lr_at_step"][20][0] *= 1.001
    path.write_text(json.dumps(cases))


def changed_image(case):
    shutil.copy(case / "images/im0.png", case / "images/im2.png")


@pytest.mark.shared
@pytest.mark.skipif(not CASES, reason="no recorded cases here")
@pytest.mark.parametrize(
    ("name", "change"), [("tokenizer", changed_token), ("lr_schedule", changed_learning_rate), ("image", changed_image)]
)
def test_a_changed_table_fails_the_command(name, change, tmp_path, capsys):
    case = shutil.copytree(GOLDEN / "08_pure", tmp_path / "08_pure")
    shutil.copy(GOLDEN / "vocab.txt", tmp_path)
    for path in case.rglob("*"):
        path.chmod(0o755)
    change(case)
    assert main([str(case)]) == 1
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("truth", [{"0": 2, "1": [0, 1]}, {"0": [2], "1": [0, 1]}, [2, [0, 1]], [[2], [0, 1]]])
def test_true_items_are_recorded_as_numbers_or_as_lists(truth):
    assert as_lists(truth) == [[2], [0, 1]]


def test_a_folder_without_cases_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no cases")


def test_an_unknown_group_is_named(tmp_path):
    (tmp_path / "case.json").write_text('{"group": "poetry"}')
    with pytest.raises(ValueError, match="'poetry' is none of " + ", ".join(COMPARISONS)):
        compare_case(tmp_path)
