"""The architecture of a run: from its settings, or from the checkpoint, and what may then be changed."""

from dataclasses import replace

import pytest

from model.config import LossWeights, ModelConfig, TemporalConfig, TextConfig, VisionConfig
from preprocessing.text import NO_MASK, SPECIAL, Tokenizer
from runtime.settings import flatten
from train.config.architecture import adopt, changes_to, check_texts, fresh_architecture
from train.config.settings import load_settings

STORED = ModelConfig(
    vision_encoder=VisionConfig(type="vit", width=64, depth=2, heads=2),
    text_encoder=TextConfig(vocab_size=50, width=64, layers=3, fusion_layer=2, heads=2, max_positions=40),
    image_res=64,
    num_frames=4,
    add_temporal_embed=True,
)


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *"abcdefg"]) + "\n")
    return Tokenizer.load(str(path))


@pytest.fixture
def settings(tmp_path):
    def read(*overrides):
        path = tmp_path / "run.yaml"
        path.write_text("{}")
        return load_settings(path, overrides)

    return read


def test_a_new_model_has_the_size_that_is_set_and_the_tokenizers_vocabulary(settings, tokenizer):
    config = fresh_architecture(settings("vision_encoder.width=96", "video_input.num_frames=3"), tokenizer)
    assert (config.vision_encoder.width, config.num_frames, config.text_encoder.vocab_size) == (96, 3, 12)
    with pytest.raises(ValueError, match=r"has 12 words, the model's text_encoder\.vocab_size is 5"):
        fresh_architecture(settings("text_encoder.vocab_size=5"), tokenizer)


def test_defaults_do_not_contradict_a_checkpoint(settings):
    chosen = settings()
    assert changes_to(chosen, STORED, "x", training=True) == {}
    adopt(chosen, STORED)
    assert chosen.config.vision_encoder.width == 64
    assert chosen.config.image_res == 64
    assert chosen.config.video_input.num_frames == 4
    assert chosen.config.add_temporal_embed is True


def test_what_may_change_changes(settings):
    overrides = ("video_input.num_frames=8", "image_res=96", "loss_weight.mlm=0", "temporal_vision_encoder.enable=true")
    changes = changes_to(settings(*overrides), STORED, "x", training=True)
    assert changes == {
        "num_frames": 8, "image_res": 96, "loss_weight.mlm": 0, "temporal_vision_encoder.enable": True
    }  # fmt: skip


def test_what_may_not_is_refused(settings):
    with pytest.raises(ValueError, match=r"vision_encoder\.width is 96 here and 64 in the checkpoint x: remove it"):
        changes_to(settings("vision_encoder.width=96"), STORED, "x", training=True)
    assert changes_to(settings("vision_encoder.width=64", "temp=0.5"), STORED, "x", training=True) == {}


def test_evaluation_changes_nothing_that_would_need_training(settings):
    overrides = ("image_res=96", "loss_weight.mlm=0", "video_input.num_frames=1", "text_encoder.dropout=0.3")
    assert changes_to(settings(*overrides), STORED, "x", training=False) == {"image_res": 96}
    with pytest.raises(ValueError, match=r"temporal_vision_encoder\.enable is True here and False.*fine-tune"):
        changes_to(settings("temporal_vision_encoder.enable=true"), STORED, "x", training=False)
    temporal = replace(STORED, temporal_vision_encoder=TemporalConfig(enable=True))
    assert changes_to(settings("temporal_vision_encoder.enable=true"), temporal, "x", training=False) == {}


# Every setting of the model with another value than the checkpoint's.
OTHERWISE = {
    "vision_encoder.type": "beit", "vision_encoder.pretrained": "somewhere", "vision_encoder.patch_size": 32,
    "vision_encoder.mean": "[0.4,0.4,0.4]", "vision_encoder.std": "[0.2,0.2,0.2]",
    "vision_encoder.width": 96, "vision_encoder.depth": 3, "vision_encoder.heads": 4, "vision_encoder.mlp_ratio": 3.0,
    "vision_encoder.layer_scale": 0.5, "vision_encoder.drop_path": 0.3,
    "vision_encoder.patch_dropout": 0.5, "vision_encoder.layer_norm_eps": 1e-6,
    "vision_encoder.initializer_range": 0.5, "text_encoder.pretrained": "somewhere", "text_encoder.vocab_size": 60,
    "dual_encoder": "somewhere",
    "text_encoder.width": 96, "text_encoder.layers": 4, "text_encoder.fusion_layer": 1, "text_encoder.heads": 4,
    "text_encoder.intermediate": 100, "text_encoder.max_positions": 50, "text_encoder.dropout": 0.3,
    "text_encoder.pooling": "mean", "text_encoder.layer_norm_eps": 1e-6, "text_encoder.initializer_range": 0.5,
    "temporal_vision_encoder.enable": "true", "temporal_vision_encoder.num_layers": 5,
    "temporal_vision_encoder.update_pooler_embed": "true", "answer_decoder.enable": "true",
    "answer_decoder.num_layers": 2, "add_temporal_embed": "false", "image_res": 96, "embed_dim": 8, "temp": 0.5,
    "itm_hard_neg": "false", "gather_negatives": "true", "mlm_prob": 0.3, "loss_weight.itc": 0.5,
    "loss_weight.itm": 0.5, "loss_weight.mlm": 0.5, "losses": "{mine: 0.5}",
    "plugins": "[colorsys]",
    "vision_encoder.options": "{depth: 2}", "text_encoder.options": "{depth: 2}", "text_encoder.type": "other",
}  # fmt: skip
# What no model has whose tensors and outputs are those of the checkpoint.
REFUSED_BY_BOTH = {
    "vision_encoder.type", "vision_encoder.patch_size", "vision_encoder.width", "vision_encoder.depth",
    "vision_encoder.heads", "vision_encoder.mlp_ratio", "vision_encoder.layer_norm_eps", "text_encoder.vocab_size",
    "text_encoder.width", "text_encoder.layers", "text_encoder.fusion_layer", "text_encoder.heads",
    "text_encoder.intermediate", "text_encoder.max_positions", "text_encoder.layer_norm_eps", "answer_decoder.enable",
    "embed_dim", "vision_encoder.mean", "vision_encoder.std", "vision_encoder.options",
    "text_encoder.options", "text_encoder.type", "text_encoder.pooling",
}  # fmt: skip
CHANGED_BY_TRAINING = {
    "image_res", "add_temporal_embed", "temporal_vision_encoder.enable", "temporal_vision_encoder.num_layers",
    "temporal_vision_encoder.update_pooler_embed", "itm_hard_neg", "gather_negatives", "mlm_prob", "loss_weight.itc",
    "loss_weight.itm", "loss_weight.mlm", "vision_encoder.drop_path",
    "vision_encoder.patch_dropout", "text_encoder.dropout",
    "vision_encoder.initializer_range", "text_encoder.initializer_range", "losses", "plugins",
}  # fmt: skip
REFUSED_BY_EVALUATION = {*REFUSED_BY_BOTH, "temporal_vision_encoder.enable", "add_temporal_embed"}


@pytest.mark.parametrize("training", [True, False])
def test_of_every_setting_it_is_known_whether_it_may_differ_from_the_checkpoint(settings, training):
    refused, changed = set(), set()
    for key, value in OTHERWISE.items():
        try:
            changed.update(changes_to(settings(f"{key}={value}"), STORED, "x", training))
        except ValueError:
            refused.add(key)
    assert set(OTHERWISE) == set(flatten(STORED)) - {"num_frames"}  # set by video_input.num_frames
    assert refused == (REFUSED_BY_BOTH if training else REFUSED_BY_EVALUATION)
    assert changed == (CHANGED_BY_TRAINING if training else {"image_res", "plugins"})


def test_own_losses_are_those_of_the_checkpoint_unless_named_and_left_out_where_they_cannot_be(settings):
    stored = replace(STORED, losses={"mine": 0.5})
    assert changes_to(settings(), stored, "x", training=True) == {}
    assert changes_to(settings("losses.other=1"), stored, "x", training=True) == {"losses": {"other": 1.0}}
    assert changes_to(settings("losses={}"), stored, "x", training=True) == {"losses": {}}
    assert changes_to(settings("losses.other=1"), stored, "x", training=False) == {"losses": {}}
    assert changes_to(settings("task=qa"), stored, "x", training=True)["losses"] == {}
    assert changes_to(settings("task=qa", "losses.other=1"), stored, "x", training=True)["losses"] == {"other": 1.0}


def test_plugins_of_the_checkpoint_stay(settings):
    stored = replace(STORED, plugins=["colorsys", "chunk"])
    assert changes_to(settings("plugins=[sched,chunk]"), stored, "x", True)["plugins"] == ["colorsys", "chunk", "sched"]


def test_what_training_began_with_is_no_difference(settings):
    beit = replace(STORED, vision_encoder=VisionConfig(type="beit", width=192, mlp_ratio=633 / 192))
    for training in (True, False):
        same = settings("vision_encoder.layer_scale=1.0", "vision_encoder.mlp_ratio=3.3")
        assert changes_to(same, beit, "x", training) == {}
        with pytest.raises(ValueError, match=r"vision_encoder\.layer_scale is 0"):
            changes_to(settings("vision_encoder.layer_scale=0"), beit, "x", training)


def test_what_an_official_file_does_not_hold_is_set_beside_it(settings, tmp_path):
    (tmp_path / "x.pth").touch()
    message = (
        r"heads is 4 here and 2 in the checkpoint .*x\.pth: .* num_attention_heads in a vision_config\.json beside"
    )
    with pytest.raises(ValueError, match=message):
        changes_to(settings("vision_encoder.heads=4"), STORED, str(tmp_path / "x.pth"), training=False)
    with pytest.raises(ValueError, match=r"set layer_norm_eps in a bert_config\.json beside it"):
        changes_to(settings("text_encoder.layer_norm_eps=1e-6"), STORED, str(tmp_path / "x.pth"), training=True)


def test_texts_must_fit(settings, tokenizer):
    with pytest.raises(ValueError, match=r"max_txt_l\.image is 41: must be from 2 to text_encoder\.max_positions, 40"):
        check_texts(settings("max_txt_l.image=41").config, STORED, tokenizer)
    tokenizer.mask_id = NO_MASK
    with pytest.raises(ValueError, match=r"loss_weight\.mlm is 1, but tokenizer=.* has no \[MASK\]: set"):
        check_texts(settings().config, STORED, tokenizer)
    check_texts(settings().config, replace(STORED, loss_weight=LossWeights(mlm=0.0)), tokenizer)


def test_questions_add_a_decoder_as_deep_as_the_fusion_layers(settings, tokenizer):
    changes = changes_to(settings("task=qa"), STORED, "x", training=True)
    assert changes == {"answer_decoder.enable": True, "answer_decoder.num_layers": 1}
    changes = changes_to(settings("task=qa", "answer_decoder.num_layers=2"), STORED, "x", training=True)
    assert changes["answer_decoder.num_layers"] == 2
    with pytest.raises(ValueError, match=r"answer_decoder\.num_layers is 4: must be from 1 to text_encoder\.layers, 3"):
        changes_to(settings("task=qa", "answer_decoder.num_layers=4"), STORED, "x", training=True)
    assert changes_to(settings("answer_decoder.num_layers=2"), STORED, "x", training=True) == {}
    fresh = fresh_architecture(settings("task=qa", "text_encoder.fusion_layer=10"), tokenizer)
    assert (fresh.answer_decoder.enable, fresh.answer_decoder.num_layers) == (True, 2)
