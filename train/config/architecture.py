"""The architecture of a run's model: from its settings, or from the checkpoint it starts from."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from model.backbones import adopt_backbone
from model.checkpoints.published import adopt_published
from model.config import AnswerDecoderConfig, ModelConfig, ModelSettings
from preprocessing.text import NO_MASK, Tokenizer
from runtime.errors import UserError
from runtime.settings import ANY, FINE_TUNING, START, TRAINING, declarations, flatten
from train.config.settings import RunConfig, Settings

# What neither tensors nor settings of an official file show, and its name in the JSON files beside it.
_NOT_IN_OFFICIAL = {"heads": "num_attention_heads", "layer_norm_eps": "layer_norm_eps"}
_DEPTH = "answer_decoder.num_layers"  # without effect for a model without an answer decoder


def fresh_architecture(settings: Settings, tokenizer: Tokenizer) -> ModelConfig:
    """The model that the settings describe; its encoders have the sizes of timm's backbone and of published weights.

    Without published weights its vocabulary is the tokenizer's, unless its size is set.
    Raises ValueError when the published sizes, the vocabulary or the texts do not fit.
    """
    run = settings.config
    config = ModelConfig.of(run, run.video_input.num_frames)
    if "text_encoder.vocab_size" not in settings.explicit:
        config.text_encoder.vocab_size = tokenizer.vocab_size
    adopt_backbone(config, settings.explicit)
    adopt_published(config, settings.explicit)
    if run.task == "qa":
        config.answer_decoder = AnswerDecoderConfig(True, _decoder_depth(settings, config))
    check_texts(run, config, tokenizer)
    return config


def _decoder_depth(settings: Settings, config: ModelConfig) -> int:
    """Layers of a new answer decoder: as many as fusion layers, whose weights it starts from, unless set."""
    text = config.text_encoder
    depth = text.layers - text.fusion_layer
    if _DEPTH in settings.explicit:
        depth = settings.config.answer_decoder.num_layers
    if not 1 <= depth <= text.layers:
        raise UserError(f"answer_decoder.num_layers is {depth}: must be from 1 to text_encoder.layers, {text.layers}")
    return depth


def changes_to(settings: Settings, stored: ModelConfig, source: str, training: bool) -> dict[str, Any]:
    """Dotted ModelConfig keys and values by which the settings differ from the checkpoint `source`.

    Only keys that the user has set count. For evaluation nothing that needs training may change.
    Raises UserError when a set value contradicts the checkpoint.
    """
    known = declarations(ModelConfig)
    there = flatten(stored, whole=known)
    wanted = flatten(ModelConfig.of(settings.config, stored.num_frames), whole=known)
    changes: dict[str, Any] = {}
    for key in sorted(settings.explicit & set(wanted)):
        value, policy = wanted[key], known[key].checkpoint
        if value == there[key] or _is_same(key, value, stored):
            continue
        if not training and (policy == TRAINING or _is_unused(key, stored)):
            continue
        if key == "plugins":
            value = list(dict.fromkeys([*stored.plugins, *value]))
        if policy == ANY or (training and policy in (FINE_TUNING, TRAINING)):
            changes[key] = value
            continue
        raise UserError(_contradiction(key, value, there[key], source, policy))
    becomes_qa = settings.config.task == "qa" and not stored.answer_decoder.enable
    if stored.losses and (not training or (becomes_qa and "losses" not in settings.explicit)):
        changes["losses"] = {}  # not needed; a QA model does not compute what those of the checkpoint read
    if training and becomes_qa:
        changes["answer_decoder.enable"] = True
        changes[_DEPTH] = _decoder_depth(settings, stored)
    if training and "video_input.num_frames" in settings.explicit:
        frames = settings.config.video_input.num_frames
        if frames != stored.num_frames:
            changes["num_frames"] = frames
    return changes


def _contradiction(key: str, value: Any, stored: Any, source: str, policy: str | None) -> str:
    """The error for a setting that may not differ from the checkpoint `source`."""
    remedy = f"remove it from the configuration, or {key}=null: a checkpoint has its own architecture"
    if policy == FINE_TUNING:
        remedy += "; to change it, fine-tune with launch/finetune_retrieval.py first"
    part, _, name = key.rpartition(".")
    if name in _NOT_IN_OFFICIAL and Path(source).is_file():
        file = "vision_config.json" if part == "vision_encoder" else "bert_config.json"
        remedy = f"if it was trained so, set {_NOT_IN_OFFICIAL[name]} in a {file} beside it"
    return f"{key} is {value!r} here and {stored!r} in the checkpoint {source}: {remedy}"


def _is_same(key: str, value: Any, stored: ModelConfig) -> bool:
    """Whether a setting describes the same model although its value differs from the checkpoint's."""
    vision = stored.vision_encoder
    if key == "vision_encoder.layer_scale":  # an initial value; 0: there is none
        return vision.type != "beit" or bool(value) == bool(vision.layer_scale)
    if key == "vision_encoder.mlp_ratio":
        return int(vision.width * value) == int(vision.width * vision.mlp_ratio)
    return declarations(ModelConfig)[key].checkpoint == START or (key == _DEPTH and not stored.answer_decoder.enable)


def _is_unused(key: str, stored: ModelConfig) -> bool:
    """Whether a setting is about a part that the checkpoint's model does not have."""
    temporal = key.startswith("temporal_vision_encoder.") and key != "temporal_vision_encoder.enable"
    return temporal and not stored.temporal_vision_encoder.enable


def adopt(settings: Settings, config: ModelConfig) -> None:
    """Write the architecture back into the settings, so that the resolved ones describe the model that is run."""
    run = settings.config
    for item in fields(ModelSettings):
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
    if config.loss_weight.mlm > 0 and not config.answer_decoder.enable and tokenizer.mask_id == NO_MASK:
        raise UserError(
            f"loss_weight.mlm is {config.loss_weight.mlm:g}, but tokenizer={run.tokenizer} has no [MASK]: set "
            "loss_weight.mlm=0, or take another vocabulary"
        )
    if run.task == "qa" and tokenizer.pad_id == tokenizer.sep_id:
        raise UserError(
            f"tokenizer={run.tokenizer} pads with the token that ends a text, which an answer decoder must tell apart: "
            "start from another text encoder for question answering"
        )
    for medium in ("image", "video"):
        length = getattr(run.max_txt_l, medium)
        if not 2 <= length <= text.max_positions:
            raise UserError(
                f"max_txt_l.{medium} is {length}: must be from 2 to text_encoder.max_positions, {text.max_positions}"
            )
