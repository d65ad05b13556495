"""The model for pre-training: shapes, losses, negatives, temporal modules."""

import pytest
import torch
from small_models import CLS, MASK, PAD, VOCAB, small_batch, small_config, small_model

from model.config import TemporalConfig
from model.losses import (
    contrastive_targets,
    mask_tokens,
    matching_loss,
    negative_weights,
    same_visual,
    sample_negatives,
)
from model.singularity import RandomChoices, Singularity
from model.temporal import embeddings_for_frames, resize_embeddings

TOKENS = 17  # [CLS] and 4 x 4 patches


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_encoders_have_the_documented_shapes(kind, frames):
    model = small_model()
    model.config.vision_encoder.type = kind
    model = type(model)(model.config, PAD, CLS, MASK).eval()
    images, ids, mask, _ = small_batch(frames=frames)
    tokens, pooled = model.encode_visual(images)
    states, pooled_text = model.encode_text(ids, mask)
    assert tokens.shape == (4, frames * TOKENS, 48)
    assert pooled.shape == (4, frames, 48)
    assert states.shape == (4, 7, 32)
    assert pooled_text.shape == (4, 32)
    assert model.project_visual(pooled).shape == (4, frames, 16)
    torch.testing.assert_close(model.project_text(pooled_text).norm(dim=-1), torch.ones(4))
    assert model.match_logits(states, mask, tokens).shape == (4, 2)


def test_the_mean_of_a_text_leaves_padding_out_in_training_and_evaluation():
    model = small_model().eval()
    model.config.text_encoder.pooling = "mean"
    images, ids, mask, idx = small_batch()
    states, pooled = model.encode_text(ids, mask)
    for own, length, vector in zip(states, mask.sum(1).tolist(), pooled):
        torch.testing.assert_close(vector, own[:length].mean(0))
    alone = model.encode_text(ids[-1:, :3], mask[-1:, :3])[1]
    torch.testing.assert_close(alone, pooled[-1:])
    assert model.encode_text(ids, torch.zeros_like(mask))[1].isfinite().all()
    seen = []
    model.text_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(images, ids, mask, idx, RandomChoices(masked_ids=ids, labels=torch.full_like(ids, -100)))
    torch.testing.assert_close(seen[0], pooled)


def test_scores_of_a_shared_visual_equal_those_of_single_pairs(model):
    model.eval()
    images, ids, mask, _ = small_batch(pairs=6)
    tokens, _ = model.encode_visual(images[:3])
    states, _ = model.encode_text(ids, mask)
    index = torch.tensor([2, 0, 0, 1, 2, 1])
    one_by_one = model.match_logits(states, mask, tokens[index])
    torch.testing.assert_close(model.match_logits(states, mask, model.visual_keys(tokens), index), one_by_one)
    grouped = model.match_logits(states, mask, tokens)  # row g·3 + n looks at visual n
    torch.testing.assert_close(grouped, model.match_logits(states, mask, tokens.repeat(2, 1, 1)))


def test_every_used_parameter_has_a_gradient(model, batch):
    sum(model(*batch).values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["temporal_embeddings"]


def test_losses_fall_on_a_repeated_batch():
    model, batch = small_model(), small_batch(pairs=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(120):
        torch.manual_seed(step)
        losses = model(*batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    assert history[-1]["loss_itc"] < 0.1
    assert sum(h["loss_itm"] for h in history[-5:]) / 5 < 0.2
    assert sum(h["loss_mlm"] for h in history[-5:]) < sum(h["loss_mlm"] for h in history[:5]) / 2


def test_random_choices_follow_the_seed_or_are_given(model, batch):
    _, ids, _, _ = batch
    turned = torch.tensor([1, 2, 3, 0])
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    choices = RandomChoices(turned, turned, ids, labels)
    torch.manual_seed(5)
    sampled = model(*batch)
    torch.manual_seed(5)
    assert all(torch.equal(loss, sampled[name]) for name, loss in model(*batch).items())
    state = torch.get_rng_state()
    first = model.eval()(*batch, choices)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["loss_itm"], model(*batch, choices)["loss_itm"])


def test_the_temperature_is_clamped_in_training_only(model, batch):
    images, ids, mask, _ = batch
    with torch.no_grad():
        model.temp.fill_(3.0)
        model.encode_visual(images)
        model.similarity(*(model.encode_visual(images)[1], model.encode_text(ids, mask)[1]))
        assert float(model.temp) == 3.0
        model(*batch)
    assert float(model.temp) == pytest.approx(0.5)


def test_negatives_never_show_the_same_item_and_follow_the_similarity():
    idx = torch.tensor([1, 1, 2, 3, 3, 3])
    assert contrastive_targets(idx[:3]).tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    torch.manual_seed(0)
    weights = negative_weights(torch.randn(6, 6) * 5, same_visual(idx), hard=True)
    for _ in range(200):
        assert not (idx[sample_negatives(weights)] == idx).any()
    other = same_visual(torch.arange(3))
    weights = negative_weights(torch.tensor([[0.0, 1.0, 0.0]]).repeat(3, 1), other, hard=True)
    sampled = torch.stack([sample_negatives(weights) for _ in range(4000)])
    assert (sampled[:, 0] == 1).float().mean() == pytest.approx(torch.e / (torch.e + 1), abs=0.03)
    underflow = negative_weights(torch.tensor([[1000.0, 0.0, 0.0]] * 3), other, hard=True)
    assert underflow[0].tolist() == [0.0, 1.0, 1.0]


def test_rows_without_candidates_are_left_out_of_the_matching_loss(model):
    images, ids, mask, _ = small_batch()
    losses = model.eval()(images, ids, mask, torch.zeros(4, dtype=torch.long))
    tokens, _ = model.encode_visual(images)
    logits = model.match_logits(model.encode_text(ids, mask)[0], mask, tokens)
    expected = torch.nn.functional.cross_entropy(logits, torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(losses["loss_itm"], expected)
    assert torch.isfinite(matching_loss(torch.randn(9, 2), torch.tensor([True, False, True])))


def test_masked_words_keep_the_published_shares():
    torch.manual_seed(0)
    ids = torch.randint(5, VOCAB, (400, 50))
    ids[:, 0], ids[:, -5:] = CLS, PAD
    masked, labels = mask_tokens(ids, 0.5, VOCAB, MASK, (PAD, CLS))
    chosen = labels != -100
    assert not chosen[:, 0].any()
    assert not chosen[:, -5:].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert chosen[:, 1:-5].float().mean() == pytest.approx(0.5, abs=0.02)
    assert (masked[chosen] == MASK).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (masked[chosen] == ids[chosen]).float().mean() == pytest.approx(0.1, abs=0.02)


def test_temporal_embeddings_are_cut_interpolated_and_extended():
    table = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    assert embeddings_for_frames(table, 1).flatten().tolist() == [1.0]
    assert embeddings_for_frames(table, 4).flatten().tolist() == [1.0, 1.5, 2.5, 3.0]
    assert resize_embeddings(table, 4).flatten().tolist() == [1.0, 3.0, 0.0, 0.0]
    assert resize_embeddings(table, 1).flatten().tolist() == [1.0]


def test_frames_are_related_only_by_the_temporal_encoder():
    images, *_ = small_batch(frames=3)
    swapped = images[:, [1, 0, 2]]
    plain = small_model().eval()
    torch.testing.assert_close(plain.encode_visual(images)[1][:, 2], plain.encode_visual(swapped)[1][:, 2])
    assert torch.equal(plain.encode_visual(images)[0][:, -TOKENS:], plain.encode_visual(swapped)[0][:, -TOKENS:])
    temporal = small_model(
        temporal_vision_encoder=TemporalConfig(enable=True, update_pooler_embed=True),
        add_temporal_embed=True,
        num_frames=3,
    ).eval()
    with torch.no_grad():
        temporal.temporal_embeddings.normal_()
    first, second = temporal.encode_visual(images), temporal.encode_visual(swapped)
    assert not torch.allclose(first[0][:, -TOKENS:], second[0][:, -TOKENS:], rtol=0, atol=1e-3)
    assert not torch.allclose(first[1][:, 2], second[1][:, 2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_a_model_for_three_frames_takes_any_number(frames):
    model = small_model(num_frames=3, add_temporal_embed=True, temporal_vision_encoder=TemporalConfig(enable=True))
    losses = model(*small_batch(frames=frames))
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_bfloat16_weights_train_with_float32_losses(kind, batch):
    config = small_config()
    config.vision_encoder.type = kind
    model = Singularity(config, PAD, CLS, MASK)
    for parameter in model.parameters():  # as DeepSpeed does it: not the buffers
        parameter.data = parameter.data.bfloat16()
    losses = model(*batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("section", "name", "value", "named"),
    [
        ("vision_encoder", "type", "beat", "one of beit, .*the name of another"),
        ("vision_encoder", "heads", 5, "vision_encoder.heads"),
        ("text_encoder", "fusion_layer", 9, "fusion_layer"),
        ("text_encoder", "heads", 5, "text_encoder"),
        (None, "image_res", 33, "image_res"),
        (None, "num_frames", 0, "num_frames"),
    ],
)
def test_incompatible_sizes_are_errors(section, name, value, named):
    config = small_model().config
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(ValueError, match=named):
        type(small_model())(config)
