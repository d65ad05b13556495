"""Before a run starts: errors of checkpoints without a vocabulary, and the history of its weights."""

import pytest
import torch
from small_run import ROOT

from model.building import build_model
from model.checkpoints.loading import load_weights, save_model
from model.config import ModelConfig, TextConfig, VisionConfig
from model.history import History
from preprocessing.text import Tokenizer
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.config.settings import load_settings
from train.prepare import prepare_evaluation, prepare_training

CPU = "deepspeed_configs/cpu.json"


@pytest.fixture
def weights(shapes, tmp_path):
    """A folder of weights as an export of a .pth: without the vocabulary of Shapes, which it was trained with."""
    words = Tokenizer.load(str(shapes.vocab)).vocab_size
    config = ModelConfig(
        vision_encoder=VisionConfig(width=32, depth=1, heads=2),
        text_encoder=TextConfig(vocab_size=words, width=32, layers=2, fusion_layer=1, heads=2, intermediate=64),
        image_res=32,
        embed_dim=16,
    )
    torch.manual_seed(0)
    save_model(build_model(config), config, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def settings(shapes, weights, tmp_path):
    """A reader of the settings of an evaluation."""
    (tmp_path / "run.yaml").write_text(f"test_corpus: {{images: {shapes.url('images_test')}}}\n")
    base = [f"checkpoint={weights}", f"output_dir={tmp_path}/out"]
    return lambda *more: load_settings(tmp_path / "run.yaml", [*base, *more])


def test_weights_without_a_vocabulary_take_the_one_that_is_named(settings, shapes):
    assert prepare_evaluation(settings(f"tokenizer={shapes.vocab}"))[-1].path == shapes.vocab


def test_weights_without_a_vocabulary_ask_for_it(settings, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.text.hub_vocabulary", lambda name: tmp_path / "published.txt")
    (tmp_path / "published.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(900))])
    )
    reported = r"name the vocabulary that the model was trained with, tokenizer=vocab\.txt"
    with pytest.raises(UserError, match=rf"tokenizer=bert-base-uncased has 905 words, .*: {reported}"):
        prepare_evaluation(settings())
    reported = rf"{weights} has no vocabulary, and tokenizer: {tmp_path} is neither a vocabulary file nor a folder with"
    with pytest.raises(UserError, match=reported):
        prepare_evaluation(settings(f"tokenizer={tmp_path}"))
    with pytest.raises(
        UserError, match=r"model\.safetensors is not a text file, so it is not a BERT vocabulary: give a vocab\.txt"
    ):
        prepare_evaluation(settings(f"tokenizer={weights}/model.safetensors"))


def test_the_history_of_a_run_begins_with_what_it_starts_from(weights, shapes, tmp_path):
    small = ["batch_size.image=4", "loss_weight.mlm=0", f"tokenizer={shapes.vocab}", "decode=cpu", "threads=1"]
    (tmp_path / "run.yaml").write_text(f"train_corpus: {shapes.url('images_train')}\ndeepspeed: {ROOT}/{CPU}\n")

    def prepared(name, *more):
        settings = load_settings(tmp_path / "run.yaml", [*small, f"output_dir={tmp_path / name}", *more])
        run = prepare_training(settings, Ranks(), False, torch.device("cpu"))
        run.loader.close()
        run.folder.release()
        return run.model

    model = prepared("first", f"pretrained_path={weights}", "loss_weight.itm=0")
    assert model.history == History((str(weights),), matching_trained=False)
    save_model(model, model.config, tmp_path / "first_weights")
    second = prepared("second", f"pretrained_path={tmp_path / 'first_weights'}", "loss_weight.itm=1")
    assert second.history == History((str(tmp_path / "first_weights"), str(weights)))
    settings = load_settings(
        tmp_path / "run.yaml",
        [f"tokenizer={shapes.vocab}", f"checkpoint={tmp_path / 'first_weights'}", f"output_dir={tmp_path}",
         f"test_corpus={shapes.url('images_test')}"],
    )  # fmt: skip
    assert prepare_evaluation(settings)[1].history == model.history


@pytest.mark.parametrize(("given", "used"), [([], "itm+itc"), (["rerank_score=itm"], "itm")])
def test_an_evaluation_re_ranks_as_the_checkpoint_did_unless_it_is_told(weights, settings, shapes, given, used):
    found = load_weights(weights)
    model = build_model(found.config)
    model.load_state_dict(found.state)
    model.history = History(rerank_score="itm+itc")
    save_model(model, model.config, weights)
    chosen = settings(f"tokenizer={shapes.vocab}", *given)
    prepare_evaluation(chosen)
    assert chosen.config.rerank_score == used
