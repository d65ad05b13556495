"""Brings what each rank has computed to all of them, in full precision; a single process needs no group."""

from __future__ import annotations

from typing import TypeVar

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


def share(value: T | None, world_size: int) -> T:
    """Rank 0's small value on every rank."""
    values = [value]
    if world_size > 1:
        with waiting("share"):
            distributed.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def barrier(world_size: int) -> None:
    """Return when all ranks have come here."""
    if world_size > 1:
        with waiting("barrier"):
            distributed.barrier()


def _group_device(rows: torch.Tensor) -> torch.device:
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if rows.device.type == "cpu" else rows.device
