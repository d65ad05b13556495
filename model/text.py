"""BERT in two halves, text-only layers and fusion layers with cross-attention to a visual; built from transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig, TextConfig
from model.probe import run_counted
from model.torchvision_cpu import (
    BertAttention,
    BertConfig,
    BertEmbeddings,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertPredictionHeadTransform,
    BertSelfOutput,
)
from runtime.errors import UserError
from runtime.plugins import Registry, build_with_options

PADDED = -10000.0  # added to the attention scores of padded keys

# For each fusion layer the keys and values (N, heads, S, width / heads) of N visuals with S tokens each.
CrossAttentionKeys = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def run_layer(layer: Callable[..., torch.Tensor], recompute: bool, *inputs: torch.Tensor | None) -> torch.Tensor:
    """Output of `layer`; with `recompute` (gradient checkpointing) the backward pass computes its activations again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def bert_config(config: TextConfig, width: int | None = None, heads: int | None = None, pad_id: int = 0) -> BertConfig:
    """The transformers configuration of a BERT layer; `width` and `heads` replace those of the text encoder."""
    width, heads = width or config.width, heads or config.heads
    if width % heads:
        raise UserError(f"text_encoder: a width of {width} is not a multiple of {heads} heads: change one")
    result = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        num_hidden_layers=config.layers,
        num_attention_heads=heads,
        intermediate_size=config.intermediate * width // config.width,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        layer_norm_eps=config.layer_norm_eps,
        hidden_act="gelu",
        pad_token_id=pad_id,
    )
    result._attn_implementation = "sdpa"
    return result


def initialize_bert(part: nn.Module, std: float) -> None:
    """BERT's initial weights for all modules of a part: matrices N(0, std), embeddings N(0, 0.02)."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)  # a layer norm follows: smaller ones learn faster
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def additive_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, Lt) of ones and zeros to (B, 1, 1, Lt), 0 where a key is real and -10000 where it is padding."""
    return ((1 - attention_mask[:, None, None, :].to(dtype)) * PADDED).to(dtype)


class CrossAttentionCore(nn.Module):
    """Multi-head attention of P texts to N visuals, whose keys and values are projected once each."""

    def __init__(self, config: BertConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)

    def project(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, S, width) to keys and values, each (N, heads, S, D / heads)."""
        shape = (*source.shape[:2], self.heads, -1)
        return self.key(source).view(shape).transpose(1, 2), self.value(source).view(shape).transpose(1, 2)

    def forward(
        self, states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States (P, Lt, D) with P = G·N, of which row g·N + n attends to source n; mask is added to the scores."""
        (pairs, length, width), sources = states.shape, keys.shape[0]
        groups = pairs // sources
        query = self.query(states).view(groups, sources, length, self.heads, -1)
        query = query.permute(1, 3, 0, 2, 4).reshape(sources, self.heads, groups * length, -1)
        context = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        context = context.view(sources, self.heads, groups, length, -1).permute(2, 0, 3, 1, 4)
        return context.reshape(pairs, length, width)


class CrossAttention(nn.Module):
    """Cross-attention with BERT's output projection, residual and norm."""

    def __init__(self, config: BertConfig, source_width: int) -> None:
        super().__init__()
        self.self = CrossAttentionCore(config, source_width)
        self.output = BertSelfOutput(config)

    def forward(
        self,
        states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States (P, Lt, D) of P pairs, laid out as for `TextEncoder.fuse`, to states of the same shape."""
        if index is None:
            return self.output(self.self(states, keys, values, mask), states)
        rest = states.shape[0] - index.shape[0]
        parts = [self.self(states[rest:], keys[index], values[index], None if mask is None else mask[index])]
        if rest:
            parts.insert(0, self.self(states[:rest], keys, values, mask))
        return self.output(torch.cat(parts), states)


class FusionLayer(nn.Module):
    """BERT's self-attention, a cross-attention and BERT's feed-forward part, each with residual and norm."""

    def __init__(self, config: BertConfig, source_width: int) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = CrossAttention(config, source_width)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def project(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, S, width) to the keys and values that `forward` takes."""
        return self.crossattention.self.project(source)

    def forward(
        self,
        states: torch.Tensor,
        self_mask: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor | None = None,
        cross_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States (P, Lt, D) to states of the same shape; masks are added to the scores, cross_mask (N, 1, 1, S)."""
        return self.cross_attend(self.self_attend(states, self_mask), keys, values, index, cross_mask)

    def self_attend(self, states: torch.Tensor, self_mask: torch.Tensor) -> torch.Tensor:
        """The layer's first part, self-attention over (P, Lt, D); it does not depend on visuals."""
        return self.attention(states, self_mask)[0]

    def self_attend_first(self, states: torch.Tensor, self_mask: torch.Tensor) -> torch.Tensor:
        """`self_attend` for the first token only: (P, Lt, D) to (P, 1, D)."""
        core = self.attention.self
        shape = (states.shape[0], -1, core.num_attention_heads, core.attention_head_size)
        query, key, value = (
            layer(rows).view(shape).transpose(1, 2)
            for layer, rows in ((core.query, states[:, :1]), (core.key, states), (core.value, states))
        )
        dropout = core.dropout.p if self.training else 0.0
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=self_mask, dropout_p=dropout)
        return self.attention.output(context.transpose(1, 2).flatten(2), states[:, :1])

    def cross_attend(
        self,
        states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor | None = None,
        cross_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's other parts, cross-attention and feed-forward, each token by itself."""
        states = self.crossattention(states, keys, values, index, cross_mask)
        return self.output(self.intermediate(states), states)


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
        their states. The first token's state stands for the whole text, in VTC and VTM.
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


class ScoreHead(nn.Linear):
    """A linear layer that computes in float32 also with bf16 weights: bf16 scores have ties, ranked by position."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """States (..., D) to scores (..., K) float32."""
        return functional.linear(input.float(), self.weight.float(), self.bias.float())


class MLMHead(nn.Module):
    """BERT's MLM head; its output matrix is the word embedding, which belongs to the text encoder and is passed in."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(bert_config(config))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialize_bert(self, config.initializer_range)

    def forward(self, states: torch.Tensor, word_embeddings: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """States (..., D) and embeddings (V, D) to logits (..., V); `exact`: in float32, for ranking."""
        states = self.transform(states)
        if not exact:
            return functional.linear(states, word_embeddings, self.bias)
        with exact_products(word_embeddings.dtype):
            return functional.linear(states.float(), word_embeddings.float(), self.bias.float())


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Context for float32 products of values converted from `dtype`: with TF32 where that is exact.

    TF32 represents every bf16 and fp16 value (8 and 11 bits of significand).
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or dtype != torch.float32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
