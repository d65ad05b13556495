"""The same training on other processes, ZeRO stages and parts of a batch: what may differ, and what not."""

import shutil

import pytest
import torch
from small_run import job, learned, run_jobs

from sharding.build import build_corpus

pytestmark = pytest.mark.timeout(900)

# Questions: their loss is a sum over the batch, so it does not depend on how the batch is shared out. No dropout.
TASK = """
task: qa
epoch_unit: questions
vision_encoder: {type: vit, patch_size: 16, width: 32, depth: 2, heads: 2, drop_path: 0.0}
text_encoder: {width: 32, layers: 3, fusion_layer: 2, heads: 2, intermediate: 64, max_positions: 32, dropout: 0.0}
image_res: 32
max_txt_l: {image: 12, video: 12}
video_input: {num_frames: 2}
batch_size: {image: 8, video: 8}
optimizer: {lr: 1.0e-3, max_grad_norm: 1.0}
precision: fp32
log_every: 1
save_every: 6
keep_checkpoints: 9
"""


@pytest.fixture(scope="module")
def recipe(corpora):
    """qa_elastic.yaml on 24 questions: 3 steps an epoch."""
    shapes = corpora / "shapes"
    annotations = [str(shapes / "qa_train.json")]
    build_corpus(annotations, str(shapes / "media"), "video", str(corpora / "qa"), size=32, fps=4, workers=1)
    path = corpora / "qa_elastic.yaml"
    path.write_text(TASK + f"train_corpus: {corpora}/qa\ntokenizer: {corpora}/vocab.txt\n")
    return path


def losses(folder):
    return torch.tensor([line["loss_qa"] for line in learned(folder)])


def assert_close(one, other, rtol):
    torch.testing.assert_close(losses(one), losses(other), rtol=rtol, atol=0)


def zero(name):
    return f"deepspeed=deepspeed_configs/{name}.json"


def test_a_run_resumes_with_other_numbers_of_processes_and_other_stages(recipe, tmp_path):
    steps = "max_steps=12", "scheduler.epochs=12"
    whole = tmp_path / "whole"
    run_jobs(tmp_path, [job("pretrain", recipe, f"output_dir={whole}", zero("zero1"), *steps)])
    for processes, name in ((1, "zero3"), (4, "zero2"), (4, "zero0"), (1, "zero1")):
        part = tmp_path / f"on_{processes}_{name}"
        shutil.copytree(whole, part)
        (part / "finished.json").unlink()
        shutil.rmtree(part / "checkpoints/step_00000012")
    for processes, names in ((1, ("zero3", "zero1")), (4, ("zero2", "zero0"))):
        jobs = [
            job("pretrain", recipe, f"output_dir={tmp_path}/on_{processes}_{name}", zero(name), *steps)
            for name in names
        ]  # fmt: skip
        run_jobs(tmp_path, jobs, processes=processes)
    for part in tmp_path.glob("on_*"):
        assert [line["step"] for line in learned(part)] == list(range(1, 13))
        assert_close(part, whole, rtol=2e-4)
        assert torch.equal(losses(part)[:6], losses(whole)[:6])
        assert not torch.equal(losses(part)[6:], losses(whole)[:6])


def test_accumulation_equals_the_larger_batch(recipe, tmp_path):
    settings = "max_steps=6", zero("zero1")
    jobs = [
        job("pretrain", recipe, f"output_dir={tmp_path}/parts_{parts}", *settings, f"accumulate={parts}")
        for parts in (1, 2, 4)
    ]  # fmt: skip
    jobs.append(job("pretrain", recipe, f"output_dir={tmp_path}/again", *settings, "gradient_checkpointing=true"))
    run_jobs(tmp_path, jobs)
    for other in ("parts_2", "parts_4", "again"):
        assert_close(tmp_path / other, tmp_path / "parts_1", rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_and_offload_learn_the_same_from_images_and_clips_in_turn(corpora, tmp_path):
    names = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    settings = (
        "video_input.num_frames=2", "add_temporal_embed=true", "temporal_vision_encoder.enable=true",
        "temporal_vision_encoder.num_layers=1", "vision_encoder.drop_path=0", "text_encoder.dropout=0",
    )  # fmt: skip
    jobs = [
        job("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/{name}", zero(name), *settings)
        for name in names
    ]  # fmt: skip
    run_jobs(tmp_path, jobs, timeout=1200)
    plain = learned(tmp_path / "zero0")
    assert [line["step"] for line in plain] == list(range(1, 33))
    assert {line["media_type"] for line in plain} == {"image", "video"}
    assert plain[-1]["loss"] < plain[0]["loss"]
    for name in names:
        for key in ("loss", "grad_norm"):
            found, expected = ([line[key] for line in learned(tmp_path / each)] for each in (name, "zero0"))
            assert found == pytest.approx(expected, rel=5e-3), (name, key)
