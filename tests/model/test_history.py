"""The history of weights: what their training started from and its validation found, kept in every copy."""

import json

from small_models import small_config, small_model

from model import Singularity
from model.checkpoints.loading import load_model, load_weights, save_model
from model.config import LossWeights
from model.history import History


def test_a_chain_of_trainings_is_named_from_the_last_to_the_first():
    config = small_config()
    first = History.of_training(config)
    assert first == History(("random weights",))
    config.vision_encoder.pretrained, config.text_encoder.pretrained = "some/beit", "bert"
    published = History.of_training(config)
    assert published.origin == "vision_encoder.pretrained=some/beit, text_encoder.pretrained=bert"
    second = History.of_training(config, "runs/first", History(first.started_from, reranks=False))
    assert second.origin == "runs/first, which started from random weights"
    assert second.reranks is None  # of the new training nothing is known yet
    assert History.of_training(config, "ckpt.pth").origin == "ckpt.pth"
    assert History().origin == ""


def test_reranking_is_the_default_unless_the_validation_or_the_losses_speak_against_it():
    untrained = History.of_training(small_config(loss_weight=LossWeights(itm=0.0)))
    own = History.of_training(small_config(loss_weight=LossWeights(itm=0.0), losses={"mine": 1.0}))
    preferred = {History(): True, History(reranks=True): True, History(reranks=False): False, untrained: False}
    assert {each: each.prefers_reranking for each in preferred} == preferred
    assert own.prefers_reranking


def test_weights_keep_their_history_through_every_copy(tmp_path):
    model = small_model()
    history = History(("runs/first", "random weights"), reranks=False)
    save_model(model, model.config, tmp_path / "a", history=history)
    assert load_weights(tmp_path / "a").history == load_model(tmp_path / "a").history == history
    save_model(load_model(tmp_path / "a"), model.config, tmp_path / "b")
    again = Singularity.from_pretrained(tmp_path / "b")
    again.save_pretrained(tmp_path / "c")
    assert load_weights(tmp_path / "c").history == history
    assert "runs/first, which started from random weights" in (tmp_path / "c" / "README.md").read_text()


def test_weights_of_before_have_no_history_and_those_of_later_may_have_more(tmp_path):
    model = small_model()
    save_model(model, model.config, tmp_path)
    path = tmp_path / "model.json"
    description = json.loads(path.read_text())
    description["history"] |= {"later": 1}
    path.write_text(json.dumps(description))
    assert load_weights(tmp_path).history == History()
    del description["history"]
    path.write_text(json.dumps(description))
    assert load_weights(tmp_path).history == History()
