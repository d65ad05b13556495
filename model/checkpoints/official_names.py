"""Names of tensors: ours (timm's and transformers') to and from the official checkpoints'."""

from __future__ import annotations

import re

import torch

_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "attn.proj": "attention.output.dense",
    "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_STEM = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "fc_norm": "pooler.layernorm",
}
_QKV = ("query", "key", "value")
TEMPERATURE = "temp"  # a number there, a matrix of one entry here


def vision_parts(name: str) -> list[str]:
    """Hugging Face names of the tensors that, stacked along their first axis, are timm's tensor `name`."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return [_rename(name, _STEM)]
    prefix, rest = f"encoder.layer.{match[1]}.", match[2]
    fused = re.fullmatch(r"attn\.qkv\.(weight|bias)", rest)
    if fused:
        return [f"{prefix}attention.attention.{part}.{fused[1]}" for part in _QKV]
    return [prefix + _rename(rest, _BLOCK)]


def _rename(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"tensor {name!r} has no name in official checkpoints")


def official_parts(name: str, prefix: str) -> list[str]:
    """Official names of the tensors that make up our tensor `name`.

    prefix: "text_encoder." after retrieval or QA fine-tuning, "text_encoder.bert." after pre-training.
    """
    for ours, theirs in (
        ("vision_encoder.layernorm.", "vision_layernorm."),
        ("text_encoder.embeddings.", prefix + "embeddings."),
        ("text_encoder.layer.", prefix + "encoder.layer."),
        ("word_head.", "text_encoder.cls.predictions."),
        ("answer_decoder.embeddings.", "text_decoder.bert.embeddings."),
        ("answer_decoder.layer.", "text_decoder.bert.encoder.layer."),
        ("answer_decoder.word_head.", "text_decoder.cls.predictions."),
    ):
        if name.startswith(ours):
            return [theirs + name.removeprefix(ours)]
    if name.startswith("vision_encoder.transformer."):
        return ["vision_encoder." + part for part in vision_parts(name.removeprefix("vision_encoder.transformer."))]
    return [name]


def is_rebuilt(name: str) -> bool:
    """Whether an official entry is a constant index table, which a model computes itself."""
    return name.endswith(("relative_position_index", ".position_ids"))


def tied_to(name: str) -> str | None:
    """The official entry that an official entry repeats (tied weights), or None."""
    for head, embeddings in (
        ("text_encoder.cls.predictions.", "text_encoder.bert.embeddings."),
        ("text_decoder.cls.predictions.", "text_decoder.bert.embeddings."),
    ):
        if name == head + "decoder.weight":
            return embeddings + "word_embeddings.weight"
        if name == head + "decoder.bias":
            return head + "bias"
    return None


def to_official(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Our tensors, or gradients of them, by their official names; `prefix` is that of the text encoder."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        parts = official_parts(name, prefix)
        result.update(zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor], strict=True))
    if TEMPERATURE in result:
        result[TEMPERATURE] = result[TEMPERATURE].reshape(())
    return result


def from_official(state: dict[str, torch.Tensor], names: list[str], prefix: str) -> dict[str, torch.Tensor]:
    """Our tensors `names`, as far as they are in the official `state`; then its other tensors, by their own names.

    Raises ValueError when tied entries differ.
    """
    rest = {name: tensor for name, tensor in state.items() if not is_rebuilt(name)}
    for name in list(rest):
        source = tied_to(name)
        if source in state:
            if not torch.equal(state[name], state[source]):
                raise ValueError(f"{name} and {source} differ, although they are one tensor in this model")
            del rest[name]
    result: dict[str, torch.Tensor] = {}
    for name in names:
        parts = official_parts(name, prefix)
        if all(part in rest for part in parts):
            tensors = [rest.pop(part) for part in parts]
            result[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    if TEMPERATURE in result:
        result[TEMPERATURE] = result[TEMPERATURE].reshape(1, 1)
    return result | rest
