"""Fusion layers: BERT's layers with cross-attention to the tokens of a visual."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from model.torchvision_cpu import BertAttention, BertConfig, BertIntermediate, BertOutput, BertSelfOutput

# For each fusion layer the keys and values (N, heads, S, width / heads) of N visuals with S tokens each.
CrossAttentionKeys = tuple[tuple[torch.Tensor, torch.Tensor], ...]


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
