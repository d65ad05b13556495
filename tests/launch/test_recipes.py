"""Every recipe of configs/ trains three steps and evaluates, on shards of its data sets' form."""

import json
import shutil

import pytest
from small_run import ROOT, job, learned, run_jobs

from loaders.vocab import learn_vocabulary
from model.export import main as export
from sharding.build import build_corpus
from train.filters import main as filters

pytestmark = pytest.mark.timeout(900)

RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.name != "base.yaml" and path.parent.name not in ("corpora", "reproduce")
)
TINY = [
    "vision_encoder={type: beit, pretrained: null, patch_size: 16, width: 32, depth: 1, heads: 2}",
    "text_encoder={pretrained: null, width: 32, layers: 2, fusion_layer: 1, heads: 2, intermediate: 64}",
    "text_encoder.max_positions=160",
    "image_res=32",
    "embed_dim=16",
]
WITHOUT_BACKBONES = ["freeze=[]", "optimizer.different_lr.enable=false"]  # which name parts of published models
FROM_NOTHING = "configs/small/from_nothing.yaml"
FROM_SCRATCH = ("/pretrain.yaml", "/transfer.yaml", FROM_NOTHING)
SHORT = [
    "batch_size={image: 8, video: 4}", "batch_size_test={image: 8, video: 8}", "max_steps=3", "log_every=1", "k_test=4"
]  # fmt: skip
# Packed Shapes -> what they stand for.
SETS = {
    "images_train": "cc3m cc12m sbu vg coco coco_train coco_val coco_test flickr30k_train photos",
    "images_test": "flickr30k_val flickr30k_test photos_test",
    "clips_train": "webvid msrvtt_train msrvtt_train7k didemo_train didemo_val didemo_test activitynet_train "
    "activitynet_val1 clips train",
    "clips_test_motion": "msrvtt_1k_test held_out",
    "ssv2_train": "ssv2_label_train ssv2_template_train",
    "ssv2_test": "ssv2_label_val ssv2_template_val",
    "qa_train": "msrvtt_qa_train activitynet_qa_train",
    "qa_test": "msrvtt_qa_val msrvtt_qa_test activitynet_qa_val activitynet_qa_test",
    "vqa_questions": "vqa_train vqa_val vqa_vg vqa_minival questions questions_test",
    "vqa_unanswered": "vqa_test vqa_test_dev",
    "mc_test": "msrvtt_mc_test",
    "clips_test_appearance": "",
}


def image_questions(shapes):
    """VQA's form: ten annotators, answer types; the test questions without answers."""
    images = json.loads((shapes / "images_train.json").read_text())[:16]
    asked = [
        {
            "question_id": number, "image": item["image"], "question": "what is in the picture?",
            "answer": ["circle"] * (number % 8) + ["square"] * (10 - number % 8), "answer_type": "other",
        }
        for number, item in enumerate(images)
    ]  # fmt: skip
    (shapes / "vqa_questions.json").write_text(json.dumps(asked))
    unanswered = [{key: item[key] for key in ("question_id", "image", "question")} for item in asked]
    (shapes / "vqa_unanswered.json").write_text(json.dumps(unanswered))


@pytest.fixture(scope="module")
def data(corpora, tmp_path_factory):
    """A data root with every corpus that the recipes name."""
    root, shapes = tmp_path_factory.mktemp("data"), corpora / "shapes"
    image_questions(shapes)
    for name, aliases in SETS.items():
        kind = "image" if name.startswith(("images", "vqa")) else "video"
        annotations = [str(shapes / f"{name}.json")]
        build_corpus(annotations, str(shapes / "media"), kind, str(root / name), size=32, fps=4, workers=1)
        for alias in aliases.split():
            (root / alias).symlink_to(root / name)
    learn_vocabulary(
        [str(root / name) for name in ("images_train", "clips_train", "qa_train")], 400, root / "vocab.txt"
    )
    for name in ("msrvtt_qa_answer_list", "activitynet_qa_answer_list", "vqa_answer_list", "answers"):
        shutil.copy(shapes / "answer_list.json", root / f"{name}.json")
    return root


def entry_of(recipe):
    """Which script a recipe is started with, as its head says."""
    return next(
        line.split("launch/")[1].split(".py")[0]
        for line in (ROOT / recipe).read_text().splitlines()
        if "launch/" in line and recipe in line
    )


def test_every_recipe_trains_and_evaluates(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SL_DATA_DIR", str(data))
    out = {recipe: tmp_path / recipe.replace("/", "_").removesuffix(".yaml") for recipe in RECIPES}
    pretrained = out["configs/pretrain.yaml"]
    from_scratch = [recipe for recipe in RECIPES if recipe.endswith(FROM_SCRATCH)]
    assert filters([FROM_NOTHING, f"data_root={data}", "image_res=32", *SHORT]) == 0
    launches = []
    for recipe in [*from_scratch, *(recipe for recipe in RECIPES if recipe not in from_scratch)]:
        entry, checkpoint, settings = entry_of(recipe), out[recipe], [f"output_dir={out[recipe]}", *SHORT]
        if recipe in from_scratch:  # from nothing with its own vision encoder
            settings += [*TINY[recipe == FROM_NOTHING :], f"tokenizer={data}/vocab.txt"]
        if recipe.endswith("/transfer.yaml"):
            settings += WITHOUT_BACKBONES
        if entry == "evaluate":
            checkpoint = pretrained
        else:
            start = [] if recipe in from_scratch else [f"pretrained_path={pretrained}"]
            zero_shot = ["train_corpus=webvid_14m", "stop_key=msrvtt_1k_test"] if out[recipe] == pretrained else []
            launches.append(job(entry, ROOT / recipe, *settings, *start, *zero_shot))
        launches.append(job("evaluate", ROOT / recipe, *settings, f"checkpoint={checkpoint}", "label=again"))
    run_jobs(tmp_path, launches, processes=1, timeout=800)
    for recipe in RECIPES:
        if entry_of(recipe) != "evaluate":
            assert [line["step"] for line in learned(out[recipe])] == [1, 2, 3], recipe
        metrics = json.loads((out[recipe] / "metrics.json").read_text())
        assert metrics, recipe
        assert all(0 <= value <= 100 for row in metrics.values() for value in row.values()), recipe

    # A file in the official format serves as its run does.
    pth, recipe = tmp_path / "first.pth", "configs/retrieval/msrvtt.yaml"
    assert export([str(pretrained), str(pth)]) == 0
    settings = [*SHORT, f"tokenizer={data}/vocab.txt"]
    launches = [
        job("evaluate", ROOT / recipe, *settings, f"checkpoint={each}", f"output_dir={tmp_path}/of_{each.name}")
        for each in (pretrained, pth)
    ]
    tuned = f"output_dir={tmp_path}/tuned"
    launches.append(job("finetune_retrieval", ROOT / recipe, *settings, f"pretrained_path={pth}", tuned))
    run_jobs(tmp_path, launches, processes=1)
    found = [json.loads((tmp_path / f"of_{each.name}/metrics.json").read_text()) for each in (pretrained, pth)]
    assert found[0] == found[1]
    assert [line["step"] for line in learned(tmp_path / "tuned")] == [1, 2, 3]


def test_every_recipe_says_how_and_with_what():
    for recipe in RECIPES:
        head = (ROOT / recipe).read_text().split("\nbase:")[0]
        assert entry_of(recipe), recipe
        assert all(line.startswith("#") for line in head.splitlines()), recipe
        assert "Hardware:" in head, recipe
        assert "Expected" in head or "Measured" in head or "With 6,000 photos" in head, recipe
