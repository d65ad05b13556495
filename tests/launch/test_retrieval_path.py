"""Pre-training, fine-tuning from it, and evaluation of both, as a user starts them."""

import json

import pytest
from small_run import metrics, run

pytestmark = pytest.mark.timeout(300)


def test_pretrain_finetune_evaluate(corpora, tmp_path):
    tiny, pretrained, tuned = corpora / "tiny.yaml", tmp_path / "pretrained", tmp_path / "tuned"
    result = run("pretrain", tiny, f"output_dir={pretrained}", "scheduler.epochs=1", processes=1)
    assert result.returncode == 0, result.stderr
    model = json.loads((pretrained / "checkpoints/step_00000008/weights/model.json").read_text())["config"]
    assert model["vision_encoder"]["width"] == 32

    # The architecture is not repeated, only what fine-tuning changes.
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text(
        f"train_corpus: {corpora}/clips_train\n"
        f"test_corpus: {{motion: {corpora}/clips_test_motion, images: {corpora}/images_test}}\n"
        "stop_key: motion\n"
        "video_input: {num_frames: 2, num_frames_test: 3}\n"
        "add_temporal_embed: true\n"
        "temporal_vision_encoder: {enable: true, num_layers: 1}\n"
        "loss_weight: {mlm: 0.0}\n"
        "batch_size: {image: 8, video: 4}\n"
        "max_txt_l: {image: 12, video: 12}\n"
        "scheduler: {epochs: 2, warmup_epochs: 0}\n"
        "precision: fp32\nk_test: 4\nlog_every: 1\ndeepspeed: deepspeed_configs/cpu.json\n"
    )
    result = run("finetune_retrieval", recipe, f"pretrained_path={pretrained}", f"output_dir={tuned}")
    assert result.returncode == 0, result.stderr
    assert (tuned / "checkpoints/best/weights/model.safetensors").is_file()
    assert (tuned / "finished.json").is_file()
    assert {path.name for path in (tuned / "evaluation").iterdir()} == {"epoch_01", "epoch_02", "final"}
    assert [path.parent.name for path in tuned.glob("evaluation/*/scores.npz")] == ["final"]  # large: once a run
    final = json.loads((tuned / "evaluation/final/metrics.json").read_text())
    assert set(final) == {"motion/", "motion_emb/", "images/", "images_emb/"}
    steps = [line for line in metrics(tuned) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 7))
    assert all("loss_mlm" not in line for line in steps)

    # Zero-shot and fine-tuned, with a configuration that says nothing of the architecture.
    where = (f"output_dir={tuned}", "video_input.num_frames_test=3", "label=again")
    result = run("evaluate", recipe, f"checkpoint={tuned}", *where, processes=1)
    assert result.returncode == 0, result.stderr
    again = json.loads((tuned / "evaluation/again/metrics.json").read_text())
    assert again == final
    assert json.loads((tuned / "metrics.json").read_text()) == final
    assert "motion_emb" in result.stdout

    result = run("evaluate", recipe, f"checkpoint={pretrained}", f"output_dir={pretrained}", processes=1)
    assert result.returncode == 2
    assert "fine-tune with launch/finetune_retrieval.py first" in result.stderr
    where = (f"checkpoint={pretrained}", f"output_dir={pretrained}", "video_input.num_frames_test=1")
    result = run("evaluate", tiny, *where, processes=1)
    assert result.returncode == 0, result.stderr
    assert (pretrained / "evaluation/1_frame/report.html").is_file()
