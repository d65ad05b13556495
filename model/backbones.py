"""Backbones of timm by name: their sizes, their pixels, how they are made."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from model.config import ModelConfig, VisionConfig
from model.torchvision_cpu import create_model, get_pretrained_cfg, is_model
from model.vision_encoder import VISION
from runtime.errors import UserError

VISION_TYPES = ("beit", "vit", "deit")
_HALF = (0.5, 0.5, 0.5)
PIXEL_STATISTICS = {  # mean and standard deviation of the pixels in [0, 1] that the published weights expect
    "beit": (_HALF, _HALF),
    "vit": (_HALF, _HALF),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def pixel_statistics(kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels in [0, 1] that a `vision_encoder.type` expects."""
    if kind in PIXEL_STATISTICS:
        return PIXEL_STATISTICS[kind]
    published = get_pretrained_cfg(kind)
    return (published.mean, published.std) if published else (_HALF, _HALF)


@dataclass(frozen=True)
class Backbone:
    """What timm says of a backbone by its name."""

    width: int  # channels of its last feature map, or width of its tokens
    image_res: int  # height and width in pixels of the images that its weights were trained with
    depth: int | None  # layers of a vision transformer
    patch_size: int | None  # of a backbone that splits images into patches

    @property
    def is_transformer(self) -> bool:
        """Whether it is a vision transformer of one width, of which `TimmEncoder` is made."""
        return self.depth is not None


@cache
def describe_backbone(name: str) -> Backbone:
    """Sizes of timm's model `name`, found without allocating it."""
    published = get_pretrained_cfg(name)
    size = published.input_size[1] if published else 224
    with torch.device("meta"):
        backbone: Any = create_model(name, pretrained=False, num_classes=0).eval()
        features = backbone.forward_features(torch.zeros(1, 3, size, size))
    if not isinstance(features, torch.Tensor):
        raise UserError(f"vision_encoder.type={name} makes several feature maps, not one: choose another backbone")
    depth = len(backbone.blocks) if hasattr(backbone, "num_prefix_tokens") and hasattr(backbone, "blocks") else None
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple) else patch
    return Backbone(as_tokens(backbone, features).shape[2], size, depth, patch)


def adopt_backbone(config: ModelConfig, explicit: Collection[str]) -> None:
    """Set what `vision_encoder.type` decides if it is a name of timm, in place: sizes, image_res, pixel statistics.

    explicit: dotted settings that the user has set, which stay.
    """
    vision = config.vision_encoder
    if vision.type in VISION or not is_model(vision.type):
        return
    known = describe_backbone(vision.type)
    for name in ("width", "depth", "patch_size"):
        value = getattr(known, name)
        if value is not None and f"vision_encoder.{name}" not in explicit:
            setattr(vision, name, value)
    if "image_res" not in explicit:
        config.image_res = known.image_res
    adopt_pixels(vision, vision.pretrained or vision.type)
    adopt_pixels(vision, vision.type)


def adopt_pixels(config: VisionConfig, name: str) -> None:
    """Set the pixel statistics of timm's model `name`, in place, unless they are set; of others nothing."""
    if config.type not in VISION and is_model(name):
        mean, std = pixel_statistics(name)
        config.mean, config.std = config.mean or list(mean), config.std or list(std)


def check_backbone(config: VisionConfig) -> Backbone:
    """What timm says of `config.type`; raises UserError for other sizes in `config`."""
    known = describe_backbone(config.type)
    sizes = {"width": known.width, "depth": known.depth or config.depth}
    if any(getattr(config, name) != value for name, value in sizes.items()):
        actual = " ".join(f"vision_encoder.{name}={value}" for name, value in sizes.items())
        raise UserError(f"the sizes of vision_encoder.type={config.type} differ: set {actual}")
    return known


def create_backbone(config: VisionConfig, image_res: int) -> Any:
    """timm's model `config.type` for images of this height and width in pixels, with random weights.

    Raises UserError where timm cannot make one.
    """
    for options in _size_options(config.type, image_res, config.patch_size):
        rates: tuple[dict[str, Any], ...] = ({"drop_path_rate": config.drop_path}, {})
        for rate in rates:
            with suppress(TypeError):
                return create_model(config.type, pretrained=False, num_classes=0, **options, **rate)
    raise UserError(f"vision_encoder.type={config.type} cannot be made by timm: choose another one")


def published_tensors(
    name: str, weights: dict[str, torch.Tensor], image_res: int | None = None, patch_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Weights of timm's model `name` by the names that this timm has for them, fitted to these sizes where it has any.

    What the weights lack is absent. Raises UserError when they are of another model.
    """
    for options in _size_options(name, image_res, patch_size):
        with suppress(TypeError):
            return _loaded(name, weights, options)
    raise UserError(f"timm cannot make {name}: choose another one")


def _size_options(name: str, image_res: int | None, patch_size: int | None) -> list[dict[str, Any]]:
    """Arguments of timm's model `name` for these sizes, one after the other to try: not all models have all of them.

    The patch size only of a backbone that tells it: of others, such as Twins, it is that of their first stage.
    """
    size = {} if image_res is None else {"img_size": image_res}
    patch = {"patch_size": patch_size} if patch_size and describe_backbone(name).patch_size else {}
    return [size | patch, size, {}]


def _loaded(name: str, weights: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """timm does not tell which tensors it has loaded: those that differ when the weights do."""
    states = []
    for change in (0, 1):
        changed = {key: each + change if each.is_floating_point() else each for key, each in weights.items()}
        overlay = {"state_dict": changed}
        common: dict[str, Any] = {"pretrained": True, "num_classes": 0, "pretrained_cfg_overlay": overlay}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                states.append(create_model(name, **common, **options).state_dict())
            except (RuntimeError, KeyError) as error:  # of another shape, of a name that timm expects
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"the weights are not those of timm's {name} ({reason}): take others") from None
    loaded, other = states
    return {key: each for key, each in loaded.items() if not each.is_floating_point() or (each != other[key]).any()}


def as_tokens(backbone: Any, features: torch.Tensor) -> torch.Tensor:
    """The output of `forward_features` as tokens (N, L, D): row after row of a map."""
    if features.ndim != 4:
        return features
    return features.flatten(1, 2) if getattr(backbone, "output_fmt", "") == "NHWC" else features.flatten(2).mT
