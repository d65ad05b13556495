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


@pytest.mark.shared
@pytest.mark.parametrize("folder", [case for case in CASES if case.name == "08_pure"], ids=lambda folder: folder.name)
def test_a_changed_table_fails_the_command(folder, tmp_path, capsys):
    for change in ("tokenizer.json", "lr_schedule.json", "image"):
        copy = tmp_path / change / folder.name
        shutil.copytree(folder, copy)
        shutil.copy(GOLDEN / "vocab.txt", copy.parent)
        for path in copy.rglob("*"):
            path.chmod(0o755)
        table = copy / "tables" / change
        if change == "tokenizer.json":
            rows = json.loads(table.read_text())
            rows["rows"][3]["input_ids"][1] += 1
            table.write_text(json.dumps(rows))
        elif change == "lr_schedule.json":
            cases = json.loads(table.read_text())
            cases[0]["lr_at_step"][20][0] *= 1.001
            table.write_text(json.dumps(cases))
        else:
            shutil.copy(copy / "images" / "im0.png", copy / "images" / "im2.png")
        assert main([str(copy)]) == 1
        assert f"{change.removesuffix('.json')}" in capsys.readouterr().out


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
