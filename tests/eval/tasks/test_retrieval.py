"""Retrieval evaluation: equal to scoring pair by pair, whatever the batch size, the ranks and the broken samples."""

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.config import EvalConfig
from eval.tasks.retrieval import RetrievalTask
from loaders.config import PerMedia
from model.config import TemporalConfig
from preprocessing.normalization import normalize
from runtime.ranks import ALONE, Ranks
from tests.eval.small import Drawn, Words, small_model

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def evaluate(model, dataset, config, ranks=ALONE):
    return RetrievalTask().evaluate(model, dataset, Words(), config, 2, ranks)


@torch.inference_mode()
def pair_by_pair(model, dataset):
    """Dual-encoder and match scores (N, M), one clip and one text at a time, texts padded to the full length."""
    similarity, matched = (np.zeros((dataset.num_visuals, len(dataset.texts))) for _ in range(2))
    ids, mask = Words().encode(dataset.texts, 12)
    texts = [model.encode_text(ids[m, None], mask[m, None]) for m in range(len(ids))]
    for n in range(dataset.num_visuals):
        tokens, pooled = model.encode_visual(normalize(dataset.pixels[n, None], model.mean, model.std))
        for m, (states, first) in enumerate(texts):
            similarity[n, m] = model.project_visual(pooled).mean(1)[0] @ model.project_text(first)[0]
            matched[n, m] = model.match_logits(states, mask[m, None], tokens)[0, 1]
    return similarity, matched


def reranked_by(scores, similarity, k):
    expected = np.full(similarity.shape, -100.0)
    for row, candidates in enumerate(np.argsort(-similarity, axis=1, kind="stable")[:, :k]):
        expected[row, candidates] = scores[row, candidates]
    return expected


def reranked(similarity, matched, k):
    return reranked_by(matched, similarity, k)


def test_scores_equal_those_of_single_pairs():
    model, dataset = small_model(), Drawn()
    similarity, matched = pair_by_pair(model, dataset)
    result = evaluate(model, dataset, EvalConfig(k_test=4, pair_batch_size=24, batch_size_test=PerMedia(4, 4)))
    np.testing.assert_allclose(result.scores.similarity, similarity, **TOLERANCE)
    np.testing.assert_allclose(result.scores.visual_to_text, reranked(similarity, matched, 4), **TOLERANCE)
    np.testing.assert_allclose(result.scores.text_to_visual, reranked(similarity.T, matched.T, 4), **TOLERANCE)
    assert set(result.metrics) == {"drawn/", "drawn_emb/"}
    every_pair = evaluate(model, dataset, EvalConfig(k_test=2, eval_x_only=True))
    np.testing.assert_allclose(every_pair.scores.visual_to_text, matched, **TOLERANCE)
    np.testing.assert_allclose(every_pair.scores.text_to_visual, matched.T, **TOLERANCE)
    dual_encoder = evaluate(model, dataset, EvalConfig(k_test=0))
    assert set(dual_encoder.metrics) == {"drawn_emb/"}
    assert dual_encoder.scores.visual_to_text is None


def test_the_joint_score_adds_the_odds_of_a_match_to_the_dual_encoder():
    model, dataset = small_model(), Drawn()
    similarity, matched = pair_by_pair(model, dataset)
    config = EvalConfig(k_test=4, rerank_score="itm+itc")
    with torch.no_grad():
        model.itm_head.weight[0], model.itm_head.bias[0] = -model.itm_head.weight[1], -model.itm_head.bias[1]
        joint = similarity + model.temp.item() * 2 * matched  # the odds are twice the logit
        result = evaluate(model, dataset, config)
        np.testing.assert_allclose(result.scores.visual_to_text, reranked_by(joint, similarity, 4), **TOLERANCE)
        np.testing.assert_allclose(result.scores.text_to_visual, reranked_by(joint.T, similarity.T, 4), **TOLERANCE)
        model.itm_head.weight.zero_()
        untrained = evaluate(model, dataset, replace(config, k_test=1000))
    assert untrained.metrics["drawn/"] == untrained.metrics["drawn_emb/"]
    assert evaluate(model, dataset, EvalConfig(k_test=1000)).metrics["drawn/"] != untrained.metrics["drawn_emb/"]


@pytest.mark.parametrize("ensemble", ["concat", "mean", "max", "lse"])
def test_results_do_not_depend_on_batch_sizes_nor_on_where_tokens_are_kept(ensemble):
    model, dataset = small_model(), Drawn()
    config = EvalConfig(k_test=5, eval_frame_ensemble=ensemble)
    first = evaluate(model, dataset, replace(config, pair_batch_size=10_000, batch_size_test=PerMedia(64, 64)))
    second = evaluate(
        model, dataset, replace(config, pair_batch_size=1, batch_size_test=PerMedia(3, 3), eval_offload=True)
    )
    assert first.metrics == second.metrics
    np.testing.assert_allclose(first.scores.text_to_visual, second.scores.text_to_visual, **TOLERANCE)


def test_late_fusion_combines_scores_of_single_frames():
    model, dataset = small_model(), Drawn()
    config = EvalConfig(eval_x_only=True)
    frames = []
    for t in range(2):
        single = Drawn()
        single.pixels = single.pixels[:, t : t + 1]
        frames.append(torch.from_numpy(evaluate(model, single, config).scores.visual_to_text))
    both = torch.stack(frames)
    for ensemble, expected in (("mean", both.mean(0)), ("max", both.amax(0)), ("lse", both.logsumexp(0))):
        result = evaluate(model, dataset, replace(config, eval_frame_ensemble=ensemble))
        np.testing.assert_allclose(result.scores.visual_to_text, expected, **TOLERANCE)


def test_late_fusion_of_a_temporal_model_is_refused_unless_asked_for():
    for changes in (
        {"temporal_vision_encoder": TemporalConfig(enable=True, num_layers=1), "num_frames": 2},
        {"add_temporal_embed": True, "num_frames": 2},
    ):
        model = small_model(**changes)
        with pytest.raises(ValueError, match=r"eval_frame_ensemble=mean .*=concat"):
            evaluate(model, Drawn(), EvalConfig(eval_frame_ensemble="mean"))
        evaluate(model, Drawn(), EvalConfig(eval_frame_ensemble="mean", ensemble_skips_temporal=True))


def test_a_broken_clip_is_named_counts_as_wrong_and_moves_nothing_else():
    model = small_model()
    config = EvalConfig(k_test=5)
    whole, broken = Drawn(shared=False), Drawn(shared=False, broken=(5,))
    first, second = evaluate(model, whole, config), evaluate(model, broken, config)
    assert second.missing == {5: "truncated JPEG"}
    others = [i for i in range(whole.num_visuals) if i != 5]
    np.testing.assert_allclose(first.scores.visual_to_text[others], second.scores.visual_to_text[others], **TOLERANCE)
    assert np.isneginf(second.scores.text_to_visual[:, 5]).all()
    every_pair = evaluate(model, broken, replace(config, eval_x_only=True))
    count = sum(len(texts) for texts in whole.texts_of_visual)
    assert every_pair.metrics["drawn/"]["img_r10"] <= 100 * (count - len(whole.texts_of_visual[5])) / count + 0.01


def test_the_model_is_left_as_it_was():
    model = small_model().train()
    evaluate(model, Drawn(), EvalConfig(k_test=2))
    assert model.training
    assert not any(parameter.is_inference() for parameter in model.parameters())


def _one_rank(rank, world_size, meeting, config, dataset, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world_size)
    result = evaluate(small_model(), dataset, config, Ranks(rank, world_size))
    results.put((rank, result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_processes(world_size, meeting, config, dataset):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.eval.tasks.test_retrieval"])
    results = context.Queue()
    processes = [
        context.Process(target=_one_rank, args=(rank, world_size, meeting, config, dataset, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    return found


@pytest.mark.parametrize(("world_size", "visuals"), [(2, 13), (3, 2)])
def test_any_number_of_processes_gives_the_same_result(world_size, visuals, tmp_path):
    config = EvalConfig(k_test=5, batch_size_test=PerMedia(4, 4), pair_batch_size=32)
    dataset = Drawn(visuals, shared=visuals > 2, broken=(4,))
    alone = evaluate(small_model(), dataset, config)
    ranks = in_processes(world_size, tmp_path / "meeting", config, dataset)
    assert len(ranks) == world_size
    for rank, result in ranks.items():
        assert result.metrics == alone.metrics
        assert result.missing == alone.missing == ({4: "truncated JPEG"} if visuals > 4 else {})
        assert (result.scores is None) == (rank > 0)
    for name in ("similarity", "visual_to_text", "text_to_visual"):
        np.testing.assert_allclose(getattr(ranks[0].scores, name), getattr(alone.scores, name), **TOLERANCE)
