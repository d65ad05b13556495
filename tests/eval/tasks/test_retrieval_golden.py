"""Score matrices and metrics of the official retrieval evaluation, reproduced from its checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from places import SHARED

from eval.config import EvalConfig
from eval.features import collect_visuals, encode_blocks, encode_texts
from eval.metrics import retrieval_metrics
from eval.tasks.retrieval import score
from model.checkpoints.loading import load_model
from model.config import ENSEMBLES

GOLDEN = SHARED / "golden" / "05_ret_eval"
CASES = json.loads((GOLDEN / "expected.json").read_text()) if GOLDEN.is_dir() else {}
STEMS = [name.removesuffix("_metrics") for name in CASES if name.endswith("_metrics")]

pytestmark = pytest.mark.shared


def config_of(stem):
    case = json.loads((GOLDEN / "case.json").read_text())
    k_test = case["k_small"] if "ksmall_" in stem else 10_000 if "full_" in stem else case["k_test"]
    ensemble = next((mode for mode in ENSEMBLES if stem.endswith(mode)), "concat")
    return EvalConfig(k_test=k_test, eval_frame_ensemble=ensemble, eval_x_only="xonly" in stem, pair_batch_size=40)


def scores_of(stem):
    prefix = "multiimg_" if stem.startswith("multiimg_") else ""
    model = load_model(GOLDEN / "ckpt.pth")
    expected = np.load(GOLDEN / "expected.npz")
    clips = [int(Path(name).stem.removeprefix("vid")) for name in CASES[f"{prefix}dataset"]["image"]]
    frames = torch.from_numpy(np.load(GOLDEN / "inputs.npz")["frames"])[clips]
    batches = [(frames[:5], torch.arange(5)), (frames[5:], torch.arange(5, len(frames)))]
    ids, mask = (torch.from_numpy(expected[f"{prefix}text_{name}"]) for name in ("input_ids", "attention_mask"))
    config = config_of(stem)
    with torch.inference_mode():
        visuals = collect_visuals(model, encode_blocks(model, batches, config), len(frames), config)
        scores = score(model, visuals, encode_texts(model, ids, mask), config)
    return scores, expected


def as_lists(mapping):
    return [value if isinstance(value, list) else [value] for value in (mapping[str(i)] for i in range(len(mapping)))]


@pytest.mark.parametrize("stem", STEMS)
def test_official_scores_and_metrics(stem):
    scores, expected = scores_of(stem)
    close = {"rtol": 1e-4, "atol": 2e-4}
    np.testing.assert_allclose(scores.visual_to_text, expected[f"{stem}_i2t_x"], **close)
    np.testing.assert_allclose(scores.text_to_visual, expected[f"{stem}_t2i_x"], **close)
    np.testing.assert_allclose(scores.similarity, expected[f"{stem}_i2t_emb"], **close)
    np.testing.assert_allclose(scores.similarity.T, expected[f"{stem}_t2i_emb"], **close)

    dataset = CASES["multiimg_dataset" if stem.startswith("multiimg_") else "dataset"]
    truth = as_lists(dataset["img2txt"]), as_lists(dataset["txt2img"])
    official = CASES[f"{stem}_metrics"]
    matched = retrieval_metrics(scores.visual_to_text, scores.text_to_visual, *truth)
    assert bool(matched.depends_on_ties) == official["depends_on_ties"]
    assert matched.best == official["cross_encoder_best_ties"]
    assert matched.worst == official["cross_encoder_worst_ties"]
    if not official["depends_on_ties"]:
        assert matched.values == official["cross_encoder"]
    assert retrieval_metrics(scores.similarity, scores.similarity.T, *truth).values == official["dual_encoder"]


@pytest.mark.skipif(not CASES, reason="no golden cases beside the checkout")
def test_official_exhaustive_matching():
    scores, expected = scores_of("xonly")
    np.testing.assert_allclose(scores.visual_to_text, expected["xonly_i2t_x"], rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(scores.text_to_visual, expected["xonly_t2i_x"], rtol=1e-4, atol=2e-4)
