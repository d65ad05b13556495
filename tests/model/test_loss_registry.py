"""A user's losses: what they receive, their names and weights, and which checkpoints their tensors are in."""

import sys
from dataclasses import replace

import pytest
import torch
from small_models import CLS, MASK, PAD, small_batch, small_config
from torch import nn

from model.building import build_model
from model.checkpoints.loading import fit_weights, load_model, load_weights, save_model
from model.config import AnswerDecoderConfig
from model.losses import BUILT_IN, LOSSES, AnswerLossInputs, LossInputs, contrastive_loss, contrastive_targets
from runtime.errors import UserError

SPECIAL = {"pad_id": PAD, "cls_id": CLS, "mask_id": MASK}
received: list[LossInputs | AnswerLossInputs] = []


@LOSSES("receives")
def receives(inputs):
    received.append(inputs)
    return inputs.tokens.float().square().mean()


@LOSSES("row")
def row(inputs):
    return inputs.visual.sum(1)


for name, value in {"plain": 0.5, "nothing": None, "two": (torch.zeros(()), torch.zeros(()))}.items():
    LOSSES(name)(lambda inputs, value=value: value)


@LOSSES("bare")
class Bare(nn.Module):
    def forward(self, inputs):
        return inputs.visual.mean()


@LOSSES("sized")
class Sized(nn.Module):
    def __init__(self):
        super().__init__()


@LOSSES("headed")
class Headed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head = nn.Linear(config.embed_dim, 1)

    def forward(self, inputs):
        return self.head(inputs.visual.to(self.head.weight.dtype)).mean()


def built(losses, **changes):
    torch.manual_seed(0)
    return build_model(replace(small_config(), losses=losses, **changes), SPECIAL)


def test_a_loss_receives_what_the_forward_computes():
    received.clear()
    model = built({"receives": 2.0})
    frames, ids, mask, idx = small_batch()
    losses = model(frames, ids, mask, idx, columns={"height": torch.ones(4)})
    (inputs,) = received
    assert list(losses) == ["loss_itc", "loss_itm", "loss_mlm", "loss_receives"]
    assert losses["loss_receives"].item() == 2 * inputs.tokens.square().mean().item()
    shapes = {name: tuple(value.shape) for name, value in inputs._asdict().items() if isinstance(value, torch.Tensor)}
    masked = len(inputs.mlm_labels)
    assert shapes == {
        "tokens": (4, 17, 48), "pooled": (4, 1, 48), "input_ids": (4, 7), "attention_mask": (4, 7),
        "text_states": (4, 7, 32), "idx": (4,), "visual": (4, 16), "text": (4, 16), "all_idx": (4,),
        "all_visual": (4, 16), "all_text": (4, 16), "same": (4, 4), "temperature": (1, 1), "to_text": (4, 4),
        "to_visual": (4, 4), "match_states": (12, 32), "match_logits": (12, 2), "mlm_logits": (masked, 60),
        "mlm_labels": (masked,),
    }  # fmt: skip
    assert inputs.columns["height"].tolist() == [1, 1, 1, 1]
    contrastive = contrastive_loss(inputs.to_text, inputs.to_visual, contrastive_targets(idx))
    assert torch.equal(contrastive, losses["loss_itc"])


def test_a_loss_changes_neither_the_others_nor_the_weights_of_the_model():
    plain, more = built({}), built({"headed": 1.0})
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, more.state_dict()[name]), name
    results = []
    for model in (plain, more):
        torch.manual_seed(1)
        results.append(model(*small_batch()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_loss_of_question_answering_receives_the_answers():
    received.clear()
    model = built({"receives": 1.0}, answer_decoder=AnswerDecoderConfig(True, 2))
    frames, ids, mask, _ = small_batch()
    answers = torch.tensor([[CLS, number, 9] for number in range(10, 16)])
    per_question = torch.tensor([2, 1, 1, 2])
    losses = model(frames, ids, mask, answers, torch.ones_like(answers), torch.full((6,), 0.5), per_question)
    (inputs,) = received
    assert list(losses) == ["loss_qa", "loss_receives"]
    assert inputs.owner.tolist() == [0, 0, 1, 2, 3, 3]
    assert inputs.logits.shape == (6, 3, 60)
    assert inputs.question_states.shape == (4, 7, 32)
    assert losses["loss_qa"].item() == pytest.approx(inputs.answer_losses.sum().item() * 0.5 / 4)


def test_wrong_names_and_values_are_one_clear_error():
    assert {"itc", "itm", "mlm", "qa"} == BUILT_IN
    with pytest.raises(UserError, match="losses names itm, which is built in: loss_weight holds the weights"):
        built({"itm": 1.0})
    with pytest.raises(UserError, match=r"losses is 'recieves', must be one of receives, .*; a module of your own"):
        built({"recieves": 1.0})
    with pytest.raises(UserError, match=r"the loss row returns a tensor of shape \(4,\): return a scalar"):
        built({"row": 1.0})(*small_batch())


@pytest.mark.parametrize(("name", "kind"), [("plain", "float"), ("nothing", "NoneType"), ("two", "tuple")])
def test_a_loss_that_returns_no_tensor_is_named(name, kind):
    with pytest.raises(UserError, match=f"the loss {name} returns a {kind}: return a scalar tensor"):
        built({name: 1.0})(*small_batch())


@pytest.mark.parametrize("name", ["a.b", "", "train", "compute", "_weights"])
def test_a_class_cannot_have_the_name_of_an_attribute(name):
    if name not in LOSSES:
        LOSSES(name)(Headed)
    with pytest.raises(UserError, match=f"the name of the loss '{name}': register it under another one"):
        built({name: 1.0})


def test_a_class_must_take_the_settings_and_be_registered_itself():
    for name in ("bare", "sized"):
        with pytest.raises(
            UserError, match=rf"the loss {name} is a class, .*\(nn\.Module\) with def __init__\(self, config\)"
        ):
            built({name: 1.0})
    LOSSES("made")(Headed(small_config()))
    with pytest.raises(UserError, match=r"the loss made is an instance and .*: register its class"):
        built({"made": 1.0})


def test_plugins_that_a_model_does_not_need_may_be_absent(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "needs_more.py").write_text("import no_such_module\n")
    (tmp_path / "reads.py").write_text("from runtime.errors import MissingError\nraise MissingError('my file')\n")
    built({}, plugins=["nowhere", "needs_more"])
    assert "no nowhere.py in" in caplog.text
    assert "No module named 'no_such_module': continuing without plugin needs_more" in caplog.text
    with pytest.raises(UserError, match="my file"):
        built({}, plugins=["reads"])


def test_its_tensors_are_fresh_kept_or_dropped_as_the_settings_say(tmp_path):
    own = built({"headed": 1.0, "receives": 1.0})
    save_model(own, own.config, tmp_path / "own")
    names = ["losses.headed.head.weight", "losses.headed.head.bias"]
    weights = load_weights(tmp_path / "own")
    assert weights.config.losses == {"headed": 1.0, "receives": 1.0}
    assert fit_weights(built({"headed": 0.5}), weights, "own").dropped == []
    for losses in ({}, {"headed": 0.0}, {"receives": 1.0}):
        assert sorted(fit_weights(built(losses), weights, "own").dropped) == sorted(names)
    plain = built({})
    save_model(plain, plain.config, tmp_path / "plain")
    assert fit_weights(own, load_weights(tmp_path / "plain"), "plain").fresh == names
    assert load_model(tmp_path / "own").state_dict().keys() == plain.state_dict().keys()
