"""`benchmarks/training.py`: the warm-up of a compiled model covers every text length."""

import torch

from benchmarks.training import of_each_length
from loaders.batch import Batch
from train.step import without_padding


def padded(*lengths, longest):
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    count = len(lengths)
    frames = torch.zeros(count, 1, 2, 2, 3, dtype=torch.uint8)
    return Batch("image", 0, 0, frames, mask * 7, mask, torch.arange(count), ("key",) * count)


def test_a_batch_is_truncated_to_every_text_length_of_a_run():
    for longest in (20, 32):
        cut = of_each_length(padded(3, 12, longest=longest))
        shapes = {tuple(batch.input_ids.shape) for batch in cut}
        assert shapes == {tuple(batch.attention_mask.shape) for batch in cut}
        assert shapes == {
            tuple(without_padding(padded(2, length, longest=longest)).input_ids.shape)
            for length in range(1, longest + 1)
        }
