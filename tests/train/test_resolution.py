"""A schedule of image sizes: its rules, what changes with the size, and runs killed in the middle of a change."""

import time

import pytest
import torch
from small_run import PRECISIONS, job, learned, metrics, run_jobs, start_jobs
from test_resume import check_same, cut_off, kill_all

from model.building import build_model
from model.checkpoints.loading import load_weights
from model.config import ModelConfig, TextConfig, VisionConfig
from preprocessing.text import Tokenizer
from runtime.errors import UserError
from train.checkpoints.shards import resized_state
from train.config.settings import RunConfig, SchedulerConfig
from train.resolution import check_sizes, image_res_at, image_sizes

pytestmark = pytest.mark.timeout(600)

BEIT = "vision_encoder={type: beit, patch_size: 8, width: 32, depth: 2, heads: 2}"  # 4 x 4 patches, then 8 x 8
STEPS = 16  # two epochs of 8; cut_off and check_same of test_resume.py count on it


def settings(folder, kind="zero1", *others):
    zero, *more = kind.split("_")
    precision = more[0] if more else "fp32"
    return (
        BEIT, f"output_dir={folder}", "image_res=64", "scheduler.image_res={32: 1}", "scheduler.epochs=2",
        "keep_checkpoints=9", "temp=0.9", "stop_key=images", "splits=[images]", "gallery=0",
        f"deepspeed=deepspeed_configs/{zero}.json", f"precision={precision}", *others,
    )  # fmt: skip


def schedule(smaller, epochs=10, image_res=224):
    return RunConfig(image_res=image_res, scheduler=SchedulerConfig(epochs=epochs, image_res=smaller))


def beit(image_res):
    vision = VisionConfig(type="beit", patch_size=8, width=32, depth=1, heads=2)
    text = TextConfig(width=32, layers=1, fusion_layer=0, heads=2, intermediate=32, vocab_size=300)
    return build_model(ModelConfig(image_res=image_res, vision_encoder=vision, text_encoder=text))


def test_the_sizes_of_the_epochs():
    run = schedule({112: 6, 160: 2})
    assert image_sizes(run) == [(0, 112), (6, 160), (8, 224)]
    assert [image_res_at(run, epoch) for epoch in range(11)] == [112] * 6 + [160] * 2 + [224] * 3
    assert image_sizes(schedule({})) == [(0, 224)]


@pytest.mark.parametrize(
    ("smaller", "what"),
    [
        ({160: 2, 112: 2}, "the size 160: must be at least 1 and smaller than the following size, 112"),
        ({112: 2, 224: 2}, "the size 224: must be at least 1 and smaller than image_res, 224"),
        ({0: 112, 8: 224}, "the size 0: must be at least 1"),
        ({112: 0}, "0 epochs at 112 pixels: must be at least 1"),
        ({112: 10}, "10 epochs at smaller sizes, scheduler.epochs is 10: leave at least one epoch for image_res"),
    ],
)
def test_a_schedule_that_does_not_end_at_image_res_is_an_error(smaller, what):
    with pytest.raises(UserError, match=what):
        image_sizes(schedule(smaller))


@pytest.mark.parametrize(
    ("sizes", "what"),
    [((36, 64), "image_res is 36, not a multiple of vision_encoder.patch_size 8"), ((16, 64), "cannot be resized")],
)
def test_sizes_that_do_not_fit_the_model_are_errors_before_training(corpora, sizes, what):
    with pytest.raises(UserError, match=what):
        check_sizes(
            beit(sizes[0]), schedule({sizes[0]: 2}, image_res=sizes[1]), Tokenizer.load(str(corpora / "vocab.txt"))
        )


def test_moments_of_a_table_are_resized_with_it_and_no_update_exceeds_the_learning_rate():
    model = beit(64)
    name = "vision_encoder.transformer.blocks.0.attn.relative_position_bias_table"
    shape = dict(model.named_parameters())[name].shape
    stored = {"weight": torch.randn(7 * 7 + 3, 2), "exp_avg": torch.randn(7 * 7 + 3, 2)}
    stored["exp_avg_sq"] = stored["exp_avg"].square() * torch.rand(52, 2)
    found = resized_state(model, name, stored, shape)
    again = resized_state(model, name, {"weight": stored["weight"] + 2 * stored["exp_avg"]}, shape)
    assert torch.allclose(again["weight"], found["weight"] + 2 * found["exp_avg"], atol=1e-5)
    assert (found["exp_avg"].abs() <= found["exp_avg_sq"].sqrt() * (1 + 1e-6)).all()
    assert all(tensor.shape == shape for tensor in found.values())


KINDS = ("zero1_bf16", "zero3")


def kill_in_the_change(corpora, tmp_path, folder, kind):
    """Start a run and kill its processes when it has logged the change of size, before the first step after it."""
    process = start_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", *settings(folder, kind))])
    deadline = time.monotonic() + 300
    log = folder / "log.txt"
    while not (log.is_file() and "image_res changes from 32 to 64" in log.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kill_all(process)
    process.wait(60)
    assert learned(folder)[-1]["step"] == STEPS // 2
    assert not (folder / "finished.json").exists()


def launch(corpora, tmp_path, runs):
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", *settings(folder, kind)) for kind, folder in runs])


def evaluations(folder):
    return [line for line in metrics(folder) if "evaluation" in line]


def check_runs_resumed_from(steps, kinds, corpora, tmp_path):
    """Runs of all kinds equal those resumed from these steps, and one that was killed in the change of size."""
    runs = {kind: tmp_path / kind for kind in kinds}
    killed = tmp_path / "killed"
    kill_in_the_change(corpora, tmp_path, killed, kinds[0])
    launch(corpora, tmp_path, runs.items())
    # ZeRO 3, which changes how later runs of a process compute linear layers, is last.
    resumed = [(kinds[0], killed), *((kind, cut_off(runs[kind], step)) for kind, step in zip(kinds, steps))]
    launch(corpora, tmp_path, resumed)
    for kind, folder in resumed:
        check_same(runs[kind], folder)
        assert [line["image_res"] for line in learned(folder)] == [32] * 8 + [64] * 8
        assert evaluations(folder) == evaluations(runs[kind])
        assert [line["evaluation"] for line in evaluations(folder)] == ["epoch_01", "epoch_02", "final"]
    sizes = [load_weights(runs[kinds[0]] / f"checkpoints/step_{step:08}").config.image_res for step in (5, 8, 10)]
    assert sizes == [32, 32, 64]


def test_runs_killed_in_a_change_of_size_equal_uninterrupted_ones(corpora, tmp_path):
    check_runs_resumed_from((5, 8), KINDS, corpora, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 8, 10])
def test_every_zero_stage_resumes_before_at_and_after_the_change(corpora, tmp_path, step):
    kinds = [f"zero{stage}_{precision}" for stage in range(4) for precision in PRECISIONS]
    check_runs_resumed_from([step] * len(kinds), kinds, corpora, tmp_path)
