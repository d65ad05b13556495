"""The distribution of every random initial weight."""

import math
import re

import pytest
import torch

from model.building import build_model
from model.config import AnswerDecoderConfig, LossWeights, ModelConfig, TemporalConfig, TextConfig, VisionConfig

# The first pattern that is found in a tensor's name says its distribution: constant(value), normal(std), uniform (as
# torch's Linear: bound 1/sqrt(inputs)), or scaled (timm's BEiT: std 0.02 / sqrt(2 · number of the block, from 1)).
# What starts at random in the official code is recorded with golden case 10: heads, temperature, temporal embeddings,
# cross-attention; BERT's is N(0, 0.02). A vision encoder never starts at random there; here it is timm's.
RULES = [
    (r"^temp$", ("constant", 0.07)),
    (r"^temporal_embeddings$", ("constant", 0.0)),
    (r"^(vision_proj|text_proj|itm_head)\.", ("uniform",)),
    (r"gamma_[12]$", ("constant", 0.1)),
    (r"relative_position_bias_table$|[qv]_bias$", ("constant", 0.0)),
    (r"(norm|norm1|norm2|fc_norm|layernorm|LayerNorm)\.weight$", ("constant", 1.0)),
    (r"patch_embed\.proj\.(weight|bias)$", ("uniform",)),
    (r"\.bias$", ("constant", 0.0)),
    (r"(cls_token|pos_embed)$", ("normal", None)),  # by kind of vision transformer
    (r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.weight$", ("block",)),
    (r"vision_encoder\.transformer\.blocks\..*weight$", ("normal", 0.02)),
    (r"(embeddings|dense|query|key|value)\.weight$", ("normal", 0.02)),
]
SMALLEST = {"cls_token": {"beit": 0.02, "vit": 1e-6, "deit": 1e-6}, "pos_embed": {"vit": 0.02, "deit": 0.02}}


def configuration(kind, answers):
    return ModelConfig(
        vision_encoder=VisionConfig(type=kind, width=192, depth=3, heads=3),
        text_encoder=TextConfig(vocab_size=3000, width=192, layers=4, fusion_layer=2, heads=3, intermediate=768),
        temporal_vision_encoder=TemporalConfig(True, 1),
        answer_decoder=AnswerDecoderConfig(answers, 2),
        loss_weight=LossWeights(mlm=0.0 if answers else 1.0),
        image_res=64,
        num_frames=2,
    )


def expected(name, tensor, fan_in, kind):
    """Mean and standard deviation of a tensor, and a bound that its entries keep."""
    rule = next(rule for pattern, rule in RULES if re.search(pattern, name))
    if rule[0] == "constant":
        return rule[1], 0.0, abs(rule[1])
    if rule[0] == "uniform":
        bound = 1 / math.sqrt(fan_in)
        return 0.0, bound / math.sqrt(3), bound
    if rule[0] == "block":
        number = int(re.search(r"blocks\.(\d+)\.", name)[1]) + 1
        std = 0.02 / math.sqrt(2 * number) if kind == "beit" else 0.02
    else:
        std = rule[1] or SMALLEST[name.rsplit(".", 1)[1]][kind]
    return 0.0, std, 7 * std


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("kind", ["beit", "vit", "deit"])
def test_initial_weights_follow_their_distributions(kind, answers):
    torch.manual_seed(0)
    state = build_model(configuration(kind, answers)).state_dict()
    for name, tensor in state.items():
        weight = state.get(name.removesuffix("bias") + "weight", tensor)
        mean, std, bound = expected(name, tensor, weight[0].numel(), kind)
        count = tensor.numel()
        assert float(tensor.abs().max()) <= bound * 1.0001, name
        assert float(tensor.mean()) == pytest.approx(mean, abs=6 * std / math.sqrt(count) + 1e-7), name
        if std == 0:
            assert torch.equal(tensor, torch.full_like(tensor, mean)), name
        elif count > 30:
            assert float(tensor.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * count)), name


def test_the_padding_embedding_is_zero():
    embeddings = build_model(configuration("vit", True), {"pad_id": 7}).state_dict()
    for part in ("text_encoder", "answer_decoder"):
        table = embeddings[f"{part}.embeddings.word_embeddings.weight"]
        assert torch.equal(table[7], torch.zeros(192))
        assert (table.abs().sum(1) > 0).sum() == 2999
