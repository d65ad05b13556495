"""Text encoders that start from published models of other sizes: the same states as transformers computes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from model.checkpoints.loading import load_model, save_model
from model.checkpoints.pretrained import new_model
from model.checkpoints.published import adopt_published
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
    with pytest.raises(
        ValueError,
        match=r"text_encoder\.width is 768 here and 24 in .*text_encoder\.pretrained names.*null",
    ):
        start(tmp_path / "bert", width=768)
    start(tmp_path / "bert", width=24)
    bert_folder(tmp_path / "relu", hidden_act="relu")
    with pytest.raises(ValueError, match="has the activation relu"):
        start(tmp_path / "relu")


@pytest.mark.parametrize("with_config", [True, False])
def test_an_encoder_of_ones_own_keeps_its_type_and_sizes_whatever_weights_it_reads(tmp_path, with_config):
    bert_folder(tmp_path)
    if not with_config:
        (tmp_path / "config.json").unlink()
    config = ModelConfig(text_encoder=TextConfig(type="conv", pretrained=str(tmp_path), width=48))
    adopt_published(config, {"text_encoder.type", "text_encoder.width"})
    assert config.text_encoder == TextConfig(type="conv", pretrained=str(tmp_path), width=48)


COMMON = {"vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "pad_token_id": 0}
KINDS = {
    "modernbert": {"intermediate_size": 40, "max_position_embeddings": 18, "local_attention": 4, "cls_token_id": 2},
    "roberta": {"intermediate_size": 40, "max_position_embeddings": 18, "pad_token_id": 1},
    "mpnet": {"intermediate_size": 40, "max_position_embeddings": 18, "pad_token_id": 1},
    "electra": {"intermediate_size": 40, "max_position_embeddings": 18, "embedding_size": 24},
    "distilbert": {"hidden_dim": 40, "max_position_embeddings": 18},
    "deberta-v2": {"intermediate_size": 40, "max_position_embeddings": 18, "relative_attention": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_models_compute_the_same_states_as_in_transformers(tmp_path, kind):
    torch.manual_seed(2)
    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS[kind]})
    published = AutoModelForMaskedLM.from_config(config).eval()
    published.save_pretrained(tmp_path)
    model, text = start(tmp_path)
    assert (text.type, text.width, text.fusion_layer, text.layers) == ("transformers", 24, 3, 6)
    assert text.max_positions == (16 if config.pad_token_id else 18)
    ids = IDS.where(MASK > 0, config.pad_token_id)
    with torch.no_grad():
        ours = model.text_encoder(ids, MASK)
        theirs = published.base_model(input_ids=ids, attention_mask=MASK).last_hidden_state
        short = model.text_encoder(ids[1:, :3], MASK[1:, :3])
    assert torch.allclose(ours[MASK > 0], theirs[MASK > 0], atol=1e-5)
    assert torch.allclose(ours[1:, :3], short, atol=1e-5)
    assert torch.equal(model.text_encoder.word_matrix(), published.get_input_embeddings().weight)


def test_an_answer_decoder_starts_from_the_word_embeddings_of_another_text_model(tmp_path):
    config = AutoConfig.for_model("modernbert", **{**COMMON, **KINDS["modernbert"]})
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    model, text = start(tmp_path)
    save_model(model, model.config, tmp_path / "saved")
    answering = load_model(tmp_path / "saved", {"answer_decoder.enable": True, "answer_decoder.num_layers": 2})
    words = answering.answer_decoder.embeddings.word_embeddings.weight
    assert torch.equal(words, model.text_encoder.word_matrix())
    first = answering.answer_decoder.layer[0].attention.self.query.weight
    assert torch.equal(first, model.text_encoder.layer[str(text.layers - 2)].attention.self.query.weight)


def test_a_decoder_is_no_text_encoder(tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a gpt2 model: must be one of bert, clip, .*modernbert"):
        start(tmp_path)
