"""Encoders of the user's own: what they may leave to the base class, and the errors of those that do not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_models import CLS, MASK, PAD, VOCAB, small_batch, small_config
from torch import nn
from torch.nn import functional

from model.building import build_model
from model.checkpoints.files import DESCRIPTION, Weights
from model.checkpoints.loading import load_model, save_model
from model.checkpoints.pretrained import new_model
from model.config import LossWeights, TemporalConfig, TextConfig, VisionConfig
from model.export import write_official
from model.text import TEXT, TextEncoder, run_layer
from model.vision import VISION, VisionEncoder
from preprocessing.normalization import normalize
from runtime.errors import UserError

IDS = {"pad_id": PAD, "cls_id": CLS, "mask_id": MASK}


@VISION("patches")
class Patches(VisionEncoder):
    """A linear map of each patch, with position embeddings."""

    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

    def __init__(self, config, cut: int = 8):
        super().__init__()
        self.embed = nn.Conv2d(3, config.vision_encoder.width, cut, cut)
        self.positions = nn.Parameter(torch.randn(1, config.vision_encoder.width, *[config.image_res // cut] * 2))

    def forward(self, images):
        cells = run_layer(self.embed, self.recompute, images) + self.positions
        tokens = cells.flatten(2).transpose(1, 2)
        return tokens, tokens.mean(1)

    def resized(self, name, tensor, shape):
        assert name == "positions"
        return functional.interpolate(tensor, shape[2:], mode="bilinear")

    def from_published(self, state):
        return {f"embed.{name}": tensor for name, tensor in state.items() if name in ("weight", "bias")} | {
            "positions": torch.ones(1, 48, 2, 2)
        }


@TEXT("words")
class Words(TextEncoder):
    """The mean of the text added to each word."""

    def __init__(self, config, pad_id, width: int = 0):
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, width or config.text_encoder.width, padding_idx=pad_id)

    def forward(self, input_ids, attention_mask):
        words = run_layer(self.word_embeddings, self.recompute, input_ids) * attention_mask[:, :, None]
        return words + words.sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]


@TEXT("letters")
class Letters(TextEncoder):
    """Without word embeddings."""

    def __init__(self, config, pad_id):
        super().__init__()
        self.map = nn.Linear(1, config.text_encoder.width)

    def forward(self, input_ids, attention_mask):
        return self.map(input_ids[:, :, None].float())


RETURNED = {
    "dict": {"tokens": torch.zeros(2, 4, 48)},
    "tuple": (torch.zeros(2, 4, 48),) * 3,
    "NoneType": None,
    "Tensor": torch.zeros(2, 16, 48),
    "flat": [torch.zeros(2, 48)] * 2,
}


@VISION("returns")
class Returns(Patches):
    """Something other than tokens and pooled vectors; statistics are lists."""

    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]

    def __init__(self, config, what=""):
        super().__init__(config)
        self.what = what

    def forward(self, images):
        return RETURNED[self.what] if self.what else super().forward(images)


@TEXT("returns")
class ReturnsText(Words):
    """Something other than states."""

    def __init__(self, config, pad_id, what):
        super().__init__(config, pad_id)
        self.what = what

    def forward(self, input_ids, attention_mask):
        return RETURNED[self.what]


@VISION("stacked")
class Stacked(VisionEncoder):
    """PyTorch's own transformer."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 2, 96, batch_first=True), 2)

    def forward(self, images):
        tokens = self.layers(images.reshape(len(images), -1, 48))
        return tokens, tokens.mean(1)


def own_config(vision=None, text=None, kind="words", **changes):
    config = small_config(**changes)
    config.vision_encoder = VisionConfig(type="patches", width=48, options=vision or {})
    config.text_encoder.type, config.text_encoder.options = kind, text or {}
    return config


def gradients(model, batch):
    torch.manual_seed(3)
    torch.stack(list(model(*batch).values())).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_they_train_in_one_graph_and_recompute_with_temporal_parts_too():
    temporal = TemporalConfig(True, 1, update_pooler_embed=True)
    config = own_config(num_frames=2, temporal_vision_encoder=temporal, add_temporal_embed=True)
    torch.manual_seed(0)
    model, batch = build_model(config, IDS), small_batch(frames=2)
    assert (model.mean, model.std) == (Patches.mean, Patches.std)
    plain = {name: gradient.clone() for name, gradient in gradients(model, batch).items()}
    assert {"vision_encoder.positions", "text_encoder.word_embeddings.weight"} <= plain.keys()
    model.zero_grad()
    for name, gradient in gradients(torch.compile(model, fullgraph=True, backend="eager"), batch).items():
        torch.testing.assert_close(gradient, plain[name.removeprefix("_orig_mod.")], msg=name)
    model.zero_grad()
    model.set_gradient_checkpointing()
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
    assert model.vision_encoder.recompute
    assert model.text_encoder.recompute


def test_a_checkpoint_loads_at_another_image_size(tmp_path):
    model = build_model(own_config(vision={"cut": 16}), IDS)
    save_model(model, model.config, tmp_path)
    again = load_model(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    larger, resized = load_model(tmp_path, {"image_res": 64}).vision_encoder, model.vision_encoder.positions
    assert torch.equal(larger.positions, functional.interpolate(resized, (4, 4), mode="bilinear"))
    with pytest.raises(UserError, match="type=patches has no official format"):
        write_official(Weights(model.config, model.state_dict()), tmp_path / "x.pth")


def test_initial_weights_are_taken_by_the_names_that_the_encoder_gives_them(tmp_path):
    for part, tensors in {
        "vision": {"weight": torch.ones(48, 3, 8, 8), "bias": torch.ones(48), "head": torch.ones(2)},
        "text": {"word_embeddings.weight": torch.ones(VOCAB, 32)},
    }.items():
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / "model.safetensors")
    config = own_config()
    config.vision_encoder.pretrained, config.text_encoder.pretrained = str(tmp_path / "vision"), str(tmp_path / "text")
    model = new_model(config, IDS)
    assert model.vision_encoder.embed.weight.eq(1).all()
    assert model.vision_encoder.positions.eq(1).all()  # resized
    assert model.text_encoder.word_embeddings.weight.eq(1).all()
    config.text_encoder.pretrained = str(tmp_path / "vision")
    with pytest.raises(UserError, match=r"does not fit the sizes under text_encoder \(missing.*word_embeddings"):
        new_model(config, IDS)


def test_a_checkpoint_from_before_there_were_types_is_bert(tmp_path):
    config = small_config()
    save_model(build_model(config, IDS), config, tmp_path)
    path = tmp_path / DESCRIPTION
    description = json.loads(path.read_text())
    for part in ("vision_encoder", "text_encoder"):
        del description["config"][part]["options"]
    del description["config"]["text_encoder"]["type"]
    path.write_text(json.dumps(description))
    assert load_model(tmp_path).config == config


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"vision": {"cuts": 4}}, r"vision_encoder\.options: got an unexpected keyword argument 'cuts'; .* are cut"),
        ({"text": {"width": 16}}, r"states \(2, 2, 16\) of 2 texts of 2 tokens; they must be \(2, 2, 32\)"),
        ({"kind": "letters"}, r"has word_embeddings of shape None; MLM needs an nn\.Embedding \(60, 32\)"),
    ],
)
def test_what_does_not_fit_is_an_error(own, message):
    with pytest.raises(UserError, match=message):
        build_model(own_config(**own), IDS)


@pytest.mark.parametrize("what", RETURNED)
def test_what_an_encoder_returns_is_checked(what):
    config = own_config()
    config.vision_encoder = VisionConfig(type="returns", width=48, options={"what": what})
    message = r"makes tokens \(2, 48\) and" if what == "flat" else f"type=returns returns a {what}: "
    with pytest.raises(UserError, match=message):
        build_model(config, IDS)
    if what in ("tuple", "NoneType"):
        with pytest.raises(UserError, match=f"text_encoder.type=returns returns a {what}: "):
            build_model(own_config(kind="returns", text={"what": what}), IDS)


def test_an_encoder_must_derive_from_its_class():
    if "linear" not in VISION:
        VISION("linear")(lambda config: nn.Linear(3, 48))
        TEXT("linear")(lambda config, pad_id: nn.Linear(3, 48))
    with pytest.raises(UserError, match=r"text_encoder.type=linear is a Linear: derive it from TextEncoder"):
        build_model(own_config(kind="linear"), IDS)
    config = own_config()
    config.vision_encoder.type = "linear"
    with pytest.raises(UserError, match=r"vision_encoder.type=linear is a Linear: derive it from VisionEncoder"):
        build_model(config, IDS)


def test_statistics_may_be_lists():
    config = own_config()
    config.vision_encoder = VisionConfig(type="returns", width=48)
    model = build_model(config, IDS)
    assert normalize(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8), model.mean, model.std).shape == (1, 1, 3, 32, 32)


def test_the_work_of_pytorchs_transformer_is_counted():
    config = own_config()
    config.vision_encoder = VisionConfig(type="stacked", width=48)
    flops, tokens = build_model(config, IDS).vision_encoder.measured
    products = 2 * tokens * (4 * 48 * 48 + 2 * 48 * 96 + 2 * tokens * 48)
    assert (flops, tokens) == (2 * products, 64)
    assert torch.backends.mha.get_fastpath_enabled()


def test_another_text_encoder_has_no_official_format(tmp_path):
    config = small_config()
    config.text_encoder.type = "words"
    model = build_model(config, IDS)
    with pytest.raises(UserError, match=r"text_encoder.type=words has no official format, give a folder"):
        write_official(Weights(config, model.state_dict()), tmp_path / "x.pth")


def test_word_embeddings_are_for_mlm_only():
    model = build_model(own_config(kind="letters", loss_weight=LossWeights(mlm=0.0)), IDS)
    assert model(*small_batch()).keys() == {"loss_itc", "loss_itm"}


def test_unknown_types_and_other_widths_are_errors():
    config = own_config()
    config.text_encoder = TextConfig(type="word")
    with pytest.raises(UserError, match=r"text_encoder.type is 'word', must be one of words.*; a module of your own"):
        build_model(config, IDS)
    config = small_config()
    config.vision_encoder.options = {"cut": 8}
    with pytest.raises(UserError, match=r"'cut'; the options of TimmEncoder none"):
        build_model(config, IDS)
    VISION("thin")(lambda config: Patches(own_config()).requires_grad_(False))
    config.vision_encoder = VisionConfig(type="thin", width=64)
    with pytest.raises(UserError, match=r"makes tokens \(2, 16, 48\) and pooled vectors \(2, 48\).*\(2, tokens, 64\)"):
        build_model(config, IDS)
