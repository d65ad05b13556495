"""Where a rank's part of the weights and moments lies, by parameter: one view of every ZeRO stage and precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True)
class Fragment:
    """A run of a parameter's elements, flattened, that this rank keeps: in single precision, with AdamW's moments.

    The tensors (n,) are views: writing into them changes what is trained. moments is empty unless asked for.
    """

    name: str
    start: int  # of the run in the flattened parameter
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]


def fragments(engine: DeepSpeedEngine, moments: bool = True) -> Iterator[Fragment]:
    """This rank's fragments; over all ranks they cover every trained parameter once, or all of it on each rank
    (ZeRO 0). See train.deepspeed.frozen for the others.

    moments: also AdamW's, which begin as zeros where no step has been taken yet. Nothing is gathered.
    """
    optimizer: Any = engine.optimizer
    trained = trained_parameters(engine)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        yield from _of_stage_3(optimizer, trained, moments)
    elif stage in (1, 2):
        yield from _of_stages_1_2(optimizer, trained, moments)
    else:
        yield from _unpartitioned(optimizer, trained, moments)


def trained_parameters(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The parameters that the optimiser has, by name; the others were frozen when the engine started."""
    optimizer: Any = engine.optimizer
    names = {3: "fp16_groups", 2: "bit16_groups", 1: "bit16_groups", 0: "fp16_groups"}
    groups = getattr(optimizer, names[engine.zero_optimization_stage()], None)
    if groups is None:  # a plain optimiser
        groups = [group["params"] for group in optimizer.param_groups]
    known = {id(parameter) for group in groups for parameter in group}
    return {name: parameter for name, parameter in engine.module.named_parameters() if id(parameter) in known}


def loaded(engine: DeepSpeedEngine) -> None:
    """Bring the weights that the model computes with in line with the fragments; all ranks call, after writing them."""
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        for low, high in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat):
            low.data.copy_(high.data)
        optimizer.checkpoint_event_epilogue()
    elif stage in (1, 2):
        optimizer.update_lp_params()
    else:
        for low, high in _copies(optimizer):
            low.data.copy_(high.data)


def before_loading(engine: DeepSpeedEngine) -> None:
    """To be called by all ranks before fragments are written."""
    if engine.zero_optimization_stage() == 3:
        optimizer: Any = engine.optimizer
        optimizer.checkpoint_event_prologue()


def averaged_gradients(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """This rank's tensors of the gradient that the next step of ZeRO 1 or 2 takes: over all ranks, each element once.

    Mean over the ranks, times the loss scale; zeros where an element has no gradient.
    """
    optimizer: Any = engine.optimizer
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]


def set_optimizer_step(engine: DeepSpeedEngine, step: int) -> None:
    """Tell AdamW how many steps lie behind it."""
    for state in engine.basic_optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(float(step))
        elif "step" in state:
            state["step"] = step


def _of_stages_1_2(optimizer: Any, trained: dict[str, Any], moments: bool) -> Iterator[Fragment]:
    for name, parameter in trained.items():
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank's
            continue
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        part = slice(address.start, address.start + address.numel)
        state = _state(optimizer.optimizer, flat) if moments else {}
        yield Fragment(
            name, mapping.lp_fragment_address.start, flat.data[part], {key: value[part] for key, value in state.items()}
        )


def _of_stage_3(optimizer: Any, trained: dict[str, Any], moments: bool) -> Iterator[Fragment]:
    names = {id(parameter): name for name, parameter in trained.items()}
    for group, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[group]
        state = _state(optimizer.optimizer, flat) if moments else {}
        for parameter in parameters:
            _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, length = own_part(optimizer, parameter, length)
            if length > 0:
                part = slice(offset, offset + length)
                own = {key: value[part] for key, value in state.items()}
                yield Fragment(names[id(parameter)], start, flat.data[part], own)


def own_part(optimizer: Any, parameter: Any, length: int) -> tuple[int, int]:
    """Where this rank's part of a parameter starts under ZeRO 3, and its elements; each part is padded to `length`."""
    start = length * optimizer._get_param_partition_rank(parameter)
    return start, min(length, parameter.ds_numel - start)


def _unpartitioned(optimizer: Any, trained: dict[str, Any], moments: bool) -> Iterator[Fragment]:
    copies = {id(low): high for low, high in _copies(optimizer)}
    base = getattr(optimizer, "optimizer", optimizer)
    for name, parameter in trained.items():
        weight = copies.get(id(parameter), parameter)
        state = _state(base, weight) if moments else {}
        yield Fragment(name, 0, weight.data.view(-1), {key: value.view(-1) for key, value in state.items()})


def _copies(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Low-precision parameters and their single-precision copies, where a plain optimiser keeps such."""
    for low, high in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])):
        yield from zip(low, high)


def _state(base: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's moments of one of its parameters; made, as its first step would make them, where there are none."""
    state = base.state[parameter]
    if not state:
        tensor_step = isinstance(base, torch.optim.AdamW)
        fused = tensor_step and base.defaults.get("fused")
        device = parameter.device if fused else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device) if tensor_step else 0
        state.update({key: torch.zeros_like(parameter.data) for key in MOMENTS})
    return {key: state[key] for key in MOMENTS}
