"""Pre-training, fine-tuning for retrieval and for questions from it, and evaluation, as users chain them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_run import job, learned, run, run_jobs

from eval.report.__main__ import main as report
from sharding import answers
from sharding.build import build_corpus

pytestmark = pytest.mark.timeout(600)

# The architecture is not repeated, only what fine-tuning changes.
RETRIEVAL = """
train_corpus: {corpora}/clips_train
test_corpus: {{motion: {corpora}/clips_test_motion, images: {corpora}/images_test}}
stop_key: motion
video_input: {{num_frames: 2, num_frames_test: 3}}
add_temporal_embed: true
temporal_vision_encoder: {{enable: true, num_layers: 1}}
loss_weight: {{mlm: 0.0}}
batch_size: {{image: 8, video: 4}}
max_txt_l: {{image: 12, video: 12}}
scheduler: {{epochs: 2, warmup_epochs: 0}}
precision: fp32
k_test: 4
log_every: 1
deepspeed: deepspeed_configs/cpu.json
"""
QUESTIONS = """
task: qa
epoch_unit: questions
train_corpus: {corpora}/qa_train
test_corpus: {{test: {corpora}/qa_test}}
stop_key: test
answer_list: {corpora}/shapes/answer_list.json
batch_size: {{image: 8, video: 4}}
scheduler: {{epochs: 2, warmup_epochs: 0.5}}
optimizer: {{lr: 1.0e-3}}
video_input: {{num_frames: 2, num_frames_test: 3}}
precision: fp32
k_test: 8
log_every: 1
deepspeed: deepspeed_configs/cpu.json
"""


def pack(corpora, annotations, kind, output):
    build_corpus([str(annotations)], str(corpora / "shapes/media"), kind, str(output), size=32, fps=4, workers=1)


@pytest.fixture(scope="module")
def recipes(corpora):
    """retrieval.yaml and qa.yaml, for Shapes."""
    for name in ("qa_train", "qa_test"):
        pack(corpora, corpora / f"shapes/{name}.json", "video", corpora / name)
    paths = corpora / "retrieval.yaml", corpora / "qa.yaml"
    for path, text in zip(paths, (RETRIEVAL, QUESTIONS)):
        path.write_text(text.format(corpora=corpora))
    return paths


@pytest.fixture(scope="module")
def own(corpora):
    """A data root as configs/small/qa.yaml reads it, by the commands of its head, from JSON lists of questions."""
    root = corpora / "own"
    for name, source in (("questions", "images_train"), ("questions_test", "images_test")):
        asked = [
            {"image": item["image"], "question": "what is it?", "answer": "ring" if "ring" in str(item) else "no ring"}
            for item in json.loads((corpora / f"shapes/{source}.json").read_text())
        ]
        (corpora / f"{name}.json").write_text(json.dumps(asked))
        pack(corpora, corpora / f"{name}.json", "image", root / name)
    assert answers.main([str(root / "questions"), "--output", str(root / "answers.json")]) == 0
    return root


@pytest.fixture(scope="module")
def pretrained(corpora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run_jobs(folder, [job("pretrain", corpora / "tiny.yaml", f"output_dir={folder}/run", "scheduler.epochs=1")])
    return folder / "run"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def model_of(run_folder, checkpoint):
    return json.loads((run_folder / f"checkpoints/{checkpoint}/weights/model.json").read_text())["config"]


def refused(*words):
    result = run(*words, processes=1)
    assert result.returncode == 2
    return result.stderr


def test_fine_tuning_for_retrieval(corpora, recipes, pretrained, tmp_path):
    tiny, recipe, tuned = corpora / "tiny.yaml", recipes[0], tmp_path / "tuned"
    assert model_of(pretrained, "step_00000008")["vision_encoder"]["width"] == 32
    zero_shot = f"checkpoint={pretrained}", f"output_dir={pretrained}"
    launches = [
        job("finetune_retrieval", recipe, f"pretrained_path={pretrained}", f"output_dir={tuned}"),
        job("evaluate", recipe, f"checkpoint={tuned}", f"output_dir={tuned}", "label=again"),
        job("evaluate", tiny, *zero_shot, "video_input.num_frames_test=1"),
    ]
    assert "motion_emb" in run_jobs(tmp_path, launches)
    assert (tuned / "checkpoints/best/weights/model.safetensors").is_file()
    assert (tuned / "finished.json").is_file()
    assert {path.name for path in (tuned / "evaluation").iterdir()} >= {"epoch_01", "epoch_02", "final", "again"}
    assert not list(tuned.glob("evaluation/epoch_*/scores.npz"))  # large: written at the end only
    final = metrics_of(tuned / "evaluation/final")
    assert set(final) == {"motion/", "motion_emb/", "images/", "images_emb/"}
    assert metrics_of(tuned / "evaluation/again") == metrics_of(tuned) == final
    assert [line["step"] for line in learned(tuned)] == list(range(1, 7))
    assert all("loss_mlm" not in line for line in learned(tuned))
    assert (pretrained / "evaluation/1_frame/report.html").is_file()
    assert "fine-tune with launch/finetune_retrieval.py first" in refused("evaluate", recipe, *zero_shot)


def test_fine_tuning_for_questions(recipes, own, pretrained, tmp_path):
    recipe, tuned, other, mine = recipes[1], *(tmp_path / name for name in ("tuned", "other", "mine"))
    few = ("batch_size.image=8", "scheduler.epochs=1", "log_every=1", f"data_root={own}")
    launches = [
        job("finetune_qa", recipe, f"pretrained_path={pretrained}", f"output_dir={tuned}"),
        job("evaluate", recipe, f"checkpoint={tuned}", f"output_dir={other}", "label=again"),
        job("finetune_qa", "configs/small/qa.yaml", f"pretrained_path={pretrained}", f"output_dir={mine}", *few),
    ]
    run_jobs(tmp_path, launches)

    # The decoder is as deep as the fusion layers, and begins as a copy of them.
    model = model_of(tuned, "best")
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
    final = metrics_of(tuned / "evaluation/final")
    assert 0 <= final["test"]["overall"] <= 100
    assert metrics_of(other) == final

    assert json.loads((own / "answers.json").read_text()) == ["no ring", "ring"]
    assert {line["media_type"] for line in learned(mine)} == {"image"}
    assert report([str(mine), "--output", str(tmp_path / "report.html")]) == 0
    assert "mine · final" in (tmp_path / "report.html").read_text()

    where = f"output_dir={tmp_path}/wrong"
    reported = "the configuration is for task=qa: start it with launch/finetune_qa.py"
    assert reported in refused("finetune_retrieval", recipe, where)
    reported = "no answer decoder: fine-tune it with launch/finetune_qa.py first"
    assert reported in refused("evaluate", recipe, f"checkpoint={pretrained}", where)
