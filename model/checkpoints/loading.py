"""Saves models, loads ours and official ones, and fits weights to another image size, clip length or task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.building import build_model
from model.checkpoints.files import Weights, read_weights, resolve_weights, write_weights
from model.checkpoints.official import read_official
from model.config import ModelConfig, with_changes
from model.history import History
from model.singularity import Singularity
from model.temporal import resize_embeddings
from model.text import TextEncoder
from model.vqa import SingularityQA
from preprocessing.config import Preprocessing
from runtime.errors import UserError

logger = logging.getLogger(__name__)

# Tensors, beside the temperature, that only models without an answer decoder have.
_WITHOUT_ANSWERS = ("vision_proj.", "text_proj.", "itm_head.", "word_head.", "vision_encoder.transformer.fc_norm.")


@dataclass
class FitReport:
    """Changes to weights so that they fit a model: names of its tensors."""

    resized: list[str] = field(default_factory=list)  # position tables and temporal embeddings
    fresh: list[str] = field(default_factory=list)  # of a new part: not in the weights, randomly initialised
    copied: list[str] = field(default_factory=list)  # of the answer decoder, from the fusion layers
    dropped: list[str] = field(default_factory=list)  # of the weights, of a part that the model does not have
    expected: list[str] = field(default_factory=list)  # listed in expected_tensors: fresh, or dropped

    def __str__(self) -> str:
        parts = [f"{name} {len(names)} ({_shortened(names)})" for name, names in vars(self).items() if names]
        return "; ".join(parts) or "all tensors loaded unchanged"


def _shortened(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f", ... {len(names) - limit} more" if len(names) > limit else "")


def save_model(
    model_or_state: nn.Module | dict[str, torch.Tensor],
    config: ModelConfig,
    folder: str | Path,
    special_ids: dict[str, int] | None = None,
    preprocessing: Preprocessing | None = None,
    history: History | None = None,
) -> None:
    """Write `folder/model.safetensors` and `folder/model.json`, each whole or not at all.

    special_ids: pad_id, cls_id, mask_id; taken from a model, and needed for a state dict that no vocab.txt will
    accompany.
    """
    if isinstance(model_or_state, nn.Module):
        state = model_or_state.state_dict()
        own = {name: getattr(model_or_state, name) for name in ("pad_id", "cls_id", "mask_id")}
        special_ids = {**own, **(special_ids or {})}
        history = history or getattr(model_or_state, "history", None)
    else:
        state = model_or_state
    inputs, known = preprocessing or Preprocessing(), history or History()
    write_weights(Weights(config, state, special_ids or {}, inputs, known), folder)


def load_weights(path: str | Path) -> Weights:
    """Architecture and tensors at `path` (see `resolve_weights`), in any format.

    Raises FileNotFoundError or ValueError that names the file and the remedy.
    """
    return find_weights(path)[1]


def find_weights(path: str | Path) -> tuple[Path, Weights]:
    """The folder or file that `path` means, and its weights; consistent also while a run replaces its checkpoints.

    Raises as `load_weights`.
    """
    while True:
        found = resolve_weights(path)
        try:
            return found, read_weights(found) if found.is_dir() else read_official(found)
        except (FileNotFoundError, ValueError):
            if found.exists():
                raise  # else a run has just replaced it by a better model or a newer checkpoint


def load_model(
    path: str | Path,
    changes: dict[str, Any] | None = None,
    special_ids: dict[str, int] | None = None,
    expected: Sequence[str] = (),
) -> Singularity | SingularityQA:
    """The model at `path`, in float32 on the CPU, in evaluation mode.

    path: a folder that `save_model` wrote, a run folder, or an official .pth. changes: dotted settings to load it
    with, for example {"num_frames": 4, "temporal_vision_encoder.enable": True, "image_res": 384}: position tables
    are interpolated, temporal embeddings truncated or extended with zeros, a new temporal encoder is initialised
    randomly, an answer decoder from the fusion layers; a user's losses are left out. expected: see `fit_weights`. The
    changes are logged.
    Raises UserError, listing the tensors, when anything else does not fit.
    """
    weights = load_weights(path)
    config = with_changes(weights.config, {"losses": {}, **(changes or {})})
    model = build_model(config, special_ids or weights.special_ids)
    report = fit_weights(model, weights, str(path), expected)
    model.history = weights.history
    logger.info("Loaded %s: %s", path, report)
    return model.eval()


def fit_weights(
    model: Singularity | SingularityQA, weights: Weights, source: str, expected: Sequence[str] = ()
) -> FitReport:
    """Copy `weights` into `model`, adapted to the size, length and task of its configuration.

    expected: names of tensors, or patterns such as "itm_head.*", that may be missing or with another shape (the model
    keeps its own) or unexpected (they are dropped).
    Raises UserError, listing the tensors, when any other is missing, unexpected or with another shape, or when an
    expected one fits after all.
    """
    report = FitReport()
    target, state = model.state_dict(), dict(weights.state)
    if model.config.answer_decoder.enable and not weights.config.answer_decoder.enable:
        _decoder_from_fusion(state, weights.config, model, report)
    _resize(state, target, model, report)

    missing = [name for name in target if name not in state]
    report.fresh = [name for name in missing if _is_new(name, weights.config, model.config)]
    surplus = [name for name in state if name not in target]
    report.dropped = [name for name in surplus if _is_obsolete(name, weights.config, model.config)]
    problems = {
        "missing": sorted(set(missing) - set(report.fresh)),
        "unexpected": sorted(set(surplus) - set(report.dropped)),
        "with another shape": [
            name for name, tensor in target.items() if name in state and state[name].shape != tensor.shape
        ],
    }
    report.expected = _take_expected(problems, expected, source)
    for name in report.expected:
        state.pop(name, None)
    if any(problems.values()):
        shapes = {
            name: f" {tuple(state[name].shape)} for {tuple(target[name].shape)}"
            for name in problems["with another shape"]
        }
        named = {what: [name + shapes.get(name, "") for name in names] for what, names in problems.items()}
        listed = "; ".join(f"{what}: {_shortened(names, 20)}" for what, names in named.items() if names)
        raise UserError(
            f"{source} does not fit the model ({listed}): take its architecture from the checkpoint and change only "
            "image_res, num_frames, temporal_vision_encoder, loss_weight, losses or answer_decoder; the vocabulary has "
            f"{weights.config.text_encoder.vocab_size} tokens in the checkpoint and "
            f"{model.config.text_encoder.vocab_size} in the model. List tensors that may differ in expected_tensors"
        )
    model.load_state_dict({name: state[name] for name in target if name in state}, strict=False)
    return report


def _take_expected(problems: dict[str, list[str]], expected: Sequence[str], source: str) -> list[str]:
    """Move the names that match `expected` out of `problems`; raises UserError for a pattern without a match."""
    taken: list[str] = []
    for pattern in expected:
        found = [name for names in problems.values() for name in names if fnmatchcase(name, pattern)]
        if not found and not any(fnmatchcase(name, pattern) for name in taken):
            rest = [name for names in problems.values() for name in names]
            fits = f"those are: {_shortened(rest)}" if rest else "all fit"
            raise UserError(
                f"expected_tensors names {pattern!r}, but no such tensor of {source} is missing, unexpected or of "
                f"another shape ({fits}): correct it or leave it out"
            )
        taken += found
        for what, names in problems.items():
            problems[what] = [name for name in names if name not in found]
    return taken


def _is_new(name: str, old: ModelConfig, new: ModelConfig) -> bool:
    """Whether a tensor belongs to a module that the old configuration did not have and that may be random."""
    if name.startswith("answer_decoder.") and not old.answer_decoder.enable:
        return _has_no_source(name.removeprefix("answer_decoder."), old, new)
    if name.startswith("losses."):
        return name.split(".")[1] not in old.own_losses
    if name.startswith("word_head."):
        return old.loss_weight.mlm <= 0
    return name.startswith("temporal_vision_encoder.") and (
        new.temporal_vision_encoder.enable and not old.temporal_vision_encoder.enable
    )


def _has_no_source(name: str, old: ModelConfig, new: ModelConfig) -> bool:
    """Whether the old model has nothing to initialise a tensor of the answer decoder from."""
    text = old.text_encoder
    if name.startswith("embeddings."):
        return text.type != "bert"
    if name.startswith("word_head."):
        return old.loss_weight.mlm <= 0
    layer = text.layers - new.answer_decoder.num_layers + int(name.split(".")[1])
    if ".crossattention." in name and layer < text.fusion_layer:
        return True
    return _reads_visuals(name) and old.vision_encoder.width != text.width


def _is_obsolete(name: str, old: ModelConfig, new: ModelConfig) -> bool:
    """Whether a tensor belongs to a module that the new configuration does not have."""
    answering = new.answer_decoder.enable and not old.answer_decoder.enable
    if answering and (name == "temp" or name.startswith(_WITHOUT_ANSWERS)):
        return True
    if name.startswith("losses."):
        return name.split(".")[1] not in new.own_losses
    if name.startswith("word_head."):
        return old.loss_weight.mlm > 0 and new.loss_weight.mlm <= 0
    return name.startswith("temporal_vision_encoder.") and not new.temporal_vision_encoder.enable


def _reads_visuals(name: str) -> bool:
    """Whether a cross-attention's tensor is as wide as the visual tokens (in an answer decoder, as the text)."""
    return name.endswith(("crossattention.self.key.weight", "crossattention.self.value.weight"))


def _decoder_from_fusion(
    state: dict[str, torch.Tensor], old: ModelConfig, model: Singularity | SingularityQA, report: FitReport
) -> None:
    """Add an answer decoder to `state`: the last layers of the text encoder, its embeddings and its MLM head."""
    new = model.config
    same_width = old.vision_encoder.width == old.text_encoder.width
    first = old.text_encoder.layers - new.answer_decoder.num_layers
    sources = {"answer_decoder.embeddings.": "text_encoder.embeddings.", "answer_decoder.word_head.": "word_head."}
    if old.text_encoder.type != "bert":  # it has other embeddings, of which those of words fit
        sources = {
            "answer_decoder.embeddings.word_embeddings.weight": _words_of(model.text_encoder),
            "answer_decoder.word_head.": "word_head.",
        }
    for i in range(new.answer_decoder.num_layers):
        sources[f"answer_decoder.layer.{i}."] = f"text_encoder.layer.{first + i}."
    for target, source in sources.items():
        for name in [name for name in state if name.startswith(source) and (same_width or not _reads_visuals(name))]:
            state[target + name.removeprefix(source)] = state[name]
            report.copied.append(target + name.removeprefix(source))


def _words_of(encoder: TextEncoder) -> str:
    """The name of an encoder's word embeddings in the state of its model."""
    words = encoder.word_embeddings.weight if hasattr(encoder, "word_embeddings") else None
    names = [name for name, parameter in encoder.named_parameters() if parameter is words]
    return f"text_encoder.{names[0] if names else 'word_embeddings.weight'}"


def _resize(
    state: dict[str, torch.Tensor],
    target: dict[str, torch.Tensor],
    model: Singularity | SingularityQA,
    report: FitReport,
) -> None:
    """Fit position tables to the image size and temporal embeddings to the number of frames, in place."""
    for name, tensor in state.items():
        if name not in target or tensor.shape == (shape := target[name].shape):
            continue
        state[name] = resized(model, name, tensor, shape)
        if state[name].shape == shape:
            report.resized.append(name)


def resized(model: Singularity | SingularityQA, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Tensor `name` of a checkpoint, by a linear map to `shape`, that of the model's; as it is where there is none."""
    if name.startswith("vision_encoder."):
        return model.vision_encoder.resized(name.removeprefix("vision_encoder."), tensor, torch.Size(shape))
    if name == "temporal_embeddings" and tensor.shape[3] == shape[3]:
        return resize_embeddings(tensor, model.config.num_frames)
    return tensor
