"""Retrieval metrics: against a naive reference, against the official ones, with ties, odd sizes and missing items."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import NOT_RANKED, chance_metrics, retrieval_metrics, top_items, top_k_mask, true_ranks


@st.composite
def scored(draw):
    """Scores (Q, G) with many ties and -inf, and one or more true items a query."""
    queries, gallery = draw(st.integers(1, 7)), draw(st.integers(1, 14))
    cells = st.sampled_from([-100.0, -1.0, 0.0, 0.5, 2.0, -np.inf])
    rows = draw(st.lists(st.lists(cells, min_size=gallery, max_size=gallery), min_size=queries, max_size=queries))
    truth = [sorted(draw(st.sets(st.integers(0, gallery - 1), min_size=1))) for _ in range(queries)]
    return np.array(rows, dtype=np.float32), truth


def naive_rank(row, items):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    ranks = [order.index(i) for i in items if row[i] > -np.inf]
    return min(ranks) if ranks else NOT_RANKED


@given(scored())
@settings(max_examples=150, deadline=None)
def test_ranks_equal_sorting_and_counting(case):
    scores, truth = case
    expected = [naive_rank(row, items) for row, items in zip(scores, truth)]
    assert true_ranks(scores, truth).by_index.tolist() == expected


@given(scored())
@settings(max_examples=100, deadline=None)
def test_bounds_are_what_favourable_and_unfavourable_orders_of_ties_give(case):
    scores, truth = case
    ranks = true_ranks(scores, truth)
    for row, items, best, worst in zip(scores, truth, ranks.best, ranks.worst):
        is_true = np.isin(np.arange(len(row)), items)
        for order, expected in ((np.lexsort((~is_true, -row)), best), (np.lexsort((is_true, -row)), worst)):
            found = [rank for rank, item in enumerate(order) if is_true[item] and row[item] > -np.inf]
            assert expected == (found[0] if found else NOT_RANKED)


@given(scored(), st.integers(0, 16))
@settings(max_examples=100, deadline=None)
def test_top_k_is_the_head_of_a_stable_sort(case, k):
    for row, mask in zip(case[0], top_k_mask(case[0], k)):
        order = [i for i in sorted(range(len(row)), key=lambda i: (-row[i], i)) if row[i] > -np.inf][:k]
        assert np.flatnonzero(mask).tolist() == sorted(order)
        assert top_items(row, k).tolist() == order


def test_what_depends_on_ties_is_named():
    certain = np.eye(12)
    tied = np.full((12, 12), -100.0)
    ids = [[i] for i in range(12)]
    assert retrieval_metrics(certain, certain, ids, ids).depends_on_ties == []
    names = retrieval_metrics(certain, tied, ids, ids).depends_on_ties
    assert names == ["img_r1", "img_r5", "img_r10", "img_r_mean", "r_mean"]


def test_the_best_of_several_true_items_counts_and_a_visual_without_texts_is_no_query():
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [5.0, 0.0, 0.0]])
    metrics = retrieval_metrics(scores, scores.T, [[0, 1], [2], []], [[0], [0], [1]]).values
    assert metrics["txt_r1"] == 50.0
    assert metrics["txt_r5"] == 100.0
    assert metrics["img_r1"] == round(100 / 3, 2)


def test_chance_is_the_mean_of_random_rankings():
    rng = np.random.default_rng(0)
    texts_of_visual = [[0], [1, 2, 3], [4], [5, 6]] + [[i] for i in range(7, 15)]
    visuals_of_text = [[v] for v, texts in enumerate(texts_of_visual) for _ in texts]
    total: dict[str, float] = {}
    for _ in range(2000):
        scores = rng.random((len(texts_of_visual), len(visuals_of_text)))
        for name, value in retrieval_metrics(scores, scores.T, texts_of_visual, visuals_of_text).values.items():
            total[name] = total.get(name, 0.0) + value / 2000
    chance = chance_metrics(texts_of_visual, visuals_of_text)
    assert chance.keys() == total.keys()
    for name in chance:
        assert chance[name] == pytest.approx(total[name], abs=1.0)
    assert chance_metrics([[i] for i in range(1000)], [[i] for i in range(1000)])["img_r10"] == 1.0


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match="3 queries"):
        true_ranks(np.zeros((2, 4)), [[0]] * 3)
    with pytest.raises(ValueError, match="NaN"):
        true_ranks(np.full((1, 4), np.nan), [[0]])


def test_large_matrices_are_handled_in_blocks(monkeypatch):
    monkeypatch.setattr("eval.metrics.BLOCK_CELLS", 16)
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (9, 11)).astype(np.float32)
    truth = [[int(rng.integers(11))] for _ in range(9)]
    assert true_ranks(scores, truth).by_index.tolist() == [naive_rank(r, t) for r, t in zip(scores, truth)]
    for row, k in product(range(9), (1, 3)):
        assert np.flatnonzero(top_k_mask(scores, k)[row]).tolist() == sorted(top_items(scores[row], k))
