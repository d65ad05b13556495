"""Intervals and paired comparisons: right for known distributions, independent of order, and kept on disk."""

import json

import numpy as np
import pytest

from eval.compare import compare, main
from eval.outcomes import Outcomes, intervals, outcomes_of_ranks, read_outcomes, write_outcomes


def answers(values, visuals=None, queries=None, types=None, name="test"):
    count = len(values)
    queries = queries or [f"q{i}" for i in range(count)]
    return Outcomes(name, "accuracy", queries, visuals or queries, np.asarray(values, dtype=float), types or {})


def ranks(values, kind="text_to_visual", name="test/"):
    names = [f"t{i}" for i in range(len(values))]
    return outcomes_of_ranks(name, kind, names, names, np.asarray(values))


def test_an_interval_has_the_width_that_theory_says():
    rng = np.random.default_rng(0)
    values = (rng.random(400) < 0.3).astype(float)
    low, high = intervals([answers(values)])["test"]["overall"]
    share = values.mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 400)
    assert low == pytest.approx(100 * (share - half), abs=1)
    assert high == pytest.approx(100 * (share + half), abs=1)


def test_questions_about_one_visual_are_drawn_together():
    rng = np.random.default_rng(0)
    right = (rng.random(100) < 0.5).astype(float)
    together = answers(np.repeat(right, 16), visuals=[f"v{i // 16}" for i in range(1600)])
    apart = answers(np.repeat(right, 16))
    (low, high), (a, b) = (intervals([part])["test"]["overall"] for part in (together, apart))
    assert (high - low) / (b - a) == pytest.approx(4, rel=0.15)


def test_intervals_enclose_every_metric_and_type():
    rng = np.random.default_rng(1)
    parts = [ranks(rng.integers(0, 30, 200)), ranks(rng.integers(0, 9, 150), "visual_to_text")]
    found = intervals(parts)["test/"]
    assert list(found)[:3] == ["img_r1", "img_r5", "img_r10"]
    assert {"img_r_mean", "txt_r_mean", "r_mean"} <= set(found)
    assert all(low < high for name, (low, high) in found.items() if name != "txt_r10")
    assert found["txt_r10"] == (100, 100)
    types = {"answer_type": ["yes/no"] * 5 + ["other"] * 15, "question_type": ["is"] * 10 + ["what"] * 9 + [""]}
    found = intervals([answers([1.0] * 5 + [0.5] * 15, types=types)])["test"]
    assert found["answer_type/yes/no"] == (100, 100)
    assert found["answer_type/other"] == found["question_type/what"] == (50, 50)
    low, high = found["question_type/is"]
    assert 50 <= low < 75 < high <= 100
    assert set(found) == {
        "overall",
        "answer_type/yes/no",
        "answer_type/other",
        "question_type/is",
        "question_type/what",
    }


def test_outcomes_come_back_from_disk(tmp_path):
    unranked = np.iinfo(np.int64).max
    parts = [
        ranks([0, 4, unranked]),
        ranks([1], "visual_to_text"),
        answers([1.0, 0.3], types={"question_type": ["", "what"], "answer_type": ["a", "b"]}),
    ]
    write_outcomes(tmp_path / "outcomes.parquet", parts)
    back = read_outcomes(tmp_path / "outcomes.parquet")
    assert [(part.metrics, part.kind, part.queries) for part in back] == [
        (part.metrics, part.kind, list(part.queries)) for part in parts
    ]
    np.testing.assert_array_equal(back[0].values, [1, 5, np.inf])
    np.testing.assert_array_equal(back[2].values, [1, 0.3])
    assert back[2].types == {"question_type": ["", "what"], "answer_type": ["a", "b"]}
    assert list(back[2].points) == ["overall", "question_type/what", "answer_type/a", "answer_type/b"]
    assert back[0].points["img_r5"].tolist() == [1, 1, 0]
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ValueError, match="is not a table of outcomes"):
        read_outcomes(tmp_path / "other")


def test_a_real_difference_is_found_and_chance_is_not():
    rng = np.random.default_rng(0)
    base = (rng.random(300) < 0.5).astype(float)
    same = np.where(rng.random(300) < 0.2, (rng.random(300) < 0.5), base).astype(float)
    better = np.where((base == 0) & (rng.random(300) < 0.3), 1.0, base)
    (found,) = compare([answers(base)], [answers(better)])
    difference = found.differences["overall"]
    assert difference.difference == pytest.approx(100 * (better - base).mean(), abs=0.01)
    assert difference.low > 0
    assert difference.p < 0.01
    assert (found.better["accuracy"], found.worse["accuracy"]) == (int((better > base).sum()), 0)
    (found,) = compare([answers(base)], [answers(same)])
    assert found.differences["overall"].low < 0 < found.differences["overall"].high
    assert found.differences["overall"].p > 0.05


def test_pairing_is_by_query_not_by_place():
    rng = np.random.default_rng(0)
    values, order = rng.random(50), rng.permutation(50)
    names = [f"q{i}" for i in range(50)]
    shuffled = answers(values[order], queries=[names[i] for i in order])
    (found,) = compare([answers(values)], [shuffled])
    assert found.differences["overall"].difference == 0
    assert found.differences["overall"].p == 1
    (found,) = compare([answers(values)], [answers(values[:30])])
    assert (found.shared, found.only_first, found.only_second) == (30, 20, 0)
    repeated = ["clip", "clip", "other", "clip"]  # paired in their order
    (found,) = compare([answers([1, 0, 1, 0], queries=repeated)], [answers([1, 1, 1], queries=repeated[:3])])
    assert (found.shared, found.only_first, found.better["accuracy"]) == (3, 1, 1)


def test_the_largest_changes_are_listed():
    unranked = np.iinfo(np.int64).max
    (found,) = compare([ranks([0, 3, 99, 5])], [ranks([unranked, 3, 0, 4])], changes=1)
    assert [(c.query, c.first, c.second) for c in found.improved["text_to_visual"]] == [("t2", 100, 1)]
    assert [(c.query, c.first, c.second) for c in found.worsened["text_to_visual"]] == [("t0", 1, None)]
    assert (found.better, found.worse) == ({"text_to_visual": 2}, {"text_to_visual": 1})


def test_command_line(tmp_path, capsys):
    for name, values in (("a", [0, 3, 99]), ("b", [0, 0, 4])):
        write_outcomes(tmp_path / name, [ranks(values), ranks(values, "visual_to_text")])
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(tmp_path / "c.json")]) == 0
    text = capsys.readouterr().out
    assert "img_r1" in text
    assert "+33.33" in text
    assert "better: 100 -> 5  t2  [t2]" in text
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["comparisons"][0]["differences"]["img_r1"]["second"] == 66.67
    write_outcomes(tmp_path / "c", [answers([1.0])])
    assert main([str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "share no test set: the first has test/, the second test" in capsys.readouterr().err
    assert main([str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
    assert "has no evaluation" in capsys.readouterr().err
