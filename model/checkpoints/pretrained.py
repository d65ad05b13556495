"""Initial weights: vision and text encoders from published checkpoints, by local folder, Hugging Face or timm name."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import torch

from model.backbones import VISION_TYPES, published_tensors
from model.building import build_model
from model.checkpoints.efficientnet_lite import is_efficientnet_lite, to_timm
from model.checkpoints.files import read_tensors
from model.checkpoints.official_names import vision_parts
from model.config import ModelConfig
from model.feature_maps import FeatureMapEncoder
from model.patch_filters import FILE, PatchFilterEncoder
from model.singularity import Singularity
from model.text import BertEncoder
from model.torchvision_cpu import get_pretrained_cfg, is_model
from model.towers import TransformersText, VisionTower
from model.vision import TimmEncoder
from model.vqa import SingularityQA
from runtime.activity import keep_alive
from runtime.errors import MissingError, UserError
from runtime.packages import PREFIX, find_in_package

logger = logging.getLogger(__name__)

_WEIGHTS = ["model.safetensors", "pytorch_model.bin", "*.pth"]
_FILES = ["config.json", "preprocessor_config.json", *_WEIGHTS[:2]]
_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_LAYER = "encoder.layer."
_VISION = "vision_encoder.transformer."


def new_model(config: ModelConfig, special_ids: dict[str, int] | None = None) -> Singularity | SingularityQA:
    """A model with the weights that `vision_encoder.pretrained` and `text_encoder.pretrained` name, random elsewhere.

    A name is a local folder (config.json with model.safetensors or pytorch_model.bin), a Hugging Face hub name, or,
    for the vision encoder, a timm name. An encoder of the user's own names its tensors in `from_published`.
    Raises UserError when a name cannot be found or its weights do not fit.
    """
    model = build_model(config, special_ids)
    sources = {
        "vision_encoder.pretrained": (config.vision_encoder.pretrained, _vision_weights),
        "text_encoder.pretrained": (config.text_encoder.pretrained, _text_weights),
    }
    encoder = model.vision_encoder
    if isinstance(encoder, FeatureMapEncoder) and encoder.needs_weights and not config.vision_encoder.pretrained:
        raise UserError(
            f"vision_encoder.type={config.vision_encoder.type} has BatchNorm, which keeps the statistics of published "
            "weights: set vision_encoder.pretrained, or take a backbone without it, such as convnext_pico"
        )
    if (
        isinstance(encoder, PatchFilterEncoder)
        and not Path(config.vision_encoder.pretrained or "").joinpath(FILE).is_file()
    ):
        raise MissingError(
            f"vision_encoder.pretrained is {config.vision_encoder.pretrained}, where patch_filters finds no {FILE}: "
            "`python -m train.filters CONFIG.yaml` makes it there, of the photos of train_corpus"
        )
    for key, (name, convert) in sources.items():
        if name:
            _fill(model, convert(name, key, model), f"{key}={name}", key.split(".")[0])
    if config.dual_encoder:
        _fill_heads(model, read_folder(find_folder(config.dual_encoder, "dual_encoder"), "dual_encoder"))
    return model


def _fill_heads(model: Singularity | SingularityQA, state: dict[str, torch.Tensor]) -> None:
    """Copy projections and temperature of a CLIP or SigLIP; the latter's bias of the similarities has no place here.

    CLIP's projections have no bias. SigLIP compares its pooled vectors of images as they are.
    """
    if not isinstance(model, Singularity):
        return
    width = model.config.embed_dim
    clip = "visual_projection.weight" in state
    text = "text_projection" if clip else "text_model.head"
    heads = {
        "vision_proj.weight": state["visual_projection.weight"] if clip else torch.eye(width),
        "vision_proj.bias": torch.zeros(width),
        "text_proj.weight": state[f"{text}.weight"],
        "text_proj.bias": state.get(f"{text}.bias", torch.zeros(width)),
        "temp": (-state["logit_scale"]).exp().view(1, 1),
    }
    model.load_state_dict(heads, strict=False)
    logger.info("dual_encoder: projections and the temperature %.4f loaded", heads["temp"].item())


def _fill(model: Singularity | SingularityQA, state: dict[str, torch.Tensor], source: str, part: str) -> None:
    """Copy `state` into `model`; it must have every tensor of `part` but those of `_fresh`, in the right shape."""
    target, fresh = model.state_dict(), _fresh(model)
    used = {name: tensor for name, tensor in state.items() if name in target}
    for name, tensor in used.items():
        if name.startswith("vision_encoder.") and tensor.shape != target[name].shape:
            used[name] = model.vision_encoder.resized(name.removeprefix("vision_encoder."), tensor, target[name].shape)
    missing = [name for name in target if name.startswith(f"{part}.") and name not in used]
    missing = [name for name in missing if not any(each in name for each in fresh)]
    other = [
        f"{name} {tuple(tensor.shape)} for {tuple(target[name].shape)}"
        for name, tensor in used.items()
        if tensor.shape != target[name].shape
    ]
    if missing or other:
        listed = "; ".join(", ".join(names[:10]) for names in (missing, other) if names)
        raise UserError(f"{source} does not fit the sizes under {part} (missing or with another shape: {listed})")
    model.load_state_dict(used, strict=False)
    logger.info("%s: %d tensors loaded", source, len(used))


def _fresh(model: Singularity | SingularityQA) -> tuple[str, ...]:
    """Parts of the names of those of our tensors that no published encoder has: cross-attention, our extra norm."""
    vision = ("vision_encoder.layernorm.",) if isinstance(model.vision_encoder, TimmEncoder) else ()
    return (*vision, "crossattention." if isinstance(model.text_encoder, BertEncoder) else "text_encoder.layer.")


def find_folder(name: str, key: str) -> Path:
    """The local folder of a checkpoint: `name`, that in a package, or fetched from the hub by its or timm's name.

    Raises UserError, with the remedy, when there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(PREFIX):
        return find_in_package(name, _WEIGHTS, key).parent
    if "/" not in name and is_model(name):
        published = get_pretrained_cfg(name)
        if not published or not published.hf_hub_id:
            raise UserError(f"{key}: timm has no weights of {name} on the hub; take a model with weights, or null")
        name = published.hf_hub_id
    remedy = f"set {key} to a local folder with config.json and model.safetensors or pytorch_model.bin, or to null"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}: the folder {name} does not exist; {remedy}")
    from huggingface_hub import snapshot_download  # slow to import, needed for hub names only

    try:
        with keep_alive(f"fetching {name}"):  # a download of gigabytes over a slow line is not a hang
            return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # of many kinds: no network, no such name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{key}: {name} is not a local folder and could not be fetched from the Hugging Face hub "
            f"({reason[:150]}); {remedy}"
        ) from None


def read_folder(folder: Path, key: str) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint folder. Raises ValueError when it has none or they cannot be read."""
    path = _weights_file(folder, key)
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{key}: {path} cannot be read ({str(error).splitlines()[0]}); copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise UserError(f"{key}: {path} holds more than tensors by name: save its state dict alone")
    return state


def _without_prefix(state: dict[str, torch.Tensor], prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    for prefix in prefixes:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _vision_weights(name: str, key: str, model: Singularity | SingularityQA) -> dict[str, torch.Tensor]:
    """Our vision tensors from a Hugging Face (BEiT, ViT) or timm checkpoint."""
    config, folder, encoder = model.config, find_folder(name, key), model.vision_encoder
    if isinstance(encoder, VisionTower):
        return {f"vision_encoder.{ours}": tensor for ours, tensor in encoder.published(folder).items()}
    if isinstance(encoder, FeatureMapEncoder | TimmEncoder) and config.vision_encoder.type not in VISION_TYPES:
        prefix = "vision_encoder.features.backbone." if isinstance(encoder, FeatureMapEncoder) else _VISION
        state = read_folder(folder, key)
        if is_efficientnet_lite(state):
            names = [each.removeprefix(prefix) for each in model.state_dict() if each.startswith(prefix)]
            state = to_timm(state, names)
        vision = config.vision_encoder
        state = published_tensors(vision.type, state, config.image_res, vision.patch_size)
        return {prefix + ours: tensor for ours, tensor in state.items()}
    if not isinstance(encoder, TimmEncoder):
        own = encoder.from_published(read_folder(folder, key))
        return {f"vision_encoder.{ours}": tensor for ours, tensor in own.items()}
    wanted = [each.removeprefix(_VISION) for each in model.state_dict() if each.startswith(_VISION)]
    if not Path(name).is_dir() and "/" not in name and is_model(name):
        found = published_tensors(name, read_folder(folder, key))
    else:
        state = _without_prefix(read_folder(folder, key), ("beit.", "vit.", "deit."))
        parts = {ours: vision_parts(ours) for ours in wanted}
        found = {
            ours: torch.cat([state[part] for part in theirs]) if len(theirs) > 1 else state[theirs[0]]
            for ours, theirs in parts.items()
            if all(part in state for part in theirs)
        }
    return {_VISION + ours: tensor for ours, tensor in found.items()}


def _weights_file(folder: Path, key: str) -> Path:
    for pattern in _WEIGHTS:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise UserError(f"{key}: {folder} has none of {', '.join(_WEIGHTS)}; choose another folder")


def _text_weights(name: str, key: str, model: Singularity | SingularityQA) -> dict[str, torch.Tensor]:
    """Our text tensors from a BERT checkpoint; the answer decoder takes its first layers and its MLM head.

    Layers above the published ones start from the last published ones.
    """
    folder = find_folder(name, key)
    if isinstance(model.text_encoder, TransformersText):
        return {f"text_encoder.{ours}": tensor for ours, tensor in model.text_encoder.published(folder).items()}
    if not isinstance(model.text_encoder, BertEncoder):
        own = model.text_encoder.from_published(read_folder(folder, key))
        return {f"text_encoder.{ours}": tensor for ours, tensor in own.items()}
    path = folder / "config.json"
    kind = json.loads(path.read_text()).get("model_type") if path.is_file() else "bert"
    if kind != "bert":
        raise UserError(f"{key}: {folder} holds a {kind} model, only BERT fits; take for example bert-base-uncased")
    state = _without_prefix(read_folder(folder, key), ("bert.",))
    for old, new in _OLD_NORMS.items():
        state = {each.replace(old, new): tensor for each, tensor in state.items()}
    _add_layers(state, model.config.text_encoder.layers)
    result = {}
    for each, tensor in state.items():
        for theirs, ours in (("embeddings.", "embeddings."), (_LAYER, "layer.")):
            if each.startswith(theirs):
                result[f"text_encoder.{ours}{each.removeprefix(theirs)}"] = tensor
                result[f"answer_decoder.{ours}{each.removeprefix(theirs)}"] = tensor
        head = each.removeprefix("cls.predictions.")
        if head != each:
            result[f"word_head.{head}"] = result[f"answer_decoder.word_head.{head}"] = tensor
    return result


def _add_layers(state: dict[str, torch.Tensor], layers: int) -> None:
    """Copy the last of a BERT's layers in `state` to those that it lacks of `layers`."""
    published = 1 + max((int(name.split(".")[2]) for name in state if name.startswith(_LAYER)), default=-1)
    added = layers - published
    if added <= 0 or not published:
        return
    for number in range(published, layers):
        source, target = f"{_LAYER}{max(0, number - added)}.", f"{_LAYER}{number}."
        for name in [name for name in state if name.startswith(source)]:
            state[target + name.removeprefix(source)] = state[name]
    logger.info("text_encoder: layers above the published ones, %d of %d, start from the last of those", added, layers)
