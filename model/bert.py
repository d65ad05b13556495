"""BERT's settings in transformers, its initial weights and its attention mask, for all parts made of its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.config import TextConfig
from model.torchvision_cpu import BertConfig
from runtime.errors import UserError

PADDED = -10000.0  # added to the attention scores of padded keys


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
