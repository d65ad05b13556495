"""Text encoders: the registry, its contract with the fusion layers that all share, and BERT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from model.bert import additive_mask, bert_config, initialize_bert, run_layer
from model.config import ModelConfig
from model.fusion import CrossAttentionKeys, FusionLayer
from model.probe import run_counted
from model.torchvision_cpu import (
    BertEmbeddings,
    BertLayer,
)
from runtime.errors import UserError
from runtime.plugins import Registry, build_with_options


class TextEncoder(nn.Module):
    """A text encoder: its own text-only half, `forward`, and the fusion layers above it, which all share.

    A class that derives from it, registered with `@TEXT("NAME")`, is chosen by `text_encoder.type: NAME`. It is built
    as `Class(config, pad_id, **options)`: the ModelConfig, the id of [PAD], and `text_encoder.options`. `build_text`
    adds the fusion layers as `layer`.
    """

    layer: nn.ModuleDict | nn.ModuleList
    word_embeddings: nn.Embedding  # (V, D), see `word_matrix`
    recompute = False  # whether gradient checkpointing is on, see `run_layer`
    measured: tuple[int, int] | None = None  # of an own encoder: FLOPs of a text of one token, and of two

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask (B, Lt) to states (B, Lt, D) of the tokens; no visual is involved.

        D is `text_encoder.width`. The mask is 1 at tokens and 0 at padding, which follows them and must not change
        their states. The first token's state stands for the whole text in VTM, and in VTC unless `pooling` is mean.
        """
        raise NotImplementedError

    def flops(self, length: int) -> int:
        """FLOPs of a text of `length` tokens, of an own encoder; attention grows with the square of the length."""
        assert self.measured is not None
        one, two = self.measured
        squared = two // 2 - one
        return length * (one - squared) + length**2 * squared

    def word_matrix(self) -> torch.Tensor:
        """Word embeddings (V, D), the output matrix of the MLM head: those of the module `word_embeddings`."""
        return self.word_embeddings.weight

    def from_published(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `text_encoder.pretrained` by the names of this module; surplus ones are ignored."""
        return state

    def add_fusion_layers(self, layers: dict[str, FusionLayer], std: float) -> None:
        """Take the fusion layers, by their number above the text-only ones, and initialise their weights."""
        self.layer = nn.ModuleDict(layers)
        initialize_bert(self.layer, std)

    @property
    def fusion_layers(self) -> list[FusionLayer]:
        """The layers with cross-attention."""
        return [layer for layer in self.layer.children() if isinstance(layer, FusionLayer)]

    def fuse(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor,
        visual: CrossAttentionKeys,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fusion layers over P pairs of a text and one of N visuals.

        states (P, Lt, D) of the text-only layers and attention_mask (P, Lt). The last len(index) pairs attend to the
        visuals `index`; those before them (all P without `index`) come in groups of N, of which row g·N + n attends to
        visual n. Returns states (P, Lt, D).
        """
        mask = additive_mask(attention_mask, states.dtype)
        for layer, (keys, values) in zip(self.fusion_layers, visual, strict=True):
            states = run_layer(layer, self.recompute, states, mask, keys, values, index)
        return states

    def attend_texts(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The first fusion layer's self-attention over texts (M, Lt, D), the input of `fuse_pairs`; once for a text."""
        mask = additive_mask(attention_mask, states.dtype)
        return self.fusion_layers[0].self_attend(states, mask) if self.fusion_layers else states

    def fuse_pairs(
        self,
        attended: torch.Tensor,
        attention_mask: torch.Tensor,
        visual: CrossAttentionKeys,
        index: torch.Tensor | None = None,
        whole: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fuse` with all tokens of the first `whole` pairs, and of the others the first token, which the matching head
        reads; P pairs in all.

        attended (P, Lt, D) of `attend_texts`, other parameters as `fuse`. The last layer computes what is returned
        only: first tokens (P - whole, D) and states (whole, Lt, D).
        """
        layers = self.fusion_layers
        if not layers:
            return attended[whole:, 0], attended[:whole]
        mask, states = additive_mask(attention_mask, attended.dtype), attended
        for number, (layer, (keys, values)) in enumerate(zip(layers[:-1], visual[:-1], strict=True)):
            if number:
                states = run_layer(layer.self_attend, self.recompute, states, mask)
            states = run_layer(layer.cross_attend, self.recompute, states, keys, values, index)
        last, (keys, values) = layers[-1], visual[-1]
        first, read = states[whole:, :1], states[:whole]
        if len(layers) > 1:
            first = run_layer(last.self_attend_first, self.recompute, states[whole:], mask[whole:])
            read = run_layer(last.self_attend, self.recompute, read, mask[:whole]) if whole else read
        first = run_layer(last.cross_attend, self.recompute, first, keys, values, index)
        read = run_layer(last.cross_attend, self.recompute, read, keys, values) if whole else read
        return first[:, 0], read


TEXT: Registry[Callable[..., TextEncoder]] = Registry("text_encoder.type")


@TEXT("bert")
class BertEncoder(TextEncoder):
    """BERT: embeddings and `fusion_layer` text-only layers."""

    def __init__(self, config: ModelConfig, pad_id: int = 0) -> None:
        super().__init__()
        bert = bert_config(config.text_encoder, pad_id=pad_id)
        self.fusion_layer = config.text_encoder.fusion_layer
        self.embeddings = BertEmbeddings(bert)
        self.layer: nn.ModuleList = nn.ModuleList(BertLayer(bert) for _ in range(self.fusion_layer))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As `TextEncoder`."""
        states = self.embeddings(input_ids)
        mask = additive_mask(attention_mask, states.dtype)
        for layer in self.layer[: self.fusion_layer]:
            states = run_layer(layer, self.recompute, states, mask)
        return states

    def word_matrix(self) -> torch.Tensor:
        """As `TextEncoder`."""
        return self.embeddings.word_embeddings.weight

    def add_fusion_layers(self, layers: dict[str, FusionLayer], std: float) -> None:
        """As `TextEncoder`; initialises the whole encoder."""
        self.layer.extend(layers.values())
        initialize_bert(self, std)


def build_text(config: ModelConfig, pad_id: int = 0) -> TextEncoder:
    """The text encoder that `config.text_encoder` chooses, with its fusion layers and random weights.

    Raises UserError when there is none, or when its options, sizes or outputs do not fit.
    """
    text = config.text_encoder
    if not 0 <= text.fusion_layer <= text.layers:
        raise UserError(
            f"text_encoder.fusion_layer is {text.fusion_layer}: must be between 0 and text_encoder.layers {text.layers}"
        )
    encoder = build_with_options(TEXT[text.type], "text_encoder.options", text.options, config, pad_id)
    if not isinstance(encoder, TextEncoder):
        raise UserError(f"text_encoder.type={text.type} is a {type(encoder).__name__}: derive it from TextEncoder")
    bert, numbers = bert_config(text, pad_id=pad_id), range(text.fusion_layer, text.layers)
    layers = {str(number): FusionLayer(bert, config.vision_encoder.width) for number in numbers}
    encoder.add_fusion_layers(layers, text.initializer_range)
    if not isinstance(encoder, BertEncoder):
        _check_outputs(encoder, config, pad_id)
    return encoder


def _check_outputs(encoder: TextEncoder, config: ModelConfig, pad_id: int) -> None:
    """Measure an own encoder; raise UserError unless states and word embeddings have the shapes that are expected."""
    text, ids = config.text_encoder, torch.full((2, 2), pad_id)
    _, one = run_counted(encoder, ids[:1, :1], torch.ones_like(ids[:1, :1]))
    states, four = run_counted(encoder, ids, torch.ones_like(ids))
    encoder.measured = one, four // 2
    if not isinstance(states, torch.Tensor):
        raise UserError(
            f"text_encoder.type={text.type} returns a {type(states).__name__}: its forward must return one "
            "tensor, the states"
        )
    if states.shape != (2, 2, text.width):
        raise UserError(
            f"text_encoder.type={text.type} makes states {tuple(states.shape)} of 2 texts of 2 tokens; they must be "
            f"(2, 2, {text.width}), as wide as text_encoder.width"
        )
    words = getattr(encoder, "word_embeddings", None)
    if config.loss_weight.mlm > 0 and not config.answer_decoder.enable:
        shape = tuple(words.weight.shape) if isinstance(words, nn.Embedding) else None
        if shape != (text.vocab_size, text.width):
            raise UserError(
                f"text_encoder.type={text.type} has word_embeddings of shape {shape}; MLM needs an nn.Embedding "
                f"({text.vocab_size}, {text.width}) of this name: add it, or loss_weight.mlm=0"
            )
