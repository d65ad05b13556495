"""The official code's recorded numbers, where they lie beside the checkout; and the command that compares them."""

from pathlib import Path

import pytest

from model.parity import COMPARISONS, compare_case, find_cases, main

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
CASES = find_cases(GOLDEN) if GOLDEN.is_dir() else []


@pytest.mark.shared
@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_every_recorded_case_is_within_tolerance(folder):
    result = compare_case(folder)
    assert result.passed, (result.worst, result.worst_of, result.notes)


@pytest.mark.shared
@pytest.mark.parametrize("folder", CASES[:1], ids=lambda folder: folder.name)
def test_a_changed_weight_fails_the_command(folder, tmp_path, capsys):
    import shutil

    import torch

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    (copy / "ckpt.pth").chmod(0o644)
    copy.chmod(0o755)
    content = torch.load(copy / "ckpt.pth", weights_only=False)
    content["model"]["vision_layernorm.bias"][0] += 0.01
    torch.save(content, copy / "ckpt.pth")
    assert main([str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_folder_without_cases_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no cases")


def test_an_unknown_group_is_named(tmp_path):
    (tmp_path / "case.json").write_text('{"group": "poetry"}')
    with pytest.raises(ValueError, match="'poetry' is none of " + ", ".join(COMPARISONS)):
        compare_case(tmp_path)
