"""Top-k of rows of scores, ties by index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from runtime.activity import progress

BLOCK_CELLS = 1 << 24  # cells of a score matrix handled at once


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `columns` cells in blocks of a bounded size."""
    step = max(1, BLOCK_CELLS // max(1, columns))
    for start in range(0, rows, step):
        progress(f"ranking scores, row {start} of {rows}")
        yield slice(start, min(start + step, rows))


def top_k_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """Marks the k highest of each row of scores (Q, G), ties by index; (Q, G) bool.

    Cells of -inf are never marked. A row with fewer than k other cells has all of them marked.
    """
    if k >= scores.shape[1]:
        return scores > -np.inf
    mask = np.zeros(scores.shape, dtype=bool)
    if k <= 0:
        return mask
    for block in row_blocks(*scores.shape):
        rows = scores[block]
        # Negated, because np.partition from the end is 20x slower where most scores are equal, as after re-ranking.
        threshold = -np.partition(-rows, k - 1, axis=1)[:, k - 1, None]
        above, equal = rows > threshold, rows == threshold
        vacant = k - above.sum(1, keepdims=True)
        crowded = equal.sum(1) > vacant[:, 0]
        equal[crowded] &= equal[crowded].cumsum(1) <= vacant[crowded]
        mask[block] = (above | equal) & (rows > -np.inf)
    return mask


def top_items(row: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest of scores (G,), best first, ties by index; fewer where only -inf is left."""
    return ordered(row, np.flatnonzero(top_k_mask(row[None], k)[0]))


def ordered(row: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Some items (K,) of scores (G,), ascending, best first, ties by index."""
    return items[np.argsort(-row[items], kind="stable")]
