"""Properties that make a step fast: one graph, no synchronisation with the device, no repeated work."""

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


def answering():
    """A small model that answers questions, and what its step takes: six answers of three questions."""
    torch.manual_seed(0)
    config = small_config(answer_decoder=AnswerDecoderConfig(True, 2), loss_weight=LossWeights(mlm=0.0))
    images, ids, mask, _ = small_batch(pairs=3)
    answers = torch.randint(5, VOCAB, (6, 4), generator=torch.Generator().manual_seed(2))
    batch = images, ids, mask, answers, torch.ones_like(answers), torch.ones(6), torch.tensor([1, 2, 3])
    return SingularityQA(config, PAD, CLS, MASK), batch


CASES = {
    "image": lambda: (small_model(layers=2), small_batch(frames=2)),
    "temporal": lambda: (small_model(layers=2, **TEMPORAL), small_batch(frames=2)),
    "questions": answering,
}


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(3)
    torch.stack(list(model(*batch).values())).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_a_step_never_waits_is_one_graph_and_can_recompute_its_activations(case):
    model, batch = CASES[case]()
    with Watch() as watch:
        plain = gradients(model, batch)
    assert "aten.mm.default" in watch.seen
    assert not watch.seen & WAITING
    compiled = gradients(torch.compile(model, fullgraph=True, backend="eager"), batch)  # raises at a graph break
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[f"_orig_mod.{name}"], gradient, msg=name)
    model.set_gradient_checkpointing()
    calls = []
    (model.text_encoder if case != "questions" else model.answer_decoder).layer[1].register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    recomputed = gradients(model, batch)
    assert case != "questions" or len(calls) == 2  # once more in the backward pass
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name], msg=name)


@pytest.mark.parametrize("changes", [{}, TEMPORAL, {"loss_weight": LossWeights(mlm=0.0)}], ids=str)
def test_step_flops_match_the_flop_counter(changes):
    """Also that keys and values of a visual are projected once, and text layers run once per text."""
    model, (images, *texts) = small_model(**changes), small_batch(pairs=4, frames=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images, *texts)
    counted = step_flops(model, pairs=4, frames=2, text_length=texts[0].shape[1])["total"]
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02)


def test_masked_positions_come_first():
    labels = torch.full((4, 6), IGNORED)
    labels[1, 2], labels[3, 0] = 5, 6
    chosen = masked_positions(labels, 3)
    assert set(chosen[:2].tolist()) == {1 * 6 + 2, 3 * 6}
    assert len(chosen) == 3


def test_max_masked_covers_all_masked_tokens():
    torch.manual_seed(0)
    for count in (16, 256, 4096):
        limit = max_masked(count, 0.5)
        assert limit <= count
        assert ((torch.rand(2000, count) < 0.5).sum(1) <= limit).all()
    assert max_masked(4096, 0.5) < 0.6 * 4096
