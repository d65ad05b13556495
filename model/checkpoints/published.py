"""The architecture of published encoders: types, sizes and options of a model that starts from them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.backbones import VISION_TYPES
from model.checkpoints.pretrained import find_folder
from model.config import ModelConfig
from model.torchvision_cpu import transformers
from model.towers import DUAL_MODELS, SHIFTED_POSITIONS, TEXT_MODELS, quiet
from model.vision_encoder import VISION
from runtime.errors import UserError

_BERT_SIZES = {  # our names of the sizes of a text encoder, and those in config.json
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
}
_TEXT_TYPES = ("bert", "transformers", *DUAL_MODELS)  # others are the user's
_NEW_LAYERS = 3  # fusion layers above a text encoder that has none, as many as in the paper
_OF_FILES = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "id2label", "label2id")
_CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_PIXELS = {"clip": _CLIP_PIXELS, "siglip": ((0.5,) * 3, (0.5,) * 3)}  # mean and std where the folder has none


@dataclass(frozen=True)
class Published:
    """A published checkpoint: the setting that names it, its folder, and its config.json, empty without one."""

    key: str
    folder: Path
    config: dict[str, Any]

    @property
    def kind(self) -> str | None:
        """Its model_type."""
        return self.config.get("model_type")


def read_published(name: str, key: str) -> Published:
    """The checkpoint that setting `key` names. Raises UserError as `find_folder`, and for a damaged config.json."""
    folder = find_folder(name, key)
    return Published(key, folder, _read_json(folder / "config.json", key))


def _read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: {path} is not valid JSON ({error}); copy it again") from None


def adopt_published(config: ModelConfig, explicit: Collection[str]) -> None:
    """Give the model the types and sizes of the encoders that it starts from, in place.

    Those of `dual_encoder`, of a BERT or another text encoder in `text_encoder.pretrained`, and of the vision tower of
    a CLIP or SigLIP in `vision_encoder.pretrained`; an encoder of the user's own has its own. explicit: dotted settings
    that the user has set.
    Raises UserError for an explicit value that does not fit the weights.
    """
    vision, text = config.vision_encoder, config.text_encoder
    if config.dual_encoder is not None:
        found = read_published(config.dual_encoder, "dual_encoder")
        if found.kind not in DUAL_MODELS:
            raise UserError(
                f"dual_encoder: {config.dual_encoder} holds a {found.kind} model: must be one of "
                f"{', '.join(DUAL_MODELS)} (SigLIP2 of a fixed resolution is a siglip model)"
            )
        names = {"pretrained": config.dual_encoder}
        _set(config, "vision_encoder", names, explicit, found)
        _set(config, "text_encoder", names, explicit, found)
        _set(config, "", {"embed_dim": _dual_config(found).projection_dim}, explicit, found)
    if text.pretrained is not None and text.type in _TEXT_TYPES:
        found = read_published(text.pretrained, "text_encoder.pretrained")
        if found.kind in (None, "bert"):
            _adopt_bert(config, explicit, found)
        elif found.kind in DUAL_MODELS or found.kind in TEXT_MODELS:
            _adopt_text(config, explicit, found)
        else:
            kinds = ", ".join(sorted(["bert", *TEXT_MODELS, *DUAL_MODELS]))
            raise UserError(f"{found.key}: {found.folder} holds a {found.kind} model: must be one of {kinds}")
    own = vision.type in VISION and vision.type not in (*VISION_TYPES, *DUAL_MODELS)
    if vision.pretrained is not None and not own and ("/" in vision.pretrained or Path(vision.pretrained).is_dir()):
        found = read_published(vision.pretrained, "vision_encoder.pretrained")
        if found.kind in DUAL_MODELS:
            _adopt_tower(config, explicit, found)


def _set(
    config: ModelConfig, part: str, values: Mapping[str, Any], explicit: Collection[str], found: Published
) -> None:
    """Set settings of `part` of the model to what fits the weights; raises UserError where the user set another."""
    owner = getattr(config, part) if part else config
    for name, value in values.items():
        key = f"{part}.{name}" if part else name
        if key in explicit and getattr(owner, name) != value:
            raise UserError(
                f"{key} is {getattr(owner, name)!r} here and {value!r} in {found.folder}, which {found.key} names: "
                f"remove it from the configuration, or {key}=null: published weights have their own sizes"
            )
        setattr(owner, name, value)


def _set_layers(config: ModelConfig, layers: int, fusion_layer: int, explicit: Collection[str]) -> None:
    """Set the numbers of layers that the user has not set."""
    if "text_encoder.layers" not in explicit:
        config.text_encoder.layers = layers
    if "text_encoder.fusion_layer" not in explicit:
        config.text_encoder.fusion_layer = fusion_layer


def _adopt_bert(config: ModelConfig, explicit: Collection[str], found: Published) -> None:
    """By default the upper quarter of the published layers, or all above the published ones, are fusion layers."""
    activation = found.config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{found.key}: {found.folder} has the activation {activation}, only gelu fits: take another")
    known = {ours: found.config[theirs] for ours, theirs in _BERT_SIZES.items() if theirs in found.config}
    _set(config, "text_encoder", {"type": "bert", **known}, explicit, found)
    text = config.text_encoder
    published = found.config.get("num_hidden_layers", text.layers)
    layers = text.layers if "text_encoder.layers" in explicit else published
    _set_layers(config, layers, published if layers > published else layers * 3 // 4, explicit)


def _adopt_text(config: ModelConfig, explicit: Collection[str], found: Published) -> None:
    """All published layers are text-only ones; the fusion layers above are BERT's, as wide as they are."""
    dual = found.kind in DUAL_MODELS
    published = _dual_config(found).text_config if dual else _transformers_config(found)
    positions, width = published.max_position_embeddings, published.hidden_size
    if found.kind == "siglip":
        positions += 1
    elif found.kind in SHIFTED_POSITIONS:
        positions -= published.pad_token_id + 1
    sizes = {
        "type": found.kind if dual else "transformers",
        "vocab_size": published.vocab_size,
        "width": width,
        "fusion_layer": published.num_hidden_layers,
        "max_positions": positions,
    }
    _set(config, "text_encoder", sizes, explicit, found)
    text = config.text_encoder
    text.options = _options(published)
    _set_layers(config, text.fusion_layer + _NEW_LAYERS, text.fusion_layer, explicit)
    for name, value in {"heads": published.num_attention_heads, "intermediate": 4 * width}.items():
        if f"text_encoder.{name}" not in explicit:
            setattr(text, name, value)


def _adopt_tower(config: ModelConfig, explicit: Collection[str], found: Published) -> None:
    """The vision tower of a CLIP or SigLIP, with its image size unless another is set."""
    published, kind = _dual_config(found).vision_config, str(found.kind)
    sizes = {
        "type": kind,
        "patch_size": published.patch_size,
        "width": published.hidden_size,
        "depth": published.num_hidden_layers,
        "heads": published.num_attention_heads,
        "mlp_ratio": published.intermediate_size / published.hidden_size,
    }
    _set(config, "vision_encoder", sizes, explicit, found)
    if "image_res" not in explicit:
        config.image_res = published.image_size
    pixels = _read_json(found.folder / "preprocessor_config.json", found.key)
    vision = config.vision_encoder
    vision.mean = vision.mean or list(pixels.get("image_mean", _PIXELS[kind][0]))
    vision.std = vision.std or list(pixels.get("image_std", _PIXELS[kind][1]))
    vision.options = _options(published)


def _transformers_config(found: Published) -> Any:
    with quiet():
        return transformers.AutoConfig.from_pretrained(found.folder)


def _dual_config(found: Published) -> Any:
    """transformers' configuration of a CLIP or SigLIP, with the width of the embeddings as `projection_dim`."""
    result = _transformers_config(found)
    if found.kind == "siglip":
        result.projection_dim = result.text_config.projection_size
    return result


def _options(published: Any) -> dict[str, Any]:
    """What differs from the defaults of transformers' configuration."""
    return {name: value for name, value in published.to_diff_dict().items() if name not in _OF_FILES}
