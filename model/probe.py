"""Runs an encoder of the user's own once, when it is built: what it makes, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Context without the kernels of whole layers of nn.TransformerEncoder, which the counter does not know either."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run_counted(encoder: nn.Module, *inputs: torch.Tensor) -> tuple[Any, int]:
    """The output of an encoder in evaluation mode, and its FLOPs: matrix products and convolutions."""
    encoder.eval()
    # The counter does not know the attention kernels of a CPU.
    with torch.no_grad(), _layer_by_layer(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = encoder(*inputs)
    encoder.train()
    return output, counter.get_total_flops()
