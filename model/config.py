"""The sizes and switches that define a Singularity model; stored with every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class VisionConfig:
    """The vision transformer. Defaults: BEiT-B/16 as published."""

    type: str = "beit"  # beit | vit | deit
    pretrained: str | None = None  # hub name or local folder of initial weights
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    layer_scale: float = 0.1  # BEiT only
    drop_path: float = 0.1  # of the last block; grows linearly from 0


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


@dataclass
class TemporalConfig:
    """Optional self-attention over the frames at each spatial position."""

    enable: bool = False
    num_layers: int = 2
    update_pooler_embed: bool = False


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
    add_temporal_embed: bool = False
    image_res: int = 224
    num_frames: int = 1
    embed_dim: int = 256
    temp: float = 0.07
    itm_hard_neg: bool = True
    mlm_prob: float = 0.5
    loss_weight: LossWeights = field(default_factory=LossWeights)
