"""Exchanges between ranks: gathering (with gradients, too), broadcasting, barriers; one process needs no group."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import distributed

from runtime.activity import waiting

T = TypeVar("T")


def gather_rows(rows: torch.Tensor, world_size: int) -> torch.Tensor:
    """The rows (n, ...) of all ranks, rank after rank, on every rank; ranks may have different n.

    Nothing is summed or rounded: the result holds the ranks' own bits. All dimensions but the first must agree.
    """
    if world_size == 1:
        return rows
    device = _group_device(rows)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    with waiting("gather_rows"):
        distributed.all_gather(counts, torch.tensor([len(rows)], device=device))
        sizes = [int(count) for count in counts]
    padded = torch.zeros((max(sizes), *rows.shape[1:]), dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    with waiting("gather_rows"):
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)]).to(rows.device)


def gather_objects(value: T, world_size: int) -> list[T]:
    """Every rank's small value, in rank order, on every rank."""
    if world_size == 1:
        return [value]
    values: list[T | None] = [None] * world_size
    with waiting("gather_objects"):
        distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast(value: T | None, world_size: int) -> T:
    """Rank 0's small value on every rank."""
    values = [value]
    if world_size > 1:
        with waiting("broadcast"):
            distributed.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def barrier(world_size: int) -> None:
    """Barrier: return after all ranks have called it."""
    if world_size > 1:
        with waiting("barrier"):
            distributed.barrier()


class _Gather(torch.autograd.Function):
    """All ranks' rows, one rank after another; backward sums all ranks' gradients of this rank's rows."""

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
    """(B, ...) of each of W ranks to (W·B, ...) on all, in order of rank, with gradients; one process keeps its rows.

    All ranks call with the same shape. The mean over the ranks of the parameters' gradients, as data-parallel training
    takes it, is then the gradient of the mean over the ranks of their losses.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


def _group_device(rows: torch.Tensor) -> torch.device:
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if rows.device.type == "cpu" else rows.device
