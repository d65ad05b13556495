"""The paper's numbers that stand beside ours in reports: every row, written down a second time from its tables."""

import pytest

from eval.config import EvalConfig
from eval.report.published import all_published, benchmarks, published

RECALLS = ("r1", "r5", "r10")
SETTINGS = {"5M": (False, False), "temporal 5M": (True, False), "17M": (False, False), "temporal 17M": (True, False)}
SETTINGS |= {f"zero-shot {size}": (False, True) for size in ("5M", "17M")}  # (temporal, zero-shot)

# Text to video R@1/5/10: MSRVTT 1k, DiDeMo, ActivityNet val1.
VIDEO = {
    "5M": "36.8/65.9/75.5 47.4/75.2/84.0 43.0/70.6/81.3",
    "temporal 5M": "39.9/67.3/76.0 49.2/77.5/85.4 45.9/73.3/83.8",
    "17M": "41.5/68.7/77.0 53.9/79.4/86.9 47.1/75.5/85.5",
    "temporal 17M": "42.7/69.5/78.1 53.1/79.9/88.1 48.9/77.0/86.3",
    "zero-shot 5M": "28.4/50.2/59.5 36.9/61.1/69.3 30.8/55.9/66.3",
    "zero-shot 17M": "34.0/56.7/66.7 37.1/61.7/69.9 30.6/55.6/66.9",
}
# SSv2-label, SSv2-template.
MOTION = {
    "5M": "36.4/64.9/75.4 42.0/86.2/94.3",
    "temporal 5M": "44.1/73.5/82.2 77.0/98.9/99.4",
    "temporal 17M": "47.4/75.9/84.0 77.6/96.0/98.9",
}
# Text then image retrieval: COCO 5k, Flickr30k 1k.
IMAGES = {
    "5M": "71.9/90.8/95.4 54.6/80.0/87.8 93.3/99.4/99.8 81.4/95.8/97.9",
    "17M": "77.0/93.7/96.8 59.6/83.4/90.0 96.1/99.8/99.9 84.7/96.8/98.3",
}
# Accuracy: MSRVTT-QA, ActivityNet-QA, MSRVTT-MC; VQA v2 test-dev, test-std.
ANSWERS = {
    "5M": "42.7 41.8 92.0",
    "temporal 5M": "43.3 43.4 92.0",
    "17M": "43.5 43.1 92.1",
    "temporal 17M": "43.9 44.1 93.7",
}
VQA = {"5M": "70.30 70.53", "17M": "73.13 73.27"}
TABLES = [
    (VIDEO, [("msrvtt", "msrvtt_1k_test", "img"), ("didemo", "test", "img"), ("activitynet", "val1", "img")]),
    (MOTION, [("ssv2_label", "val", "img"), ("ssv2_template", "val", "img")]),
    (IMAGES, [(name, "test", side) for name in ("coco", "flickr30k") for side in ("txt", "img")]),
    (ANSWERS, [("msrvtt_qa", "test", ""), ("activitynet_qa", "test", ""), ("msrvtt_mc", "test", "")]),
    (VQA, [("vqa", "test_dev", ""), ("vqa", "test_std", "")]),
]  # fmt: skip


def written_down():
    """{(benchmark, split, pretraining, temporal, zero-shot): {metric: percent}}"""
    rows = {}
    for table, columns in TABLES:
        for setting, text in table.items():
            for (benchmark, split, side), cell in zip(columns, text.split(), strict=True):
                key = (benchmark, split, setting.split()[-1], *SETTINGS[setting])
                names = [f"{side}_{name}" for name in RECALLS] if side else ["overall"]
                values = {name: float(value) for name, value in zip(names, cell.split("/"), strict=True)}
                rows.setdefault(key, {}).update(values)
    return rows


def test_every_row_is_that_of_the_paper():
    found = {}
    for row in all_published():
        values = {name: value for name, value in row.metrics.items() if not name.endswith("mean")}
        found[row.benchmark, row.split, row.pretraining, row.temporal, row.zero_shot] = values
    assert found == written_down()
    assert len(found) == len(all_published()) == 44


def test_test_frames_are_those_of_the_paper():
    frames = {"activitynet": 32, "coco": 1, "flickr30k": 1, "vqa": 1}
    assert all(row.num_frames == frames.get(row.benchmark, 12) for row in all_published())


def test_means_are_added_and_settings_told():
    (row,) = [row for row in published("didemo", "test", zero_shot=False) if row.pretraining == "17M" and row.temporal]
    assert row.title == "Singularity-temporal 17M, fine-tuned"
    assert row.metrics["img_r_mean"] == pytest.approx((53.1 + 79.9 + 88.1) / 3, abs=0.01)
    assert "r_mean" not in row.metrics
    assert [r.title for r in published("msrvtt", "msrvtt_1k_test", zero_shot=True)] == [
        "Singularity 5M, zero-shot",
        "Singularity 17M, zero-shot",
    ]
    coco = published("coco", "test", zero_shot=False)[1].metrics
    assert coco["r_mean"] == pytest.approx((77.0 + 93.7 + 96.8 + 59.6 + 83.4 + 90.0) / 6, abs=0.01)


def test_what_is_not_published_is_empty_or_named():
    assert published("didemo", "val", zero_shot=False) == published(None, "test", zero_shot=True) == []
    with pytest.raises(ValueError, match="benchmark is 'didmo', which has no published numbers: set didemo"):
        EvalConfig(benchmark="didmo")
    assert len(benchmarks()) == 11
