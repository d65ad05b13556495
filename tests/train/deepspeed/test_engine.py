"""The DeepSpeed configuration: completed from the YAML, contradictions refused."""

import json
from functools import partial

import pytest
from small_engine import make
from small_run import ROOT

import train.deepspeed.engine
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.config.settings import OptimizerConfig, RunConfig, load_settings
from train.deepspeed.engine import deepspeed_config, find_deepspeed_config
from train.optimizer import trainable_groups

JSONS = sorted((ROOT / "deepspeed_configs").glob("*.json"))


@pytest.fixture
def complete(tmp_path):
    def build(content, **settings):
        path = tmp_path / "zero.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return deepspeed_config(RunConfig(deepspeed=str(path), **settings), Ranks(world_size=4))

    return build


def test_the_yaml_decides_and_the_json_may_say_the_same_or_leave_it_open(complete):
    config = complete({"gradient_clipping": "auto"}, precision="bf16", optimizer=OptimizerConfig(max_grad_norm=2.0))
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
    assert config["gradient_clipping"] == 2.0
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (128, 32)
    config = complete({"bf16": {"enabled": True}, "fp16": {"initial_scale_power": 10}}, precision="bf16")
    assert config["gradient_clipping"] == 0
    assert config["fp16"] == {"initial_scale_power": 10, "enabled": False}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"train_batch_size": 5}, "batch_size"),
        ({"gradient_clipping": 1.0}, "optimizer.max_grad_norm"),
        ({"fp16": {"enabled": True}}, "precision"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
    ],
)
def test_a_contradiction_is_refused(complete, content, key):
    with pytest.raises(ValueError, match=rf"zero\.json sets .* but the YAML sets it \({key}\): remove it there"):
        complete(content)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_nvme_offload_is_refused_with_what_to_use_instead(complete, section):
    with pytest.raises(ValueError, match=rf"zero\.json sets {section}\.device to nvme.*zero3_offload\.json"):
        complete({"zero_optimization": {"stage": 3, section: {"device": "nvme"}}})
    with pytest.raises(ValueError, match=r"nvme_path.*NVMe offload is no longer supported.*zero3_offload\.json"):
        load_settings(ROOT / "configs/base.yaml", ["nvme_path=/disk"])


def test_mistakes_in_the_file_are_reported(complete):
    with pytest.raises(ValueError, match=r"zero\.json is not valid JSON"):
        complete("{stage: 1}")
    with pytest.raises(FileNotFoundError, match=r"deepspeed=nowhere\.json does not exist.*cpu\.json"):
        deepspeed_config(RunConfig(deepspeed="nowhere.json"), Ranks())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"zero\.json is \[1, 2\]: a DeepSpeed JSON is an object"),
        ({"zero_optimization": 2}, r"zero\.json sets zero_optimization to 2: it must be an object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, r"sets zero_optimization\.offload_optimizer to \"cpu\""),
        ({"fp16": False}, r"zero\.json sets fp16 to false: it must be an object"),
    ],
)
def test_what_is_no_object_is_reported(complete, content, message):
    with pytest.raises(UserError, match=message):
        complete(content)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 9}}, "stage: Input should be 0, 1, 2"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size: Input should be greater"),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, "overlap_com: Extra inputs are not permitted"),
        ({"communication_data_type": "int3"}, "Invalid communication_data_type"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(content, message, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        make(path, "fp32")
    assert str(caught.value).startswith(f"DeepSpeed refuses {path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.name)
def test_every_shipped_configuration_fits(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # found below the repository from anywhere
    name = f"deepspeed_configs/{path.name}"
    assert find_deepspeed_config(name) == path
    stage = deepspeed_config(RunConfig(deepspeed=name), Ranks())["zero_optimization"]["stage"]
    assert path.stem in (f"zero{stage}", f"zero{stage}_offload", "cpu")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_weights_begin_where_matrix_products_of_a_gpu_are_fast(zero, monkeypatch):
    ordered = partial(trainable_groups, aligned=True)
    monkeypatch.setattr(
        train.deepspeed.engine, "trainable_groups", lambda model, config, aligned: ordered(model, config)
    )
    engine, _ = make(zero, "bf16")  # with a temperature of one element among the weights
    parameters = dict(engine.module.named_parameters())
    assert any(parameter.numel() % 8 for parameter in parameters.values())
    misaligned = [name for name, each in parameters.items() if each.numel() % 8 == 0 and each.data_ptr() % 16]
    assert misaligned == []
