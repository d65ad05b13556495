"""The settings that define a Singularity model; stored with every checkpoint."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

from runtime.errors import UserError
from runtime.settings import (
    ANY,
    FINE_TUNING,
    START,
    TRAINING,
    declarations,
    fixed,
    flatten,
    free,
    listed_nearest,
    nearest,
)

# How frames are combined: `concat` in the fusion layers, the others by their scores.
ENSEMBLES = ("concat", "mean", "max", "lse")
_INITIALIZER_RANGE = "standard deviation of random initial matrices; narrower models learn sooner with 1 / sqrt(width)"


@dataclass
class VisionConfig:
    """The vision backbone. Defaults: BEiT-B/16 as published."""

    type: str = fixed(
        "beit", "beit, vit, deit, patch_filters, the name of another backbone of timm, or one of your own"
    )
    options: dict[str, Any] = fixed(dict, "settings of a backbone of your own: arguments of its class")
    pretrained: str | None = fixed(None, "initial weights: a hub name or a local folder", checkpoint=START)
    mean: list[float] | None = fixed(None, "mean of the pixels in [0, 1]; by default that of the published weights")
    std: list[float] | None = fixed(None, "their standard deviation; by default that of the published weights")
    patch_size: int = fixed(16, "height and width of a patch in pixels; by default the backbone's of timm")
    width: int = fixed(768, "width of the tokens; by default the backbone's of timm")
    depth: int = fixed(12, "layers; by default the backbone's of timm")
    heads: int = fixed(12, "attention heads per layer")
    mlp_ratio: float = fixed(4.0, "hidden width of the MLP, as a multiple of width")
    layer_scale: float = fixed(0.1, "initial value of the layer scale, BEiT only; 0: none")
    drop_path: float = fixed(0.1, "stochastic depth of the last block; grows linearly from 0", checkpoint=TRAINING)
    patch_dropout: float = fixed(0.0, "share of the patches that training leaves out, below 1", checkpoint=TRAINING)
    layer_norm_eps: float = fixed(1e-12, "epsilon of the layer norms")
    initializer_range: float = fixed(0.02, _INITIALIZER_RANGE, checkpoint=TRAINING)


@dataclass
class TextConfig:
    """BERT, split in two: layers below `fusion_layer` see text only, those above also see the visual."""

    type: str = fixed(
        "bert", "bert, transformers, clip, siglip (by pretrained), or one of your own; below the same fusion layers"
    )
    options: dict[str, Any] = fixed(dict, "settings of a text encoder of your own: arguments of its class")
    pretrained: str | None = fixed(None, "initial weights: a hub name or a local folder", checkpoint=START)
    vocab_size: int = fixed(30522, "size of the vocabulary; by default the tokenizer's")
    width: int = fixed(768, "width of the states")
    layers: int = fixed(12, "layers, of both kinds")
    fusion_layer: int = fixed(9, "index of the first layer with cross-attention to the visual")
    heads: int = fixed(12, "attention heads per layer")
    intermediate: int = fixed(3072, "hidden width of the feed-forward layers")
    max_positions: int = fixed(512, "position embeddings: the longest text in tokens")
    dropout: float = fixed(0.1, "dropout of states and attention", checkpoint=TRAINING)
    pooling: str = fixed("first", "a text's vector for VTC: first token's state, or mean", choices=("first", "mean"))
    layer_norm_eps: float = fixed(1e-12, "epsilon of the layer norms")
    initializer_range: float = fixed(0.02, _INITIALIZER_RANGE, checkpoint=TRAINING)


@dataclass
class TemporalConfig:
    """Optional self-attention over the frames at each spatial position."""

    enable: bool = fixed(False, "add the temporal encoder", checkpoint=FINE_TUNING)
    num_layers: int = fixed(2, "layers of the temporal encoder", checkpoint=FINE_TUNING)
    update_pooler_embed: bool = fixed(
        False, "pooled vectors are the temporal encoder's first tokens", checkpoint=FINE_TUNING
    )


@dataclass
class AnswerDecoderConfig:
    """Question answering only: a causal language model over the states of question and visual."""

    enable: bool = fixed(False, "set by task=qa")
    num_layers: int = fixed(3, "layers of the answer decoder; by default as many as fusion layers")


@dataclass
class LossWeights:
    """Weights of the objectives; 0 disables one."""

    itc: float = fixed(1.0, "weight of VTC, the contrastive loss; 0: none", checkpoint=TRAINING)
    itm: float = fixed(1.0, "weight of VTM, the matching loss; 0: none", checkpoint=TRAINING)
    mlm: float = fixed(1.0, "weight of MLM, the masked language modelling loss; 0: none", checkpoint=TRAINING)


@dataclass
class ModelSettings:
    """The settings of a model in a run's YAML."""

    vision_encoder: VisionConfig = fixed(VisionConfig)
    text_encoder: TextConfig = fixed(TextConfig)
    dual_encoder: str | None = fixed(
        None,
        "start both encoders, the projections and the temperature from a CLIP or SigLIP: a hub name or a local folder",
        checkpoint=START,
    )
    temporal_vision_encoder: TemporalConfig = fixed(TemporalConfig)
    answer_decoder: AnswerDecoderConfig = fixed(AnswerDecoderConfig)
    add_temporal_embed: bool = fixed(False, "add learned temporal embeddings to the tokens", checkpoint=FINE_TUNING)
    image_res: int = fixed(224, "height and width of a frame in pixels", checkpoint=ANY, least=1)
    embed_dim: int = fixed(256, "width of the dual encoder's embeddings", least=1)
    temp: float = fixed(0.07, "initial temperature of the contrastive loss", checkpoint=START)
    itm_hard_neg: bool = fixed(True, "sample VTM's negatives by similarity; false: uniformly", checkpoint=TRAINING)
    gather_negatives: bool = fixed(
        False,
        "negatives from all ranks; costs memory and communication; not used in the published models",
        checkpoint=TRAINING,
    )
    mlm_prob: float = fixed(0.5, "share of the tokens that MLM masks", checkpoint=TRAINING)
    loss_weight: LossWeights = fixed(LossWeights)
    losses: dict[str, float] = fixed(
        dict, "losses of your own and their weights: docs/how-to/loss.md", checkpoint=TRAINING, replaced=True
    )
    plugins: list[str] = free(
        list, "modules of your own with losses, backbones, tasks ...: docs/extending.md", checkpoint=ANY
    )


@dataclass
class ModelConfig(ModelSettings):
    """ModelSettings plus the number of frames; stored as model.json."""

    num_frames: int = fixed(1, "length of the temporal embeddings: a run's video_input.num_frames")

    @property
    def own_losses(self) -> dict[str, float]:
        """The losses of a user that are computed, with their weights."""
        return {name: weight for name, weight in self.losses.items() if weight}

    @classmethod
    def of(cls, settings: ModelSettings, num_frames: int) -> ModelConfig:
        """The model that the settings of a run describe, a copy."""
        values = {item.name: deepcopy(getattr(settings, item.name)) for item in fields(ModelSettings)}
        return cls(**values, num_frames=num_frames)


def config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`; absent keys take their defaults. Raises UserError for unknown keys."""
    return with_changes(ModelConfig(), flatten(data, whole=declarations(ModelConfig)))


def with_changes(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """A copy with dotted keys changed, for example {"num_frames": 4, "temporal_vision_encoder.enable": True}.

    Raises UserError, with the nearest keys, if a key does not exist.
    """
    result, known = deepcopy(config), declarations(ModelConfig)
    for key, value in changes.items():
        if key not in known:
            near = nearest(key, known)
            listed = listed_nearest(near) if near else f"its settings are {', '.join(sorted(known))}"
            raise UserError(f"the model has no setting {key!r}: {listed}")
        owner: Any = result
        *sections, name = key.split(".")
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, name, value)
    return result
