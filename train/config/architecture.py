"""Which model a run trains or evaluates: from its settings, or from the checkpoint it starts from."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from pathlib import Path
from typing import Any

from loaders.text import Tokenizer
from model.config import AnswerDecoderConfig, ModelConfig, config_to_dict, dotted
from runtime.errors import UserError
from train.config.files import Settings
from train.config.settings import RunConfig

# What fine-tuning may set otherwise than the checkpoint: none of it makes trained weights meaningless.
CHANGEABLE = (
    "image_res",
    "add_temporal_embed",
    "temporal_vision_encoder.enable",
    "temporal_vision_encoder.num_layers",
    "temporal_vision_encoder.update_pooler_embed",
    "itm_hard_neg",
    "gather_negatives",
    "mlm_prob",
    "loss_weight.itc",
    "loss_weight.itm",
    "loss_weight.mlm",
    "vision_encoder.drop_path",
    "text_encoder.dropout",
    "vision_encoder.initializer_range",
    "text_encoder.initializer_range",
)
# What concerns the beginning of training only, and what changes no weight and no score.
_WITHOUT_EFFECT = ("temp", "vision_encoder.pretrained", "text_encoder.pretrained")
_OF_TEMPORAL = ("temporal_vision_encoder.num_layers", "temporal_vision_encoder.update_pooler_embed")
# What neither tensors nor settings of an official file tell, and its name in the JSON files beside it.
_NOT_IN_OFFICIAL = {"heads": "num_attention_heads", "layer_norm_eps": "layer_norm_eps"}
_DEPTH = "answer_decoder.num_layers"  # means nothing to a model without an answer decoder
_TRAINING_ONLY = (
    "itm_hard_neg",
    "gather_negatives",
    "mlm_prob",
    "loss_weight.",
    "vision_encoder.drop_path",
    "text_encoder.dropout",
    "vision_encoder.initializer_range",
    "text_encoder.initializer_range",
)


def fresh_architecture(settings: Settings, tokenizer: Tokenizer) -> ModelConfig:
    """The model that the settings describe; its vocabulary is the tokenizer's unless its size is set.

    Raises ValueError when the vocabulary or the texts do not fit.
    """
    run = settings.config
    config = deepcopy(_as_model(run))
    config.num_frames = run.video_input.num_frames
    if run.task == "qa":
        config.answer_decoder = AnswerDecoderConfig(True, _decoder_depth(settings, config))
    if "text_encoder.vocab_size" not in settings.explicit:
        config.text_encoder.vocab_size = tokenizer.vocab_size
    check_texts(run, config, tokenizer)
    return config


def _decoder_depth(settings: Settings, config: ModelConfig) -> int:
    """Layers of a new answer decoder: as many as there are fusion layers, which it begins as, unless set."""
    text = config.text_encoder
    depth = text.layers - text.fusion_layer
    if _DEPTH in settings.explicit:
        depth = settings.config.answer_decoder.num_layers
    if not 1 <= depth <= text.layers:
        raise UserError(f"answer_decoder.num_layers is {depth}: must be from 1 to text_encoder.layers, {text.layers}")
    return depth


def changes_to(settings: Settings, stored: ModelConfig, source: str, training: bool) -> dict[str, Any]:
    """What the settings ask to be otherwise than in the checkpoint `source`: dotted ModelConfig keys and values.

    Only keys that the user has set count. For evaluation nothing that needs training may change.
    Raises ValueError when a set value contradicts the checkpoint.
    """
    wanted, there = dotted(config_to_dict(_as_model(settings.config))), dotted(config_to_dict(stored))
    changes: dict[str, Any] = {}
    for key in sorted(settings.explicit & set(wanted)):
        value = wanted[key]
        if value == there[key] or _is_same(key, value, stored):
            continue
        if not training and (key.startswith(_TRAINING_ONLY) or _is_unused(key, stored)):
            continue
        if key == "image_res" or (training and key in CHANGEABLE):
            changes[key] = value
            continue
        remedy = f"remove it from the configuration, or {key}=null: a checkpoint brings its own architecture"
        if key in CHANGEABLE:
            remedy += "; to change it, fine-tune with launch/finetune_retrieval.py first"
        part, _, name = key.rpartition(".")
        if name in _NOT_IN_OFFICIAL and Path(source).is_file():
            file = "vision_config.json" if part == "vision_encoder" else "bert_config.json"
            remedy = f"if it was trained so, say it by {_NOT_IN_OFFICIAL[name]} in a {file} beside it"
        raise UserError(f"{key} is {value!r} here and {there[key]!r} in the checkpoint {source}: {remedy}")
    if training and settings.config.task == "qa" and not stored.answer_decoder.enable:
        changes["answer_decoder.enable"] = True
        changes[_DEPTH] = _decoder_depth(settings, stored)
    if training and "video_input.num_frames" in settings.explicit:
        frames = settings.config.video_input.num_frames
        if frames != stored.num_frames:
            changes["num_frames"] = frames
    return changes


def _is_same(key: str, value: Any, stored: ModelConfig) -> bool:
    """Whether a setting that differs from the checkpoint's describes the same model all the same."""
    vision = stored.vision_encoder
    if key == "vision_encoder.layer_scale":  # what the factors began as; 0: there are none
        return vision.type != "beit" or bool(value) == bool(vision.layer_scale)
    if key == "vision_encoder.mlp_ratio":
        return int(vision.width * value) == int(vision.width * vision.mlp_ratio)
    return key in _WITHOUT_EFFECT or (key == _DEPTH and not stored.answer_decoder.enable)


def _is_unused(key: str, stored: ModelConfig) -> bool:
    """Whether a setting is about a part that the checkpoint's model does not have."""
    return key in _OF_TEMPORAL and not stored.temporal_vision_encoder.enable


def adopt(settings: Settings, config: ModelConfig) -> None:
    """Write the architecture back into the settings, so that the resolved ones say what is run."""
    run = settings.config
    for item in dataclasses.fields(ModelConfig):
        if hasattr(run, item.name):
            setattr(run, item.name, deepcopy(getattr(config, item.name)))
    if "video_input.num_frames" not in settings.explicit:
        run.video_input.num_frames = config.num_frames


def check_texts(run: RunConfig, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError when the tokenizer or the text lengths do not fit the text encoder."""
    text = config.text_encoder
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"tokenizer={run.tokenizer} has {tokenizer.vocab_size} words, the model's text_encoder.vocab_size is "
            f"{text.vocab_size}: name the vocabulary that the model was trained with, tokenizer=vocab.txt"
        )
    for medium in ("image", "video"):
        length = getattr(run.max_txt_l, medium)
        if not 2 <= length <= text.max_positions:
            raise UserError(
                f"max_txt_l.{medium} is {length}: must be from 2 to text_encoder.max_positions, {text.max_positions}"
            )


def _as_model(run: RunConfig) -> ModelConfig:
    names = {item.name for item in dataclasses.fields(ModelConfig)} & {item.name for item in dataclasses.fields(run)}
    return ModelConfig(**{name: getattr(run, name) for name in names})
