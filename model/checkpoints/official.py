"""Reads official checkpoints (.pth) safely: no code in the file runs; infers the architecture from shapes."""

from __future__ import annotations

import collections
import json
import math
import pickle
import re
import typing
import zipfile
from pathlib import Path
from typing import Any

import omegaconf
import torch
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from model.building import tensor_names
from model.checkpoints.files import Weights, find_vocabulary, read_special_ids
from model.checkpoints.official_names import from_official
from model.config import (
    AnswerDecoderConfig,
    LossWeights,
    ModelConfig,
    TemporalConfig,
    TextConfig,
    VisionConfig,
    config_from_dict,
)
from runtime.errors import UserError

# Everything that an official checkpoint's pickle may name, beyond tensors.
ALLOWED: list[Any] = [
    omegaconf.DictConfig,
    omegaconf.ListConfig,
    AnyNode,
    ContainerMetadata,
    Metadata,
    typing.Any,
    collections.defaultdict,
    dict,
    list,
    int,
]
# Settings of the official code that are those of our ModelConfig, with its defaults.
SETTINGS = {"add_temporal_embed": bool, "image_res": int, "temp": float, "itm_hard_neg": bool, "mlm_prob": float}
HEAD_WIDTH = 64  # of every published BERT and ViT; smaller models come with their JSON configurations
# In the settings of files that model.export wrote: our ModelConfig; until November 2026 the heads only.
MODEL, HEADS = "model_config", "num_attention_heads"


def read_official_file(path: Path) -> dict[str, Any]:
    """The dictionary in an official checkpoint; its `config` as plain values, interpolations left as they are.

    Raises ValueError when the file is truncated, is no such checkpoint, or names anything beyond tensors, plain
    values and OmegaConf containers.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
        what = f"names {found[1] or found[2]}" if found else "holds something other than tensors and settings"
        raise UserError(
            f"{path} {what} and is refused: loading it could run code; get the checkpoint from its authors"
        ) from None
    except Exception as error:  # torch.load raises many types for a file that is not a checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): truncated or not a PyTorch file; copy it again") from None
    if not isinstance(content, dict) or not {"model", "config"} <= content.keys():
        raise UserError(f"{path} is not an official checkpoint: it has no entries `model` and `config`")
    config = content["config"]
    if isinstance(config, omegaconf.DictConfig):
        content["config"] = omegaconf.OmegaConf.to_container(config, resolve=False)
    return content


def _json_beside(path: Path, name: str) -> dict[str, Any]:
    file = path.parent / name
    return json.loads(file.read_text()) if file.is_file() else {}


def _count(state: dict[str, torch.Tensor], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group matches in a name; 0 without a match."""
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _vision_config(path: Path, state: dict[str, torch.Tensor], settings: dict[str, Any]) -> VisionConfig:
    extra = _json_beside(path, "vision_config.json")
    projection = state["vision_encoder.embeddings.patch_embeddings.projection.weight"]
    width = projection.shape[0]
    layer = "vision_encoder.encoder.layer.0."
    table = state.get(layer + "attention.attention.relative_position_bias.relative_position_bias_table")
    kind = settings.get("vit_type", "beit" if table is not None else "vit")
    heads = table.shape[1] if table is not None else _heads(path, width, extra, settings, "vision")
    return VisionConfig(
        type=kind,
        patch_size=projection.shape[2],
        width=width,
        depth=_count(state, r"vision_encoder\.encoder\.layer\.(\d+)\."),
        heads=heads,
        mlp_ratio=_ratio(state[layer + "intermediate.dense.weight"].shape[0], width),
        layer_scale=VisionConfig.layer_scale if kind != "beit" or layer + "lambda_1" in state else 0.0,
        drop_path=extra.get("drop_path_rate", 0.1) if kind == "beit" else 0.0,
        layer_norm_eps=extra.get("layer_norm_eps", 1e-12),
    )


def _ratio(hidden: int, width: int) -> float:
    """The ratio which times `width`, rounded down, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _heads(path: Path, width: int, extra: dict[str, Any], settings: dict[str, Any], part: str) -> int:
    """Attention heads: of the JSON beside the checkpoint, else of its settings (`model.export`), else as published."""
    heads = extra.get("num_attention_heads") or settings.get(HEADS, {}).get(part) or width // HEAD_WIDTH
    if not heads:
        name = "vision_config.json" if part == "vision" else "bert_config.json"
        raise UserError(
            f"{path}: the number of attention heads of its {part} encoder of width {width} is unknown: put a {name} "
            "with num_attention_heads beside it"
        )
    return heads


def _text_config(path: Path, state: dict[str, torch.Tensor], prefix: str, settings: dict[str, Any]) -> TextConfig:
    extra = _json_beside(path, "bert_config.json")
    vocab_size, width = state[prefix + "embeddings.word_embeddings.weight"].shape
    layers = _count(state, re.escape(prefix) + r"encoder\.layer\.(\d+)\.")
    fused = _count(state, re.escape(prefix) + r"encoder\.layer\.(\d+)\.(?!crossattention)")
    first_fusion = min(
        (i for i in range(layers) if f"{prefix}encoder.layer.{i}.crossattention.self.query.weight" in state),
        default=fused,
    )
    return TextConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        fusion_layer=first_fusion,
        heads=_heads(path, width, extra, settings, "text"),
        intermediate=state[prefix + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_positions=state[prefix + "embeddings.position_embeddings.weight"].shape[0],
        dropout=extra.get("hidden_dropout_prob", 0.1),
        layer_norm_eps=extra.get("layer_norm_eps", 1e-12),
    )


def text_prefix(state: dict[str, torch.Tensor]) -> str:
    """Prefix of the text encoder's names: with `bert.` in pre-training checkpoints only."""
    return "text_encoder.bert." if any(name.startswith("text_encoder.bert.") for name in state) else "text_encoder."


def recognise(path: Path, state: dict[str, torch.Tensor], settings: dict[str, Any]) -> ModelConfig:
    """The architecture of official tensors `state` and run settings.

    From the ModelConfig of `model.export` if there is one; else from the shapes, and what they do not show from JSON
    files beside `path` (bert_config.json, vision_config.json) or as published.
    Raises UserError when tensors that every such model has are missing.
    """
    if MODEL in settings:
        return config_from_dict(settings[MODEL])
    prefix = text_prefix(state)
    try:
        vision, text = _vision_config(path, state, settings), _text_config(path, state, prefix, settings)
    except KeyError as error:
        raise UserError(f"{path} is not a Singularity checkpoint: it has no tensor {error}") from None
    temporal = settings.get("temporal_vision_encoder", {})
    decoder_layers = _count(state, r"text_decoder\.bert\.encoder\.layer\.(\d+)\.")
    temporal_layers = _count(state, r"temporal_vision_encoder\.layer\.(\d+)\.")
    given = settings.get("loss_weight", {})
    weights = {name: float(given[name]) for name in ("itc", "itm", "mlm") if name in given}
    if not prefix.endswith("bert."):
        weights["mlm"] = 0.0
    return ModelConfig(
        vision_encoder=vision,
        text_encoder=text,
        temporal_vision_encoder=TemporalConfig(
            enable=temporal_layers > 0,
            num_layers=temporal_layers or 2,
            update_pooler_embed=bool(temporal.get("update_pooler_embed", False)),
        ),
        answer_decoder=AnswerDecoderConfig(enable=decoder_layers > 0, num_layers=decoder_layers or 3),
        num_frames=state["temporal_embeddings"].shape[1],
        embed_dim=state["vision_proj.weight"].shape[0] if "vision_proj.weight" in state else settings["embed_dim"],
        loss_weight=LossWeights(**weights),
        **{name: kind(settings[name]) for name, kind in SETTINGS.items() if name in settings},
    )


def read_official(path: Path) -> Weights:
    """Architecture and tensors of an official checkpoint by our names; tensors without one keep theirs.

    Raises UserError when the file cannot be read, is refused, or is of another kind.
    """
    content = read_official_file(path)
    state = content["model"]
    config = recognise(path, state, content["config"])
    tensors = from_official(state, tensor_names(config), text_prefix(state))
    vocabulary = find_vocabulary(path, config.text_encoder.vocab_size)
    return Weights(config, tensors, read_special_ids(vocabulary) if vocabulary else {})
