"""Which folder a run may use, and the error when it may not."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints.files import Weights, read_weights, write_weights
from model.config import ModelConfig, VisionConfig
from preprocessing.text import SPECIAL
from train.checkpoints.writing import STATE, VERSION, TrainingState, check_checkpoint, complete_checkpoints, read_state
from train.config.settings import OptimizerConfig, RunConfig
from train.folder import RunFolder


def checkpoint(folder, step, complete=True, **state):
    path = folder / f"step_{step:08}"
    path.mkdir(parents=True)
    if complete:
        (path / STATE).write_text(json.dumps({"version": VERSION, **vars(TrainingState(step=step, **state))}))
    return path


def started(path, config):
    """A run that has begun and saved step 5."""
    folder = RunFolder(path)
    folder.claim(config)
    folder.begin(config)
    checkpoint(folder.checkpoints, 5)
    folder.release()
    return folder


def test_a_new_folder_and_the_same_run_again(tmp_path):
    started(tmp_path / "run", RunConfig(seed=7, log_every=5))
    RunFolder(tmp_path / "run").claim(RunConfig(seed=7, log_every=50, keep_checkpoints=9, threads=3, data_root="/m"))
    RunFolder(tmp_path / "new/below").claim(RunConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunConfig(optimizer=OptimizerConfig(lr=0.5)), r"optimizer\.lr is 0\.0001 in that run, 0\.5 here"),
        (RunConfig(resume=False), "resume is off"),
        (RunConfig(), r"finished: choose another output_dir"),
    ],
)
def test_an_earlier_run_is_refused_with_other_settings_without_resume_and_when_finished(tmp_path, config, message):
    folder = started(tmp_path, RunConfig())
    if "finished" in message:
        folder.finish({"step": 5})
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path).claim(config)


def test_a_run_with_a_backbone_of_timm_resumes_that_was_begun_before_pixel_statistics_were_recorded(tmp_path):
    started(tmp_path, RunConfig(vision_encoder=VisionConfig(type="convnext_atto")))
    vision = VisionConfig(type="convnext_atto", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    RunFolder(tmp_path).claim(RunConfig(vision_encoder=vision))
    vision.mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"vision_encoder\.mean is \[0\.485, .*\] in that run, \[0\.1, "):
        RunFolder(tmp_path)._check_same(RunConfig(vision_encoder=vision))


def test_a_run_without_a_checkpoint_may_be_replaced(tmp_path):
    folder = started(tmp_path, RunConfig())
    shutil.rmtree(folder.checkpoints)
    RunFolder(tmp_path).claim(RunConfig(seed=1))


def test_anything_but_evaluations_is_refused(tmp_path):
    (tmp_path / "evaluation/zero_shot").mkdir(parents=True)
    (tmp_path / "metrics.json").write_text("{}")
    RunFolder(tmp_path).claim(RunConfig())
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a run folder: choose another output_dir"):
        RunFolder(tmp_path).claim(RunConfig())
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").claim(RunConfig())


HOLDER = """
import sys
from train.config.settings import RunConfig
from train.folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.claim(RunConfig())
if sys.argv[2] == "stopping":
    folder.note_stopping()
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("state", ["running", "stopping"])
def test_two_processes_cannot_have_it(tmp_path, state):
    command = [sys.executable, "-c", HOLDER, str(tmp_path), state]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    if state == "running":
        with pytest.raises(ValueError, match=rf"in use by a running process \({holder.pid} on "):
            RunFolder(tmp_path).claim(RunConfig())
        holder.kill()
    else:
        holder.stdin.write("\n")
        holder.stdin.flush()
        RunFolder(tmp_path).claim(RunConfig())  # waits until the other one has gone
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()


def test_only_complete_checkpoints_count(tmp_path):
    newest = [checkpoint(tmp_path, step) for step in (5, 123_456_789, 20)]
    checkpoint(tmp_path, 30, complete=False)
    (tmp_path / ".step_00000040.part").mkdir()
    (tmp_path / "best").mkdir()
    assert complete_checkpoints(tmp_path) == [newest[0], newest[2], newest[1]]
    assert complete_checkpoints(tmp_path / "none") == []


def test_a_damaged_state_is_reported(tmp_path):
    path = checkpoint(tmp_path, 5)
    (path / STATE).write_text('{"version": 2')
    with pytest.raises(ValueError, match=r"state\.json is damaged.*remove"):
        read_state(path)
    (path / STATE).write_text(json.dumps({"version": 9}))
    with pytest.raises(ValueError, match="is of version 9"):
        read_state(path)


@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "missing"])
@pytest.mark.parametrize(
    "name", ["state.json", "weights/model.json", "weights/vocab.txt", "parts/rank_00001_of_00002.safetensors"]
)
def test_what_a_power_cut_leaves_of_a_checkpoint_is_named_with_the_remedy(tmp_path, name, damage):
    path = checkpoint(tmp_path, 5)
    for folder in ("weights", "parts"):
        (path / folder).mkdir()
    (path / "weights/vocab.txt").write_text("".join(f"{word}\n" for word in (*SPECIAL, "a", "b", "c")))
    write_weights(Weights(ModelConfig(), {"x": torch.ones(8)}), path / "weights")
    for rank in range(2):
        save_file({"x|0|weight": torch.ones(8)}, str(path / f"parts/rank_{rank:05}_of_00002.safetensors"))
    check_checkpoint(path)
    data = (path / name).read_bytes()
    left = {"empty": b"", "half": data[: len(data) // 2], "zeros": bytes(len(data))}
    (path / name).unlink()
    if damage in left:
        (path / name).write_bytes(left[damage])
    if name == "state.json" and damage == "missing":
        assert complete_checkpoints(tmp_path) == []
        return
    with pytest.raises(ValueError, match=r"step_00000005.* an earlier one is used"):
        check_checkpoint(path)
    if name == "weights/vocab.txt" and damage == "empty":
        with pytest.raises(ValueError, match=r"vocab\.txt has 0 bytes instead of \d+: the file is damaged"):
            read_weights(path / "weights")


def test_settings_that_a_power_cut_has_emptied_are_written_again(tmp_path, caplog):
    started(tmp_path, RunConfig())
    (tmp_path / "config.yaml").write_bytes(b"")
    shutil.rmtree(tmp_path / "checkpoints")
    started(tmp_path, RunConfig(seed=3))
    assert "config.yaml is empty" in caplog.text
    with pytest.raises(ValueError, match="seed is 3 in that run"):
        RunFolder(tmp_path).claim(RunConfig())
