"""Texts of a step are as long as its longest one needs, and that changes no loss."""

import torch

from loaders.batch import Batch
from model.building import build_model
from model.config import ModelConfig, TextConfig, VisionConfig
from model.singularity import RandomChoices
from train.step import TEXT_LENGTHS, without_padding


def batch_of(lengths, padded_to):
    """Texts of `lengths` tokens, no pixels that matter."""
    mask = (torch.arange(padded_to)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    ids[:, 0] = 2
    frames, idx = torch.zeros(len(lengths), 1, 32, 32, 3, dtype=torch.uint8), torch.arange(len(lengths))
    return Batch("image", 0, 0, frames, ids, mask, idx, tuple(map(str, lengths)))


def test_losses_and_gradients_are_those_of_padded_texts():
    config = ModelConfig(
        vision_encoder=VisionConfig(type="vit", width=32, depth=2, heads=2),
        text_encoder=TextConfig(vocab_size=60, width=32, layers=4, fusion_layer=2, heads=2, intermediate=64),
        image_res=32,
    )
    torch.manual_seed(0)
    model = build_model(config).eval()
    whole, found = batch_of([5, 3, 7], 24), []
    pixels = torch.randn(3, 1, 3, 32, 32)
    chosen = (torch.arange(24)[None] == torch.tensor([[2], [1], [5]])).long()
    cut = without_padding(whole)
    assert cut.input_ids.shape == cut.attention_mask.shape == (3, TEXT_LENGTHS)
    assert cut.input_ids.is_contiguous()
    assert cut.attention_mask.sum(1).tolist() == [5, 3, 7]
    assert without_padding(batch_of([17, 4], 20)).input_ids.shape == (2, 20)
    for batch in (whole, cut):
        ids = batch.input_ids
        here = chosen[:, : ids.shape[1]].bool()
        negatives = torch.tensor([1, 2, 0])
        choices = RandomChoices(negatives, negatives, ids.masked_fill(here, 4), ids.masked_fill(~here, -100))
        model.zero_grad()
        losses = model(pixels, ids, batch.attention_mask, batch.idx, choices)
        torch.stack(list(losses.values())).sum().backward()
        found.append((losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    assert found[1][0].keys() == {"loss_itc", "loss_itm", "loss_mlm"}
    for name, loss in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], loss)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
