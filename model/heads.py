"""Heads on top of fused states: matching scores and MLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from model.bert import bert_config, initialize_bert
from model.config import TextConfig
from model.torchvision_cpu import BertPredictionHeadTransform


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
