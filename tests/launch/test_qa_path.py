"""Fine-tuning for questions from a pre-training checkpoint, the same configuration evaluated, on Shapes' questions."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_run import job, learned, run, run_jobs

from eval.report.__main__ import main as report
from sharding import answers
from sharding.build import build_corpus

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def questions(corpora):
    """qa.yaml: a recipe for the questions about Shapes."""
    shapes = corpora / "shapes"
    for name in ("qa_train", "qa_test"):
        annotations = [str(shapes / f"{name}.json")]
        build_corpus(annotations, str(shapes / "media"), "video", str(corpora / name), size=32, fps=4, workers=1)
    path = corpora / "qa.yaml"
    path.write_text(
        f"task: qa\nepoch_unit: questions\ntrain_corpus: {corpora}/qa_train\n"
        f"test_corpus: {{test: {corpora}/qa_test}}\nstop_key: test\nanswer_list: {shapes}/answer_list.json\n"
        "batch_size: {image: 8, video: 4}\nscheduler: {epochs: 2, warmup_epochs: 0.5}\noptimizer: {lr: 1.0e-3}\n"
        "video_input: {num_frames: 2, num_frames_test: 3}\nprecision: fp32\nk_test: 8\nlog_every: 1\n"
        "deepspeed: deepspeed_configs/cpu.json\n"
    )
    return path


@pytest.fixture(scope="module")
def own(corpora):
    """A data root as configs/small/qa.yaml reads it, by the commands of its head, from JSON lists of questions."""
    root, shapes = corpora / "own", corpora / "shapes"
    for name, source in (("questions", "images_train"), ("questions_test", "images_test")):
        asked = [
            {"image": item["image"], "question": "what is it?", "answer": "ring" if "ring" in str(item) else "no ring"}
            for item in json.loads((shapes / f"{source}.json").read_text())
        ]
        (corpora / f"{name}.json").write_text(json.dumps(asked))
        build_corpus(
            [str(corpora / f"{name}.json")], str(shapes / "media"), "image", str(root / name), size=32, workers=1
        )
    assert answers.main([str(root / "questions"), "--output", str(root / "answers.json")]) == 0
    return root


def test_pretrain_finetune_for_questions_evaluate(corpora, questions, own, tmp_path):
    pretrained, tuned, other, mine = (tmp_path / name for name in ("pretrained", "tuned", "other", "mine"))
    few = ("batch_size.image=8", "scheduler.epochs=1", "log_every=1", f"data_root={own}")
    launches = [
        job("pretrain", corpora / "tiny.yaml", f"output_dir={pretrained}", "scheduler.epochs=1"),
        job("finetune_qa", questions, f"pretrained_path={pretrained}", f"output_dir={tuned}"),
        job("evaluate", questions, f"checkpoint={tuned}", f"output_dir={other}", "label=again"),
        job("finetune_qa", "configs/small/qa.yaml", f"pretrained_path={pretrained}", f"output_dir={mine}", *few),
    ]
    run_jobs(tmp_path, launches)

    # The decoder is as deep as the fusion layers, and begins as a copy of them.
    model = json.loads((tuned / "checkpoints/best/weights/model.json").read_text())["config"]
    assert model["answer_decoder"] == {"enable": True, "num_layers": 1}
    assert model["num_frames"] == 2
    before = load_file(pretrained / "checkpoints/step_00000008/weights/model.safetensors")
    after = load_file(tuned / "checkpoints/best/weights/model.safetensors")
    pair = before["text_encoder.layer.2.output.dense.weight"], after["answer_decoder.layer.0.output.dense.weight"]
    assert torch.corrcoef(torch.stack([each.flatten() for each in pair]))[0, 1] > 0.5

    losses = [line["loss_qa"] for line in learned(tuned)]
    assert losses[-1] < losses[0]
    assert {line["media_type"] for line in learned(tuned)} == {"video"}
    assert {path.name for path in (tuned / "evaluation").iterdir()} == {"epoch_01", "epoch_02", "final"}
    final = json.loads((tuned / "evaluation/final/metrics.json").read_text())
    assert 0 <= final["test"]["overall"] <= 100
    assert json.loads((other / "metrics.json").read_text()) == final

    assert json.loads((own / "answers.json").read_text()) == ["no ring", "ring"]
    assert {line["media_type"] for line in learned(mine)} == {"image"}
    assert report([str(mine), "--output", str(tmp_path / "report.html")]) == 0
    assert "mine · final" in (tmp_path / "report.html").read_text()

    result = run("finetune_retrieval", questions, f"output_dir={tmp_path}/wrong", processes=1)
    assert result.returncode == 2
    assert "the configuration is for task=qa: start it with launch/finetune_qa.py" in result.stderr
    result = run("evaluate", questions, f"checkpoint={pretrained}", f"output_dir={tmp_path}/wrong", processes=1)
    assert result.returncode == 2
    assert "no answer decoder: fine-tune it with launch/finetune_qa.py first" in result.stderr
