"""All-gather with gradients: negatives from the whole batch instead of from one rank's part."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


class _Gather(torch.autograd.Function):
    """All ranks' rows in order of rank; the backward pass sums the gradients of all ranks for this rank's rows."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """(B, ...) of each of W ranks to (W·B, ...) on all, in order of rank; unchanged with one process.

    All ranks call with the same shape. The mean over the ranks of the parameters' gradients, as data-parallel training
    takes it, is then the gradient of the mean over the ranks of their losses.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)
