"""Encoders that transformers computes: text models of other kinds than BERT, and the towers of CLIP and SigLIP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from model.config import ModelConfig
from model.text import TEXT, TextEncoder, run_layer
from model.torchvision_cpu import resample_abs_pos_embed, transformers
from model.vision_encoder import VISION, VisionEncoder
from runtime.errors import UserError

# model_type of a config.json -> the class of transformers.
TEXT_MODELS = {
    "deberta-v2": "DebertaV2Model",
    "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
    "modernbert": "ModernBertModel",
    "mpnet": "MPNetModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
}
DUAL_MODELS = {"clip": "CLIP", "siglip": "Siglip"}  # followed by TextModel, VisionModel
# These number the positions of a text from the id of padding + 1.
SHIFTED_POSITIONS = ("mpnet", "roberta", "xlm-roberta")


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which transformers prints errors only, and no progress."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def _build(name: str, settings: Mapping[str, Any]) -> Any:
    """transformers' model `name` with random weights, from the entries of its config.json."""
    kind = getattr(transformers, name)
    with quiet():
        model = kind(kind.config_class(**settings))
    if getattr(model, "pooler", None) is not None:  # nothing reads its output
        model.pooler = None
    return model


def published_state(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that transformers reads from a checkpoint folder for `model`, by the names of `model`.

    Raises UserError when it lacks one.
    """
    try:
        with quiet():  # the other tower is not missed
            loaded, found = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} cannot be read ({str(error).splitlines()[0]}): copy it again") from None
    missing = sorted(set(found["missing_keys"]) & set(model.state_dict()))
    if missing:
        raise UserError(f"{folder} lacks weights of a {type(model).__name__}: {', '.join(missing[:5])}")
    return dict(loaded.state_dict())


class TransformersEncoder(nn.Module):
    """An encoder whose module `model` is one of transformers."""

    model: Any

    def published(self, folder: Path) -> dict[str, torch.Tensor]:
        """The encoder's tensors by their names here, from a checkpoint folder of transformers. Raises UserError."""
        return {f"model.{name}": tensor for name, tensor in published_state(self.model, folder).items()}


@TEXT("transformers")
class TransformersText(TextEncoder, TransformersEncoder):
    """A bidirectional text model, as the text-only half; `options` are the entries of its config.json."""

    def __init__(self, config: ModelConfig, pad_id: int = 0, **options: Any) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.model = self._built(config, options)

    def _built(self, config: ModelConfig, options: dict[str, Any]) -> Any:
        kind = options.get("model_type")
        if kind not in TEXT_MODELS:
            raise UserError(f"text_encoder.options.model_type is {kind!r}: must be one of {', '.join(TEXT_MODELS)}")
        return _build(TEXT_MODELS[kind], options)

    @property
    def word_embeddings(self) -> nn.Embedding:  # type: ignore[override]
        """The model's own."""
        return self.model.get_input_embeddings()

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        def run(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

        return run_layer(run, self.recompute, input_ids, attention_mask)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As `TextEncoder`."""
        return self._states(input_ids, attention_mask)


class TextTower(TransformersText):
    """The text tower of a dual encoder; it was trained without [MASK]."""

    kind = ""

    def _built(self, config: ModelConfig, options: dict[str, Any]) -> Any:
        if config.loss_weight.mlm > 0 and not config.answer_decoder.enable:
            raise UserError(
                f"loss_weight.mlm is {config.loss_weight.mlm:g}, but the text encoders of CLIP and SigLIP were trained "
                "without [MASK]: set loss_weight.mlm=0"
            )
        return _build(f"{DUAL_MODELS[self.kind]}TextModel", options)


@TEXT("clip")
class ClipText(TextTower):
    """CLIP's text tower. It is causal: the state of the end token, the last one, is put in place of the first."""

    kind = "clip"

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As `TextEncoder`; texts begin and end with CLIP's tokens for that."""
        states = self._states(input_ids, attention_mask)
        last = attention_mask.sum(1) - 1
        pooled = states[torch.arange(len(states), device=states.device), last]
        return torch.cat([pooled[:, None], states[:, 1:]], 1)


@TEXT("siglip")
class SiglipText(TextTower):
    """SigLIP's text tower. It reads texts padded to its full length, padding included, and pools the last token.

    The first token here has no counterpart there: it stands for the whole text, and the pooled state is put there.
    """

    kind = "siglip"

    def _built(self, config: ModelConfig, options: dict[str, Any]) -> Any:
        model = super()._built(config, options)
        model.head = nn.Identity()  # it is `text_proj`
        return model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As `TextEncoder`."""
        length, words = input_ids.shape[1], input_ids[:, 1:]
        words = functional.pad(
            words, (0, self.model.config.max_position_embeddings - words.shape[1]), value=self.pad_id
        )
        states = self._states(words, None)
        return torch.cat([states[:, -1:], states[:, : length - 1]], 1)

    def flops(self, length: int) -> int:
        """As `TextEncoder`: always those of the full length."""
        assert self.measured is not None
        return self.measured[0]


class VisionTower(VisionEncoder, TransformersEncoder):
    """The vision tower of a dual encoder; `options` are the entries of its config.json."""

    kind, prefix_tokens = "", 0

    def __init__(self, config: ModelConfig, **options: Any) -> None:
        super().__init__()
        vision = config.vision_encoder
        self.mean, self.std = tuple(vision.mean or self.mean), tuple(vision.std or self.std)
        self.model = _build(f"{DUAL_MODELS[self.kind]}VisionModel", {**options, "image_size": config.image_res})

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """As `VisionEncoder`."""
        if enable:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def resized(self, name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """As `VisionEncoder`, for the table of positions (L, D)."""
        if not name.endswith("position_embedding.weight") or tensor.shape[1] != shape[1]:
            return tensor
        size = [math.isqrt(shape[0])] * 2
        return resample_abs_pos_embed(tensor[None], size, num_prefix_tokens=self.prefix_tokens)[0]


@VISION("clip")
class ClipVision(VisionTower):
    """CLIP's vision tower."""

    kind, prefix_tokens = "clip", 1

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VisionEncoder`; the tokens have CLIP's last norm, which it computes for the first one only."""
        tokens = self.model.post_layernorm(self.model(pixel_values=images).last_hidden_state)
        return tokens, tokens[:, 0]


@VISION("siglip")
class SiglipVision(VisionTower):
    """SigLIP's vision tower."""

    kind = "siglip"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VisionEncoder`; the first token is the pooled vector."""
        output = self.model(pixel_values=images)
        pooled = output.pooler_output
        return torch.cat([pooled[:, None], output.last_hidden_state], 1), pooled
