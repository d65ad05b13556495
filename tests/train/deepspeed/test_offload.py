"""The optimiser's state off the device: in host memory or on a disk, training learns the same."""

import json
from dataclasses import replace

import pytest
import torch
from small_engine import SMALL, make, numbers, step
from small_run import PRECISIONS

from model.config import TemporalConfig
from runtime.ranks import Ranks
from train.config.settings import RunConfig
from train.deepspeed.engine import deepspeed_config

pytestmark = pytest.mark.usefixtures("one_process")

# So many words that ZeRO takes their rows to the disk: it does not for less than a megabyte.
TEMPORAL = replace(
    SMALL,
    text_encoder=replace(SMALL.text_encoder, vocab_size=20_000),
    num_frames=2,
    add_temporal_embed=True,
    temporal_vision_encoder=TemporalConfig(enable=True, num_layers=1),
)


def after_steps(zero, **settings):
    """Weights and moments after clips and images in turn; the images leave the temporal encoder out."""
    engine, guard = make(zero, "fp32", TEMPORAL, **settings)
    for number, num_frames in enumerate((2, 1, 2, 1), 1):
        torch.manual_seed(number)
        step(engine, guard, number, num_frames=num_frames)
    return engine, numbers(engine)


@pytest.fixture(scope="module")
def plain(one_process):
    """What is learned under ZeRO 0."""
    return after_steps("zero0")[1]


def assert_same(found, plain):
    for (name, kind), tensor in plain.items():
        if kind == "exp_avg":  # weights would show no scale
            difference = (found[name, kind].flatten() - tensor.flatten()).norm()
            assert difference <= 0.02 * tensor.norm() + 1e-6, name


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_what_a_step_does_not_use_learns_nothing_from_the_step_before(zero, plain):
    assert_same(after_steps(zero)[1], plain)


@pytest.mark.slow  # minutes where DeepSpeed's access to disks has yet to be compiled
@pytest.mark.timeout(1200)
def test_on_a_disk_it_learns_the_same(plain, tmp_path):
    engine, found = after_steps("zero3_nvme", nvme_path=str(tmp_path))
    assert_same(found, plain)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.swp")) > 3 * 4 * 20_000 * 32  # weights and moments
    assert engine.optimizer.swap_optimizer


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_skipped_step_leaves_no_gradient_on_the_disk(precision, tmp_path):
    engine, guard = make("zero3_nvme", precision, TEMPORAL, nvme_path=str(tmp_path))
    guard.loss_scale.load({"cur_scale": 64.0})
    step(engine, guard, 1, num_frames=2)
    before = numbers(engine)
    step(engine, guard, 2, num_frames=2, poisoned=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in numbers(engine).items())
    step(engine, guard, 3, num_frames=1)
    after = numbers(engine)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def config_of(zero, tmp_path, **settings):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    return deepspeed_config(RunConfig(deepspeed=str(path), **settings), Ranks())


def test_the_folder_stands_in_the_yaml_or_the_json(tmp_path):
    given = {"device": "nvme", "nvme_path": str(tmp_path / "json")}
    config = config_of({"offload_optimizer": given}, tmp_path)
    assert config["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(tmp_path / "json")
    config = config_of({"offload_optimizer": given}, tmp_path, nvme_path=str(tmp_path / "yaml"))
    assert config["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(tmp_path / "yaml")
    assert (tmp_path / "yaml").is_dir()


def test_what_does_not_work_on_a_disk_is_told(tmp_path, monkeypatch):
    nvme = {"device": "nvme"}
    with pytest.raises(ValueError, match=r"nvme_path is not set: .*zero\.json keeps"):
        config_of({"offload_optimizer": nvme}, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nvme_path=.*file cannot be used \(File exists\): give a folder"):
        config_of({"offload_optimizer": nvme}, tmp_path, nvme_path=str(tmp_path / "file"))
    with pytest.raises(ValueError, match="has offload_param on nvme: take cpu there"):
        config_of({"offload_optimizer": nvme, "offload_param": nvme}, tmp_path, nvme_path=str(tmp_path))
    with pytest.raises(ValueError, match="pipeline_read or pipeline_write"):
        config_of({"offload_optimizer": {**nvme, "pipeline_read": True}}, tmp_path, nvme_path=str(tmp_path))
    monkeypatch.setenv("CC", "false")  # a compiler that does not find libaio either
    with pytest.raises(ValueError, match=r"install g\+\+ and libaio \(Debian: libaio-dev"):
        config_of({"offload_optimizer": nvme}, tmp_path, nvme_path=str(tmp_path))
