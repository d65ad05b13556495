"""Batched scores of pairs for re-ranking, and of answers, equal those of one pair at a time."""

import numpy as np
import pytest
import torch
from small_models import CLS, MASK, PAD, VOCAB, small_batch, small_config, small_model

from model.config import ENSEMBLES, AnswerDecoderConfig, LossWeights, TemporalConfig
from model.scoring import GROUP, combine, group_pairs, match_pairs
from model.singularity import Singularity
from model.vqa import SingularityQA


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("pairs_at_once", [1, 40, 512])
def test_batched_scores_equal_those_of_single_pairs(ensemble, pairs_at_once):
    model = small_model().eval()
    images, ids, mask, _ = small_batch(pairs=5, frames=3)
    marked = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)).numpy() < 0.5
    with torch.no_grad():
        states, _ = model.encode_text(ids, mask)
        attended = model.text_encoder.attend_texts(states, mask)
        tokens, pooled = model.clip_tokens(images, ensemble)
        assert tokens.shape[1] == (1 if ensemble == "concat" else 3)
        assert pooled.shape == (5, 3, 48)
        blocks = [(np.array([0, 3]), tokens[[0, 3]]), (np.array([1, 2, 4]), tokens[[1, 2, 4]])]
        found = match_pairs(model, blocks, attended, mask, marked, ensemble, pairs_at_once)
        assert sorted(zip(*(part.tolist() for part in found[:2]))) == list(zip(*(i.tolist() for i in marked.nonzero())))
        nothing = match_pairs(model, blocks, attended, mask, np.zeros_like(marked), ensemble, pairs_at_once)
        assert [part.shape for part in nothing] == [(0,)] * 3
        for visual, text, score in zip(*(part.tolist() for part in found)):
            frames = [
                model.match_logits(states[text, None], mask[text, None], tokens[visual, None, f])[0, 1]
                for f in range(tokens.shape[1])
            ]
            torch.testing.assert_close(torch.tensor(score), combine(torch.stack(frames), ensemble))


def test_groups_contain_every_pair_once():
    rng = np.random.default_rng(0)
    pairs = rng.random((6, 40)) < 0.3
    pairs[2] = False
    lengths = rng.integers(1, 20, 40)
    groups = group_pairs(pairs, lengths)
    visuals = np.broadcast_to(groups.visuals[:, None], groups.texts.shape)
    found = sorted(zip(visuals[groups.real].tolist(), groups.texts[groups.real].tolist()))
    assert found == sorted(zip(*(axis.tolist() for axis in np.nonzero(pairs))))
    assert groups.texts.shape[1] == GROUP
    assert (np.diff(groups.longest) >= 0).all()
    assert group_pairs(np.zeros((3, 40), dtype=bool), lengths).texts.shape == (0, GROUP)


@pytest.mark.parametrize("fusion_layer", [1, 2, 3])
def test_fuse_pairs_gives_the_first_token_of_fuse(fusion_layer):
    config = small_config()
    config.text_encoder.layers, config.text_encoder.fusion_layer = 3, fusion_layer
    torch.manual_seed(0)
    model = Singularity(config, PAD, CLS, MASK).eval()
    images, ids, mask, _ = small_batch(pairs=5)
    index = torch.tensor([3, 0, 4, 4, 1])
    with torch.no_grad():
        states, _ = model.encode_text(ids, mask)
        keys = model.visual_keys(model.encode_visual(images)[0])
        for where in (None, index):
            whole = model.text_encoder.fuse(states, mask, keys, where)
            attended = model.text_encoder.attend_texts(states, mask)
            first, _ = model.text_encoder.fuse_pairs(attended, mask, keys, where)
            torch.testing.assert_close(first, whole[:, 0])


def test_late_fusion_of_a_temporal_model_is_refused_by_default():
    model = small_model(temporal_vision_encoder=TemporalConfig(enable=True)).eval()
    images = small_batch(frames=2)[0]
    with pytest.raises(ValueError, match="use eval_frame_ensemble=concat"):
        model.clip_tokens(images, "mean")
    with pytest.raises(ValueError, match="'median': must be one of concat, mean, max, lse"):
        model.clip_tokens(images, "median")
    torch.testing.assert_close(model.clip_tokens(images, "mean", skip_temporal=True), model.encode_frames(images))


@pytest.fixture
def answering():
    torch.manual_seed(0)
    config = small_config(answer_decoder=AnswerDecoderConfig(True, 2), loss_weight=LossWeights(mlm=0.0))
    return SingularityQA(config, PAD, CLS, MASK)


def answers_of_questions():
    """Six answers (6, 4) of three questions: ids, mask, weights, and how many belong to each question."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCAB, (6, 4), generator=generator)
    ids[:, 0], ids[::2, 3] = CLS, PAD
    weights = torch.tensor([1.0, 0.5, 0.5, 0.2, 0.3, 0.5])
    return ids, (ids != PAD).long(), weights, torch.tensor([1, 2, 3])


def test_the_answer_loss_is_the_weighted_sum_over_a_batch(answering):
    images, ids, mask, _ = small_batch(pairs=3)
    answers, answer_mask, weights, counts = answers_of_questions()
    together = answering(images, ids, mask, answers, answer_mask, weights, counts)["loss_qa"]
    apart, first = 0.0, 0
    for b, count in enumerate(counts.tolist()):
        own = slice(first, first + count)
        one = answering(
            images[b, None], ids[b, None], mask[b, None], answers[own], answer_mask[own], weights[own], counts[b, None]
        )
        apart, first = apart + one["loss_qa"] / 3, first + count
    torch.testing.assert_close(together, apart)
    together.backward()


def test_the_answer_decoder_is_causal(answering):
    images, ids, mask, _ = small_batch(pairs=6)
    answers, answer_mask, _, _ = answers_of_questions()
    answering.eval()
    with torch.no_grad():
        keys = answering.answer_decoder.project(answering.frame_states(answering.clip_tokens(images)[0], ids, mask)[0])
        first = answering.answer_decoder(answers, answer_mask, keys, mask)
        changed = answers.clone()
        changed[:, 2] = 7
        second = answering.answer_decoder(changed, answer_mask, keys, mask)
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2], second[:, 2], atol=1e-3)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_ranked_answers_are_distinct_and_in_order(answering, ensemble):
    answering.eval()
    images, ids, mask, _ = small_batch(pairs=3, frames=2)
    answers, answer_mask, _, _ = answers_of_questions()
    with torch.no_grad():
        states = answering.frame_states(answering.clip_tokens(images, ensemble)[0], ids, mask)
        numbers, probabilities = answering.rank_answers(states, mask, answers, answer_mask, 4, ensemble)
    assert numbers.shape == probabilities.shape == (3, 4)
    assert all(len(set(row)) == 4 for row in numbers.tolist())
    assert (probabilities.diff(dim=1) <= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


def test_training_ranks_the_right_answer_first(answering):
    images, ids, mask, _ = small_batch(pairs=3)
    answers, answer_mask, _, _ = answers_of_questions()
    right = torch.tensor([1, 3, 5])
    optimizer = torch.optim.AdamW(answering.parameters(), lr=3e-3)
    for _ in range(40):
        loss = answering(images, ids, mask, answers[right], answer_mask[right], torch.ones(3), torch.ones(3).long())
        optimizer.zero_grad()
        loss["loss_qa"].backward()
        optimizer.step()
    answering.eval()
    with torch.no_grad():
        states = answering.frame_states(answering.clip_tokens(images)[0], ids, mask)
        numbers, _ = answering.rank_answers(states, mask, answers, answer_mask, 6)
    assert torch.equal(numbers[:, 0], right)


def test_scores_of_a_half_precision_model_do_not_tie():
    """A text and 400 visuals: of the 256 numbers that bf16 has between 1 and 2, scores would take a few dozen."""
    model = small_model().eval()
    visuals = torch.randn(400, 4, 48)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        with torch.no_grad():
            states, _ = model.encode_text(torch.tensor([[CLS, 7, 9]]), torch.ones(1, 3, dtype=torch.long))
            mask = torch.ones(400, 3, dtype=torch.long)
            found[dtype] = model.match_logits(states.expand(400, -1, -1), mask, visuals.to(dtype))
    assert found[torch.bfloat16].dtype == torch.float32
    ties = {dtype: 400 - len(logits[:, 1].unique()) for dtype, logits in found.items()}
    assert ties[torch.bfloat16] <= ties[torch.float32] + 4, ties


def test_answers_of_a_half_precision_model_are_scored_in_float32():
    """What bf16 weights say of bf16 states, without rounding the 60 logits of each word to 8 bits."""
    torch.manual_seed(0)
    model = SingularityQA(small_config(answer_decoder=AnswerDecoderConfig(enable=True, num_layers=1)), PAD, CLS, MASK)
    torch.nn.init.normal_(model.answer_decoder.embeddings.word_embeddings.weight)
    model.eval().to(torch.bfloat16)
    head, words = model.answer_decoder.word_head, model.answer_decoder.embeddings.word_embeddings.weight
    seen, states = [], torch.randn(300, 6, 32, dtype=torch.bfloat16)
    head.transform.register_forward_hook(lambda *call: seen.append(call[-1].double()))
    mask, answers = torch.ones(300, 6, dtype=torch.long), torch.tensor([[CLS, 8, 9, 3]]).expand(300, -1)
    with torch.no_grad():
        keys = model.answer_decoder.project(states)
        losses = model._losses(answers, torch.ones_like(answers), keys, mask)
        opening = model.first_token_probabilities([keys], mask, CLS, "concat")
        whole, first = (each @ words.double().T + head.bias.double() for each in seen)
    expected = -whole.log_softmax(-1)[:, :-1].gather(2, answers[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(opening.double(), first[:, 0].softmax(-1), rtol=1e-5, atol=1e-7)
    assert not torch.backends.cuda.matmul.allow_tf32
