"""Vision backbones: frames to tokens and pooled vectors. Builds the chosen one; the transformers of timm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from model.backbones import VISION_TYPES, check_backbone, create_backbone, describe_backbone, pixel_statistics
from model.checkpoints.positions import resize_relative
from model.config import ModelConfig, VisionConfig
from model.feature_maps import FeatureMapEncoder
from model.patch_dropout import add_patch_dropout, no_patch_dropout
from model.probe import run_counted
from model.torchvision_cpu import (
    Beit,
    BeitAttention,
    VisionTransformer,
    gen_relative_position_index,
    is_model,
    resample_abs_pos_embed,
)
from model.vision_encoder import VISION, VisionEncoder
from runtime.errors import UserError
from runtime.plugins import build_with_options

TIMM_RANGE = 0.02
ROW = 8  # rows of an attention mask are padded to a multiple of 8 elements


def build_vision(config: ModelConfig) -> VisionEncoder:
    """The backbone that `config.vision_encoder` chooses, with random weights.

    Raises UserError when there is none, or when its options, sizes or outputs do not fit.
    """
    vision = config.vision_encoder
    kind: Callable[..., VisionEncoder] = FeatureMapEncoder
    if vision.type in VISION or not is_model(vision.type):
        kind = VISION[vision.type]
    elif check_backbone(vision).is_transformer:
        kind = TimmEncoder
    with _refused_size(config) if kind is FeatureMapEncoder else nullcontext():
        encoder = build_with_options(kind, "vision_encoder.options", vision.options, config)
        if not isinstance(encoder, VisionEncoder):
            raise UserError(
                f"vision_encoder.type={vision.type} is a {type(encoder).__name__}: derive it from VisionEncoder"
            )
        _set_pixels(encoder, vision)
        if kind is not TimmEncoder:
            if vision.patch_dropout:
                raise no_patch_dropout(vision.type, vision.patch_dropout)
            _check_outputs(encoder, config)
    return encoder


def _set_pixels(encoder: VisionEncoder, config: VisionConfig) -> None:
    """Set the pixel statistics that the configuration has; raises UserError for impossible ones."""
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is None:
            continue
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise UserError(
                f"vision_encoder.{name} is {values}: must be three numbers, of red, green and blue"
                + (", above 0" if name == "std" else "")
            )
        setattr(encoder, name, tuple(values))


@contextmanager
def _refused_size(config: ModelConfig) -> Iterator[None]:
    """Raise UserError where a backbone of timm does not take images of this size, which it says by an assertion."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        name, reason = config.vision_encoder.type, " ".join(str(error).split())[:150]
        raise UserError(
            f"image_res is {config.image_res}, which vision_encoder.type={name} does not take ({reason}): take "
            f"{describe_backbone(name).image_res}, with which it was trained, or another"
        ) from None


def _check_outputs(encoder: VisionEncoder, config: ModelConfig) -> None:
    """Measure an own backbone; raise UserError unless its outputs have the shapes that the model expects."""
    width, size = config.vision_encoder.width, config.image_res
    output, flops = run_counted(encoder, torch.zeros(2, 3, size, size))
    pair = isinstance(output, tuple | list) and len(output) == 2
    if not pair or not all(isinstance(each, torch.Tensor) for each in output):
        raise UserError(
            f"vision_encoder.type={config.vision_encoder.type} returns a {type(output).__name__}: its "
            "forward must return two tensors, tokens and pooled vectors"
        )
    tokens, pooled = output
    if tokens.ndim != 3 or tokens.shape[::2] != (2, width) or pooled.shape != (2, width):
        raise UserError(
            f"vision_encoder.type={config.vision_encoder.type} makes tokens {tuple(tokens.shape)} and pooled vectors "
            f"{tuple(pooled.shape)} of 2 images; they must be (2, tokens, {width}) and (2, {width}), as wide as "
            "vision_encoder.width"
        )
    encoder.measured = flops // 2, tokens.shape[1]


def check_sizes(config: VisionConfig, image_res: int) -> None:
    """Raise UserError when the sizes of a vision transformer do not fit together."""
    if image_res % config.patch_size:
        raise UserError(
            f"image_res is {image_res}, not a multiple of vision_encoder.patch_size {config.patch_size}: "
            f"take {image_res // config.patch_size * config.patch_size or config.patch_size}"
        )
    if config.type in VISION_TYPES and config.width % config.heads:
        raise UserError(
            f"vision_encoder.width {config.width} is not a multiple of vision_encoder.heads {config.heads}: change one"
        )


def build_transformer(config: VisionConfig, image_res: int, pooler: bool = True) -> nn.Module:
    """timm's transformer of these sizes, with random weights.

    BEiT leaves its tokens un-normed and, with `pooler`, norms the mean of the patch tokens. Raises UserError when the
    sizes do not fit together.
    """
    check_sizes(config, image_res)
    common: dict[str, Any] = {
        "img_size": image_res,
        "patch_size": config.patch_size,
        "num_classes": 0,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "norm_layer": partial(nn.LayerNorm, eps=config.layer_norm_eps),
        "drop_path_rate": config.drop_path,
    }
    vision: Any
    if config.type not in VISION_TYPES:
        vision = create_backbone(config, image_res)
    elif config.type != "beit":
        vision = VisionTransformer(global_pool="token", **common)
    else:
        beit: dict[str, Any] = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
        vision = Beit(global_pool="avg", init_values=config.layer_scale, **beit, **common)
        if not pooler:
            vision.fc_norm = nn.Identity()
    for module in vision.blocks.modules():
        if isinstance(module, nn.Linear):  # from timm's standard deviation
            module.weight.data *= config.initializer_range / TIMM_RANGE
    return vision


def relative_position_index(patches: int) -> torch.Tensor:
    """Rows (L, L) of BEiT's relative position table for [CLS] and the tokens of `patches` x `patches` patches."""
    return gen_relative_position_index((patches, patches))


class GivenBiasAttention(BeitAttention):
    """BEiT's attention, with an optional position bias (1, H, L, L) instead of the one gathered from its table.

    kept: (K,) positions of the tokens among those of the table, where others are left out.
    """

    bias: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def _get_rel_pos_bias(self) -> torch.Tensor:
        if self.bias is not None:
            return self.bias
        bias = super()._get_rel_pos_bias()
        return bias if self.kept is None else bias.index_select(2, self.kept).index_select(3, self.kept)


@VISION("beit")
@VISION("vit")
@VISION("deit")
class TimmEncoder(VisionEncoder):
    """A vision transformer of timm."""

    transformer: Any
    weights_in_layers: bool = False  # whether weights exist only while their layer computes, as under ZeRO 3
    _bias_index: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision_encoder
        self.mean, self.std = pixel_statistics(vision.type)
        self.transformer = build_transformer(vision, config.image_res, pooler=not config.answer_decoder.enable)
        # The official code's extra norm has this eps, independent of the transformer's own.
        self.layernorm = nn.LayerNorm(vision.width, eps=1e-12) if vision.type == "beit" else nn.Identity()
        self._official = vision.type in VISION_TYPES
        self._dropout = add_patch_dropout(self.transformer, vision.type, vision.patch_dropout)
        self._patches = config.image_res // vision.patch_size
        self._leads = self._official or self.transformer.num_prefix_tokens > 0
        self._attentions: list[Any] = [module for module in self.transformer.modules() if hasattr(module, "fused_attn")]
        self._biased: list[Any] = []  # of GivenBiasAttention
        for attention in self._attentions:
            if type(attention) is BeitAttention and attention.relative_position_bias_table is not None:
                attention.__class__ = GivenBiasAttention  # timm's blocks take no attention class
                self._biased.append(attention)
        if self._biased:  # (L, R): attention kernels of a GPU need masks whose rows begin at multiples of 16 bytes
            index = self._biased[0].relative_position_index
            self.register_buffer("_bias_index", functional.pad(index, (0, -len(index) % ROW)), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VisionEncoder`; the first token is [CLS], or the pooled vector where the transformer has none."""
        self._match_key_biases()
        self._choose_attention(images)
        kept = None
        if self._dropout is not None and self.training:
            kept = self._dropout.draw(self._patches**2, images.device)
        for attention in self._biased:
            attention.kept = kept
        for attention, bias in zip(self._biased, self._position_biases(kept)):
            attention.bias = bias
        raw = self.transformer.forward_features(images)
        for attention in self._biased:
            attention.bias = None
        if self._dropout is not None:
            self._dropout.kept = None
        pooled = self.transformer.forward_head(raw, pre_logits=True)
        tokens = self.layernorm(raw)
        return tokens if self._leads else torch.cat([pooled[:, None], tokens], 1), pooled

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """As `VisionEncoder`."""
        self.transformer.set_grad_checkpointing(enable)

    def resized(self, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """As `VisionEncoder`, for the position tables."""
        if name.endswith("relative_position_bias_table") and tensor.shape[1] == shape[1]:
            return resize_relative(tensor, self._patches)
        if name == "transformer.pos_embed" and tensor.shape[2] == shape[2]:
            return self.resize_positions(tensor, self._patches)
        return tensor

    def resize_positions(self, table: torch.Tensor, patches: int) -> torch.Tensor:
        """Position embeddings (1, L, D) of another image size for `patches` x `patches` patches.

        The official code resizes without antialiasing, timm with it.
        """
        bare = getattr(self.transformer, "no_embed_class", False)
        prefix = 0 if bare else self.transformer.num_prefix_tokens
        size = [patches, patches]
        return resample_abs_pos_embed(table, size, num_prefix_tokens=prefix, antialias=not self._official)

    def _match_key_biases(self) -> None:
        """Convert the constant zero key biases to the weights' dtype: DeepSpeed converts parameters, not buffers."""
        for attention in self._attentions:
            if getattr(attention, "k_bias", None) is not None and attention.k_bias.dtype != attention.q_bias.dtype:
                attention.k_bias = attention.k_bias.to(attention.q_bias.dtype)

    def _position_biases(self, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The position bias (1, H, L, L) of every layer, by one gather, with one sorted sum in the backward pass.

        kept: (L,) positions of the tokens, where patches are left out.
        Empty where each layer must gather its own: with gradient checkpointing and under ZeRO 3.
        """
        tables: list[torch.Tensor] = [attention.relative_position_bias_table for attention in self._biased]
        if not tables or self.transformer.grad_checkpointing or self.weights_in_layers:
            return ()
        index = self._bias_index
        if kept is not None:
            index = functional.pad(index.index_select(0, kept).index_select(1, kept), (0, -len(kept) % ROW))
        length, row = index.shape
        rows = functional.embedding(index.flatten(), torch.cat(tables, 1))  # (L·R, layers·H)
        biases = rows.T.contiguous().view(len(tables), 1, -1, length, row)
        return biases[..., :length].unbind(0)

    def _choose_attention(self, images: torch.Tensor) -> None:
        """Fused attention, except for training on a CPU with BEiT's bias or in half precision.

        PyTorch's CPU kernel has no gradient of a mask, and its fallback is slower than plain operators, 2x in bfloat16
        (benchmarks/model.py).
        """
        biased = not isinstance(self.layernorm, nn.Identity)
        plain = images.device.type == "cpu" and torch.is_grad_enabled() and (biased or images.dtype != torch.float32)
        for attention in self._attentions:
            attention.fused_attn = not plain
