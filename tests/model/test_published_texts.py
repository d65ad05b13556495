"""Text encoders that start from published models of other sizes: the same states as transformers computes."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from model.checkpoints.pretrained import adopt_published, new_model
from model.config import ModelConfig, TextConfig, VisionConfig

IDS = torch.tensor([[2, 7, 9, 11, 30, 3], [2, 8, 3, 0, 0, 0]])
MASK = (IDS > 0).long()


def bert_folder(folder, layers=3, **changes):
    """A tiny BERT of other proportions than bert-base, as transformers writes it."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 70}
    config = BertConfig(
        num_hidden_layers=layers, max_position_embeddings=18, layer_norm_eps=1e-6, **{**sizes, **changes}
    )
    torch.manual_seed(2)
    model = BertForMaskedLM(config).eval()
    model.save_pretrained(folder)
    return model


def start(folder, **explicit):
    """A model with the text encoder of the folder and these settings of it, and its configuration."""
    config = ModelConfig(
        vision_encoder=VisionConfig(patch_size=8, width=48, depth=1, heads=3),
        text_encoder=TextConfig(pretrained=str(folder), **explicit),
        image_res=16,
        embed_dim=16,
    )
    adopt_published(config, {f"text_encoder.{name}" for name in explicit})
    torch.manual_seed(5)
    return new_model(config).eval(), config.text_encoder


def test_layers_above_those_of_a_small_bert_are_fusion_layers(tmp_path):
    published = bert_folder(tmp_path)
    model, text = start(tmp_path, layers=5)
    assert (text.width, text.heads, text.intermediate, text.vocab_size) == (24, 3, 40, 70)
    assert (text.max_positions, text.layer_norm_eps, text.fusion_layer) == (18, 1e-6, 3)
    with torch.no_grad():
        ours, theirs = model.text_encoder(IDS, MASK), published.bert(IDS, MASK).last_hidden_state
        assert torch.allclose(ours[MASK > 0], theirs[MASK > 0], atol=1e-5)
        assert torch.allclose(
            model.word_head(ours, model.text_encoder.word_matrix())[MASK > 0],
            published(IDS, MASK).logits[MASK > 0],
            atol=1e-5,
        )
    for number, source in ((3, 1), (4, 2)):
        fusion, below = model.text_encoder.layer[number], published.bert.encoder.layer[source]
        assert torch.equal(fusion.attention.self.query.weight, below.attention.self.query.weight)
        assert torch.equal(fusion.output.dense.weight, below.output.dense.weight)


@pytest.mark.parametrize(
    ("explicit", "layers"),
    [
        ({}, (12, 9)),
        ({"fusion_layer": 6}, (12, 6)),
        ({"layers": 8, "fusion_layer": 4}, (8, 4)),
        ({"layers": 4}, (4, 3)),
    ],
)
def test_by_default_the_upper_quarter_of_the_published_layers_are_fusion_layers(tmp_path, explicit, layers):
    published = bert_folder(tmp_path, layers=12)
    model, text = start(tmp_path, **explicit)
    assert (text.layers, text.fusion_layer) == layers
    for ours, theirs in zip(model.text_encoder.layer, published.bert.encoder.layer, strict=False):
        assert torch.equal(ours.attention.self.key.weight, theirs.attention.self.key.weight)


def test_a_size_that_contradicts_the_published_one_is_refused(tmp_path):
    bert_folder(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"text_encoder\.width is 768 here and 24 in text_encoder\.pretrained=.*null"):
        start(tmp_path / "bert", width=768)
    start(tmp_path / "bert", width=24)
    bert_folder(tmp_path / "relu", hidden_act="relu")
    with pytest.raises(ValueError, match="has the activation relu"):
        start(tmp_path / "relu")
