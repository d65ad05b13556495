"""The sizes and switches that define a Singularity model; stored with every checkpoint."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from runtime.errors import UserError

ENSEMBLES = ("concat", "mean", "max", "lse")  # of frames: fused early, or their scores combined


@dataclass
class VisionConfig:
    """The vision transformer. Defaults: BEiT-B/16 as published."""

    type: str = "beit"  # beit | vit | deit, or the name of another vision transformer of timm's
    pretrained: str | None = None  # hub name or local folder of initial weights
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    layer_scale: float = 0.1  # BEiT only
    drop_path: float = 0.1  # of the last block; grows linearly from 0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02  # of the blocks' matrices; see TextConfig


@dataclass
class TextConfig:
    """BERT, cut in two: layers below `fusion_layer` see text only, those above also see the visual."""

    pretrained: str | None = None  # hub name or local folder of initial weights
    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    fusion_layer: int = 9
    heads: int = 12
    intermediate: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    # Standard deviation of the matrices' random initial weights; BERT's is made for a width of 768. Narrower models
    # from scratch want 1 / sqrt(width): else a layer hardly changes what passes it by, and they learn late.
    initializer_range: float = 0.02


@dataclass
class TemporalConfig:
    """Optional self-attention over the frames at each spatial position."""

    enable: bool = False
    num_layers: int = 2
    update_pooler_embed: bool = False


@dataclass
class AnswerDecoderConfig:
    """Question answering only: a causal language model over the states of question and visual."""

    enable: bool = False
    num_layers: int = 3


@dataclass
class LossWeights:
    """Weights of the objectives; 0 switches one off."""

    itc: float = 1.0
    itm: float = 1.0
    mlm: float = 1.0


@dataclass
class ModelConfig:
    """A whole model. `num_frames` is the length of the learned temporal embedding."""

    vision_encoder: VisionConfig = field(default_factory=VisionConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    temporal_vision_encoder: TemporalConfig = field(default_factory=TemporalConfig)
    answer_decoder: AnswerDecoderConfig = field(default_factory=AnswerDecoderConfig)
    add_temporal_embed: bool = False
    image_res: int = 224
    num_frames: int = 1
    embed_dim: int = 256
    temp: float = 0.07
    itm_hard_neg: bool = True
    gather_negatives: bool = False  # of all processes; the published models took those of their own only
    mlm_prob: float = 0.5
    loss_weight: LossWeights = field(default_factory=LossWeights)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Nested plain values, for JSON."""
    return asdict(config)


def config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """The inverse of `config_to_dict`; absent keys take their defaults. Raises ValueError for unknown keys."""
    config = ModelConfig()
    for key, value in dotted(data).items():
        _set(config, key, value)
    return config


def with_changes(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """A copy with dotted keys changed, for example {"num_frames": 4, "temporal_vision_encoder.enable": True}.

    Raises ValueError, naming the nearest keys, when a key does not exist.
    """
    result = deepcopy(config)
    for key, value in changes.items():
        _set(result, key, value)
    return result


def dotted(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"text_encoder": {"width": 768}} as {"text_encoder.width": 768}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _set(config: ModelConfig, key: str, value: Any) -> None:
    known = dotted(asdict(config))
    if key not in known:
        near = get_close_matches(key, known, n=3) or sorted(known)
        raise UserError(f"the model has no setting {key!r}: nearest are {', '.join(near)}")
    *folders, name = key.split(".")
    owner: Any = config
    for folder in folders:
        owner = getattr(owner, folder)
    setattr(owner, name, value)
