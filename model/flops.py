"""Floating-point operations of a training step: matrix products only, a multiply-add counted as two."""

from __future__ import annotations

from model.config import ModelConfig
from model.encoders import Encoders
from model.losses import max_masked
from model.patch_dropout import kept_patches


def layer_flops(tokens: int, width: int, hidden: int, context: int) -> int:
    """One transformer layer over `tokens` tokens that attend to `context` tokens each: projections, attention, MLP."""
    return 8 * tokens * width**2 + 4 * tokens * context * width + 4 * tokens * width * hidden


def image_flops(model: Encoders) -> tuple[int, int]:
    """FLOPs of encoding an image in training, and the number of its tokens."""
    if model.vision_encoder.measured is not None:
        return model.vision_encoder.measured
    vision = model.config.vision_encoder
    patches = (model.config.image_res // vision.patch_size) ** 2
    tokens, hidden = kept_patches(patches, vision.patch_dropout) + 1, int(vision.width * vision.mlp_ratio)
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.width
    return embedding + vision.depth * layer_flops(tokens, vision.width, hidden, tokens), tokens


def text_flops(model: Encoders, length: int) -> int:
    """FLOPs of the text-only half for a text of `length` tokens."""
    if model.text_encoder.measured is not None:
        return model.text_encoder.flops(length)
    text = model.config.text_encoder
    return text.fusion_layer * layer_flops(length, text.width, text.intermediate, length)


def step_flops(model: Encoders, pairs: int, frames: int, text_length: int) -> dict[str, int]:
    """Forward FLOPs of one step by part; a step with its backward pass takes three times as many.

    Counts what the losses need: keys and values of a visual once for its four pairs, MLM logits at the masked positions
    only. Work that an implementation repeats is not counted.
    """
    config: ModelConfig = model.config
    vision, text, temporal = config.vision_encoder, config.text_encoder, config.temporal_vision_encoder
    images, (each, tokens) = pairs * frames, image_flops(model)
    result = {"vision": images * each}
    if temporal.enable and frames > 1:
        wide = text.intermediate * vision.width // text.width
        per_layer = layer_flops(frames, vision.width, wide, frames)
        result["temporal"] = pairs * tokens * temporal.num_layers * per_layer
    mlm = config.loss_weight.mlm > 0
    texts, matched, read = (2 if mlm else 1) * pairs, 3 * pairs, pairs if mlm else 0
    width, inner, length, source = text.width, text.intermediate, text_length, tokens * frames
    result["text"] = texts * text_flops(model, length)
    self_attention = 8 * length * width**2 + 4 * length**2 * width
    cross_attention = 4 * width**2 + 4 * source * width + 4 * width * inner  # of one token
    layers = text.layers - text.fusion_layer
    keys = layers * pairs * 4 * source * vision.width * width
    # The first layer's self-attention runs once for a text; the last layer computes one token of the matched pairs.
    all_rows = matched + read
    lower = max(0, layers - 1) * all_rows * length * cross_attention + max(0, layers - 2) * all_rows * self_attention
    last = matched * cross_attention + read * length * cross_attention
    if layers > 1:
        last += matched * (4 * length * width**2 + 4 * width**2 + 4 * length * width) + read * self_attention
    result["fusion"] = keys + texts * self_attention + lower + last if layers else 0
    if mlm:
        chosen = max_masked(pairs * text_length, config.mlm_prob)
        result["mlm"] = chosen * (2 * text.width**2 + 2 * text.width * text.vocab_size)
    result["heads"] = 2 * config.embed_dim * (images * vision.width + pairs * text.width)
    return result | {"total": sum(result.values())}
