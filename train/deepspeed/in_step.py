"""Evaluation under ZeRO-3: each layer is gathered while it computes, though ranks compute at their own pace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from model.vqa import SingularityQA
from runtime import collectives
from runtime.activity import waiting

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

DONE = 1 << 40  # the vote of a rank that needs no layer


@contextmanager
def layer_by_layer(engine: DeepSpeedEngine) -> Iterator[None]:
    """Let the ranks use the module's methods freely inside, each with data of its own; all ranks enter and leave.

    DeepSpeed's own hooks gather a layer's weights when all ranks come to it at the same time, as in training. An
    evaluation calls layers more often here than there. So before each layer the ranks vote on which one to gather, and
    those that have come to the end, or to an exchange of results, take part until all have. Under other stages every
    rank has all weights, and nothing is done.
    """
    if engine.zero_optimization_stage() != 3:
        yield
        return
    layers = _Layers(engine)
    layers.begin()
    try:
        yield
        layers.serve()
    finally:
        layers.end()


class _Layers:
    """The partitioned layers of a module, and who needs which."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        module = engine.module
        self._offload: Any = engine.optimizer.parameter_offload
        self._world_size = distributed.get_world_size()
        self._votes_on = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
        leaves = [each for each in module.modules() if not any(each.children())]
        outside = _used_outside(module)
        # Weights of modules around the layers are few and small: they are gathered for the whole evaluation.
        around = [each for each in module.modules() if any(each.children())] + outside
        self._around = _partitioned(around)
        self._layers = [each for each in leaves if each not in outside and _partitioned([each])]
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Replace DeepSpeed's hooks by ours."""
        for hook in (*self._offload.forward_hooks, *self._offload.backward_hooks):
            hook.remove()
        self._offload.forward_hooks, self._offload.backward_hooks = [], []
        self._gather(self._around)
        for number, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(self._before(number)))
            self._hooks.append(layer.register_forward_hook(self._after(number)))
        collectives.before_exchange.append(self.serve)

    def end(self) -> None:
        """Give DeepSpeed its hooks back."""
        collectives.before_exchange.remove(self.serve)
        for hook in self._hooks:
            hook.remove()
        self._release(self._around)
        self._offload._register_deepspeed_module(self._offload.module)

    def serve(self) -> None:
        """Take part in what the other ranks gather until none of them needs anything."""
        self._meet(DONE)

    def _before(self, number: int) -> Any:
        return lambda *_: self._meet(number)

    def _after(self, number: int) -> Any:
        return lambda *_: self._release(_partitioned([self._layers[number]], gathered=True))

    def _meet(self, wanted: int) -> None:
        """Vote until the wanted layer is gathered here."""
        while True:
            votes = torch.empty(self._world_size, dtype=torch.int64, device=self._votes_on)
            with waiting("layer_by_layer"):
                distributed.all_gather_into_tensor(votes, torch.tensor([wanted], device=self._votes_on))
                chosen = int(votes.min())
            if chosen == DONE:
                return
            weights = _partitioned([self._layers[chosen]])
            self._gather(weights)
            if chosen == wanted:
                return
            self._release(weights)

    @staticmethod
    def _gather(weights: list[Any]) -> None:
        if weights:
            with torch.inference_mode(False):
                weights[0].all_gather(weights)

    @staticmethod
    def _release(weights: list[Any]) -> None:
        if weights:
            with torch.inference_mode(False):
                weights[0].partition(weights)


def _partitioned(modules: list[nn.Module], gathered: bool = False) -> list[Any]:
    """The modules' own parameters of which a rank keeps a part; those that ZeRO never lets go of are left out."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    wanted = ZeroParamStatus.AVAILABLE if gathered else ZeroParamStatus.NOT_AVAILABLE
    own: list[Any] = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    return [p for p in own if p.ds_status == wanted and not getattr(p, "ds_persist", False)]


def _used_outside(module: nn.Module) -> list[nn.Module]:
    """Layers whose weights other modules read: the word embeddings, where words are written."""
    return [module.answer_decoder.embeddings.word_embeddings] if isinstance(module, SingularityQA) else []
