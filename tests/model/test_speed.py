"""What makes a step fast: one graph, no waiting for the device, shared work done once; and it changes no number."""

import pytest
import torch
from small_models import CLS, MASK, PAD, VOCAB, small_batch, small_config, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.config import AnswerDecoderConfig, LossWeights, TemporalConfig
from model.flops import step_flops
from model.losses import IGNORED, masked_positions, max_masked
from model.vqa import SingularityQA

TEMPORAL = {"temporal_vision_encoder": TemporalConfig(True, 1, True), "num_frames": 2, "add_temporal_embed": True}
# Operators whose result's size or value the host has to know, so that on a GPU it waits.
WAITING = {
    "aten._local_scalar_dense.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten.masked_select.default",
    "aten.multinomial.default",
    "aten.nonzero.default",
    "aten.unique_dim.default",
    "aten._unique2.default",
}


class Watch(TorchDispatchMode):
    """Collects the operators that run, and boolean indexing, which hides a nonzero."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        if str(function).startswith(("aten.index.", "aten.index_put")):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "boolean index"
        return function(*args, **(kwargs or {}))


def answering_batch():
    """A small model that answers questions, and what its step takes: six answers of three questions."""
    torch.manual_seed(0)
    config = small_config(answer_decoder=AnswerDecoderConfig(True, 2), loss_weight=LossWeights(mlm=0.0))
    images, ids, mask, _ = small_batch(pairs=3)
    answers = torch.randint(5, VOCAB, (6, 4), generator=torch.Generator().manual_seed(2))
    batch = images, ids, mask, answers, torch.ones_like(answers), torch.ones(6), torch.tensor([1, 2, 3])
    return SingularityQA(config, PAD, CLS, MASK), batch


def test_a_step_of_questions_never_waits_and_is_one_graph():
    model, batch = answering_batch()
    with Watch() as watch:
        model(*batch)["loss_qa"].backward()
    assert "aten.mm.default" in watch.seen
    assert not watch.seen & WAITING
    plain = model.answer_decoder.layer[0].output.dense.weight.grad.clone()
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="eager")(*batch)["loss_qa"].backward()
    torch.testing.assert_close(model.answer_decoder.layer[0].output.dense.weight.grad, plain)


def test_recomputing_the_answer_decoder_changes_no_gradient():
    model, batch = answering_batch()
    gradients, calls = [], []
    model.answer_decoder.layer[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        model.set_gradient_checkpointing(recompute)
        model.zero_grad()
        model(*batch)["loss_qa"].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 1 + 2  # with recomputing the layer runs once more, in the backward pass
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("changes", [{}, TEMPORAL], ids=["image", "temporal"])
def test_a_step_never_waits_for_the_device(changes):
    model, batch = small_model(**changes), small_batch(frames=2)
    with Watch() as watch:
        losses = model(*batch)
        torch.stack(list(losses.values())).sum().backward()
    assert "aten.mm.default" in watch.seen
    assert not watch.seen & WAITING


@pytest.mark.parametrize("changes", [{}, TEMPORAL], ids=["image", "temporal"])
def test_a_step_compiles_to_one_graph(changes):
    model = small_model(layers=2, **changes)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # raises at the first graph break
    losses = compiled(*small_batch(frames=2))
    torch.stack(list(losses.values())).sum().backward()
    assert model.text_encoder.layer[-1].output.dense.weight.grad.any()


@pytest.mark.parametrize("changes", [{}, TEMPORAL], ids=["image", "temporal"])
def test_recomputing_activations_changes_no_gradient(changes):
    batch, gradients = small_batch(frames=2), []
    for recompute in (False, True):
        model = small_model(**changes)
        model.set_gradient_checkpointing(recompute)
        torch.manual_seed(3)
        torch.stack(list(model(*batch).values())).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("changes", [{}, TEMPORAL, {"loss_weight": LossWeights(mlm=0.0)}], ids=str)
def test_the_counted_operations_are_those_that_run(changes):
    """Also that keys and values of a visual are projected once, and text layers run once a text."""
    model, (images, *texts) = small_model(**changes), small_batch(pairs=4, frames=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images, *texts)
    counted = step_flops(model.config, pairs=4, frames=2, text_length=texts[0].shape[1])["total"]
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02)


def test_words_are_predicted_at_the_chosen_places_only():
    labels = torch.full((4, 6), IGNORED)
    labels[1, 2], labels[3, 0] = 5, 6
    chosen = masked_positions(labels, 3)
    assert set(chosen[:2].tolist()) == {1 * 6 + 2, 3 * 6}
    assert len(chosen) == 3


def test_practically_no_chosen_word_is_left_out():
    torch.manual_seed(0)
    for count in (16, 256, 4096):
        limit = max_masked(count, 0.5)
        assert limit <= count
        assert ((torch.rand(2000, count) < 0.5).sum(1) <= limit).all()
    assert max_masked(4096, 0.5) < 0.6 * 4096
