"""gather_negatives: two processes with half a batch each have the gradients of one process with the whole batch."""

import pytest
import torch
from small_models import small_batch, small_model
from torch import distributed, multiprocessing

from model.config import LossWeights
from model.singularity import RandomChoices

WORLD = 2
SETTINGS = {"gather_negatives": True, "loss_weight": LossWeights(mlm=0.0)}


def learn(rows, negatives):
    """Losses and gradients of a model on `rows` of a batch of six, of which two show one visual."""
    model = small_model(**SETTINGS)
    images, ids, mask, _ = small_batch(pairs=6)
    idx = torch.tensor([0, 1, 2, 3, 1, 5])
    batch = images[rows], ids[rows], mask[rows], idx[rows]
    losses = model(*batch, RandomChoices(*(each[rows] for each in negatives)))
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


NEGATIVES = torch.tensor([5, 3, 4, 2, 0, 1]), torch.tensor([2, 5, 3, 4, 3, 0])


def work(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    losses, gradients = learn(slice(3 * rank, 3 * rank + 3), NEGATIVES)
    for each in [*losses.values(), *gradients.values()]:
        distributed.all_reduce(each)
        each /= WORLD  # as data-parallel training does
    model = small_model(**SETTINGS)
    images, ids, mask, _ = small_batch(pairs=6)
    drawn = model(images[:3], ids[:3], mask[:3], torch.arange(3) + 3 * rank)  # choices of its own
    if rank == 0:
        torch.save((losses, gradients, drawn), f"{folder}/seen.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_process_with_the_whole_batch(tmp_path):
    multiprocessing.spawn(work, (tmp_path,), nprocs=WORLD)
    losses, gradients, drawn = torch.load(tmp_path / "seen.pt")
    expected_losses, expected = learn(slice(0, 6), NEGATIVES)
    for name, loss in expected_losses.items():
        torch.testing.assert_close(losses[name], loss, msg=name)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert all(torch.isfinite(loss) for loss in drawn.values())


def test_a_single_process_gathers_nothing():
    together, _ = learn(slice(0, 6), NEGATIVES)
    alone = small_model(loss_weight=LossWeights(mlm=0.0))
    images, ids, mask, _ = small_batch(pairs=6)
    losses = alone(images, ids, mask, torch.tensor([0, 1, 2, 3, 1, 5]), RandomChoices(*NEGATIVES))
    assert losses["loss_itm"].item() == pytest.approx(together["loss_itm"].item(), rel=1e-5)
