"""Frozen parameters: those that the optimiser does not have; they are saved and restored like all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from train.deepspeed.state import Fragment, own_part, trained_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def frozen_fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """The frozen parameters as this rank computes with them: its parts of them under ZeRO 3, else all of each.

    The tensors (n,) are views, in the precision of training.
    """
    trained = trained_parameters(engine).keys()
    optimizer: Any = engine.optimizer
    for name, parameter in _named_parameters(engine):
        if name in trained:
            continue
        if engine.zero_optimization_stage() != 3:
            yield Fragment(name, 0, parameter.data.view(-1), {})
            continue
        start, length = own_part(optimizer, parameter, parameter.ds_tensor.ds_numel)
        if length > 0:
            yield Fragment(name, start, parameter.ds_tensor.data.view(-1)[:length], {})


def written_fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's share of the frozen parameters, in single precision on the CPU: over all ranks, each element once.

    As the model had them before they were rounded to the precision of training, unless they have changed since.
    """
    parameters = dict(_named_parameters(engine))
    for part in _share(engine):
        low = part.weight.detach().cpu()
        exact: torch.Tensor = getattr(parameters[part.name], "exact_fragment", low)
        same = torch.equal(exact.to(low.dtype), low)
        yield Fragment(part.name, part.start, exact if same else low.float(), {})


def whole_frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's frozen parameters by name, for `keep_exact`, before DeepSpeed rounds them."""
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if not p.requires_grad}


def keep_exact(engine: DeepSpeedEngine, whole: dict[str, torch.Tensor]) -> None:
    """Keep this rank's share of the frozen parameters, as they were, in host memory."""
    parameters = dict(_named_parameters(engine))
    for part in _share(engine):
        exact = whole[part.name].flatten()[part.start : part.start + part.weight.numel()]
        parameters[part.name].exact_fragment = exact.clone()


def set_frozen(engine: DeepSpeedEngine, part: Fragment, value: torch.Tensor) -> None:
    """Set a fragment of `frozen_fragments` to a value (n,) of single precision."""
    part.weight.copy_(value)
    parameter: Any = engine.module.get_parameter(part.name)
    if hasattr(parameter, "exact_fragment"):
        parameter.exact_fragment.copy_(value)


def _share(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """The fragments that this rank writes: where every rank has all of them, they share the work."""
    divided = engine.zero_optimization_stage() == 3
    world_size, rank = distributed.get_world_size(), distributed.get_rank()
    for number, part in enumerate(frozen_fragments(engine)):
        if divided or number % world_size == rank:
            yield part


def _named_parameters(engine: DeepSpeedEngine) -> Iterator[tuple[str, Any]]:
    yield from engine.module.named_parameters()
