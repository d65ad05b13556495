"""Evaluating into a folder that holds something: the same is replaced, other results and corpora are kept."""

import json
import shutil
import threading

import pytest
import torch

from launch.evaluation import evaluate
from launch.pretrain import main as pretrain
from model.checkpoints.loading import save_model
from model.config import LossWeights, ModelConfig, TextConfig, VisionConfig
from model.singularity import Singularity
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.config.settings import load_settings

CORPORA = ("images_test", "clips_test_motion", "clips_test_appearance")


def save_weights(folder, tokenizer, seed):
    torch.manual_seed(seed)
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, fusion_layer=1, heads=2, intermediate=64, max_positions=40
    )
    vision = VisionConfig(patch_size=16, width=32, depth=1, heads=2)
    config = ModelConfig(vision, text, loss_weight=LossWeights(mlm=0.0), image_res=32, embed_dim=16)
    model = Singularity(config, tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id)
    save_model(model, config, folder)
    tokenizer.save(folder)


@pytest.fixture
def again(shapes, tokenizer, tmp_path, monkeypatch):
    """Evaluates into tmp_path/out with more settings; corpora and weights may be changed between."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in CORPORA:
        shutil.copytree(shapes.url(name), tmp_path / name)
    save_weights(tmp_path / "weights", tokenizer, 0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"test_corpus: {{images: {tmp_path}/images_test}}\nk_test: 2\ngallery: 1\nmax_txt_l: {{image: 24, video: 24}}\n"
        "threads: 1\nvideo_input: {num_frames_test: 2}\n"
    )

    def run(*settings):
        where = (f"checkpoint={tmp_path}/weights", f"output_dir={tmp_path}/out")
        evaluate(load_settings(recipe, (*where, *settings)), Ranks())
        return json.loads((tmp_path / "out/metrics.json").read_text())

    return run


def test_the_same_evaluation_is_replaced_and_others_are_kept(again, tmp_path, tokenizer):
    first = again("label=x")
    assert again("label=x", "batch_size_test.image=3", "gallery=2") == first
    shutil.move(tmp_path / "weights", tmp_path / "moved")
    assert again("label=x", f"checkpoint={tmp_path}/moved") == first  # the same weights elsewhere
    shutil.move(tmp_path / "moved", tmp_path / "weights")
    shutil.copytree(tmp_path / "images_test", tmp_path / "copy")
    assert again("label=x", f"test_corpus={{images: {tmp_path}/copy}}") == first  # and the same corpus
    motion = f"test_corpus.motion={tmp_path}/clips_test_motion"
    more = again("label=x", motion)
    assert set(more) > set(first)
    other = f"test_corpus={{images: {tmp_path}/images_test, motion: {tmp_path}/clips_test_appearance}}"
    moved = f"motion was {tmp_path}/clips_test_motion, is {tmp_path}/clips_test_appearance"
    changed = [motion, "k_test=3", "video_input.num_frames_test=3"]
    for settings, difference in (
        ([], "it also has the split motion"),
        (["splits=[motion]", motion], "it also has the split images"),
        ([other], moved),
        (changed, "test frames were 2, are 3; k_test was 2, is 3"),
    ):
        with pytest.raises(UserError) as caught:
            again("label=x", *settings)
        assert difference in str(caught.value)
        assert str(caught.value).endswith("choose another name with label=NAME, or another output_dir")
        assert json.loads((tmp_path / "out/metrics.json").read_text()) == more
        assert json.loads((tmp_path / "out/evaluation/x/metrics.json").read_text()) == more
    assert again("label=y") == first


def test_a_checkpoint_or_corpus_that_has_changed_at_its_place_is_another_one(again, tmp_path, tokenizer):
    again()
    save_weights(tmp_path / "weights", tokenizer, 1)
    with pytest.raises(UserError, match=r"the weights of .*weights have changed"):
        again()
    save_weights(tmp_path / "weights", tokenizer, 0)
    shutil.rmtree(tmp_path / "images_test")
    shutil.copytree(tmp_path / "clips_test_motion", tmp_path / "images_test")
    with pytest.raises(UserError, match=r"the data of .*images_test have changed"):
        again()
    details = tmp_path / "out/evaluation/2_frames/evaluation.json"
    details.write_text(json.dumps({**json.loads(details.read_text()), "version": 1}))
    again()  # asked for by what cannot read that version


@pytest.mark.parametrize("setting", ["output_dir", "feature_cache"])
@pytest.mark.parametrize("place", ["images_test", "images_test/x"])
def test_a_packed_corpus_is_not_written_into(again, tmp_path, setting, place):
    before = sorted((tmp_path / "images_test").iterdir())
    with pytest.raises(UserError, match=f"{setting} {tmp_path}/{place} (is|lies in) the packed corpus"):
        again(f"{setting}={tmp_path}/{place}")
    assert sorted((tmp_path / "images_test").iterdir()) == before


def test_what_is_refused_leaves_no_watchdog_that_ends_the_process_later(again, tmp_path):
    for launch, recipe in ((evaluate, "recipe.yaml"), (pretrain, "training.yaml")):
        (tmp_path / "training.yaml").write_text(f"train_corpus: [{tmp_path}/none]\noutput_dir: {tmp_path}/run\n")
        with pytest.raises(UserError):
            launch(load_settings(tmp_path / recipe, [f"output_dir={tmp_path}/images_test"]), Ranks())
        assert not [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]
