"""Copies of a batch to a device, and the normalisation of its pixels."""

import numpy as np
import pytest
import torch

from loaders.batch import Answers, Batch, copied
from preprocessing.normalization import normalize


class Recorded:
    """A tensor's part in a copy, where there is no GPU: what was done to it, in order."""

    def __init__(self, device, pinned=False):
        self.device, self.pinned, self.done = torch.device(device), pinned, []

    def is_pinned(self):
        return self.pinned

    def contiguous(self):
        self.done.append("contiguous")
        return self

    def pin_memory(self):
        self.done.append("pin")
        return self

    def to(self, device, non_blocking):
        self.done.append(("copy", str(device), non_blocking))
        return self


@pytest.mark.parametrize(
    ("tensor", "device", "done"),
    [
        (Recorded("cpu"), "cuda:1", ["contiguous", "pin", ("copy", "cuda:1", True)]),
        (Recorded("cpu", pinned=True), "cuda:1", [("copy", "cuda:1", True)]),
        (Recorded("cuda:1"), "cuda:1", [("copy", "cuda:1", True)]),  # DALI's
        (Recorded("cpu"), "cpu", [("copy", "cpu", True)]),
    ],
    ids=["pageable", "pinned", "there", "no GPU"],
)
def test_copies_to_a_gpu_come_from_pinned_memory(tensor, device, done):
    assert copied(tensor, torch.device(device)) is tensor
    assert tensor.done == done


@pytest.mark.parametrize(
    "rows", [slice(1, 3), slice(None, 2), slice(1, None), slice(-1, None), slice(3, 9), slice(2, 1)]
)
def test_rows_of_answers_are_those_of_the_questions(rows):
    counts = [2, 1, 3]
    owners = torch.arange(3).repeat_interleave(torch.tensor(counts))  # the question of each answer
    some = Answers(owners[:, None], owners[:, None], owners.float(), torch.tensor(counts)).rows(rows)
    expected = torch.arange(3)[rows].repeat_interleave(torch.tensor(counts)[rows])
    assert some.weights.tolist() == some.input_ids[:, 0].tolist() == expected.tolist()
    assert some.per_question.tolist() == counts[rows]


def test_a_batch_iscopied_with_its_answers():
    ids = torch.ones(2, 3, dtype=torch.long)
    answers = Answers(ids, ids, torch.ones(2), torch.tensor([1, 1]))
    frames = torch.zeros(2, 1, 4, 4, 3, dtype=torch.uint8)
    batch = Batch("image", 0, 0, frames, ids, ids, torch.arange(2), ("a", "b"), answers).to("meta")
    tensors = [batch.frames, batch.input_ids, batch.attention_mask, batch.idx, *vars(batch.answers).values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.keys == ("a", "b")


@pytest.mark.parametrize("rows", [slice(None, 2), slice(1, None), slice(-2, None), slice(0, 0), slice(1, 9)])
def test_rows_of_a_batch_have_their_own_answers(rows: slice):
    ids, counts = torch.arange(6)[:, None], [1, 2, 3]
    answers = Answers(ids, torch.ones_like(ids), torch.arange(6.0), torch.tensor(counts)).rows(rows)
    owners = [question for question, count in enumerate(counts) for _ in range(count)]
    expected = [answer for answer, owner in enumerate(owners) if owner in range(3)[rows]]
    assert answers.input_ids[:, 0].tolist() == answers.weights.tolist() == expected
    assert answers.per_question.tolist() == counts[rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_follows_the_formula(dtype):
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4, 3), np.uint8))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    with torch.inference_mode():  # what is kept must serve training afterwards
        normalize(frames, mean, std, dtype)
    found = normalize(frames, mean, std, dtype)
    assert found.shape == (2, 3, 3, 5, 4)
    assert not found.is_inference()
    expected = (frames.permute(0, 1, 4, 2, 3) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
