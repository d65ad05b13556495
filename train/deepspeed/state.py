"""The fragments of the weights and moments that a rank keeps: one view of every ZeRO stage and precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.nn import functional

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
EXACT = "exact_fragment"  # our attribute of a frozen parameter: see `keep_exact`


@dataclass(frozen=True)
class Fragment:
    """A run of a parameter's elements, flattened, that this rank keeps. Reading and writing exchange nothing."""

    name: str
    start: int  # of the run in the flattened parameter
    length: int
    trained: bool  # with moments; otherwise the parameter is frozen
    replicated: bool  # every rank keeps it
    parameter: Any
    views: dict[str, torch.Tensor]  # of each kind: writing into them changes what is trained

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its tensors: the weight, and the moments of a trained parameter."""
        return (WEIGHT, *MOMENTS) if self.trained else (WEIGHT,)

    def read(self, kind: str) -> torch.Tensor:
        """The weight or a moment (n,): single precision, but a frozen weight in the precision of training."""
        return self.views[kind]

    def write(self, kind: str, value: torch.Tensor) -> None:
        """Set the weight or a moment to a value (n,) of single precision."""
        self.views[kind].copy_(value)
        if hasattr(self.parameter, EXACT):
            getattr(self.parameter, EXACT).copy_(value)

    def saved(self, kind: str) -> torch.Tensor:
        """The weight or a moment (n,) in single precision on the CPU, as a copy.

        A frozen weight is as it was before it was rounded to the precision of training, unless it has changed since.
        """
        value = self.read(kind).detach().cpu()
        exact = getattr(self.parameter, EXACT, None)
        if exact is None or not torch.equal(exact.to(value.dtype), value):
            exact = value
        return exact.to(torch.float32, copy=True)


class _Partition(Fragment):
    """A trained fragment under ZeRO 3, by DeepSpeed's own access; with CPU offload on a GPU it hands out copies."""

    def read(self, kind: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if kind == WEIGHT:
            padded = safe_get_local_fp32_param(self.parameter)
        else:
            padded = safe_get_local_optimizer_state(self.parameter, kind)
        return padded.detach()[: self.length]

    def write(self, kind: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        padding = self.parameter.ds_tensor.numel() - self.length
        padded = functional.pad(value, (0, padding)) if padding else value
        if kind == WEIGHT:
            safe_set_local_fp32_param(self.parameter, padded)
        else:
            safe_set_local_optimizer_state(self.parameter, padded, kind)


def fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's fragments; over all ranks they cover every parameter once, or all of it on each rank."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        yield from _of_stage_3(engine)
    elif stage in (1, 2):
        yield from _of_stages_1_2(engine)
    else:
        yield from _unpartitioned(engine)


def owned_fragments(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """The fragments that this rank writes to a checkpoint: the ranks share those that every rank keeps."""
    world_size, rank = distributed.get_world_size(), distributed.get_rank()
    number = 0  # of the replicated ones: of others each rank has its own
    for part in fragments(engine):
        if not part.replicated or number % world_size == rank:
            yield part
        number += part.replicated


def frozen_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's frozen parameters by name, for `keep_exact`, before DeepSpeed rounds them."""
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if not p.requires_grad}


def keep_exact(engine: DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> None:
    """Keep the frozen fragments that this rank writes, as they were, in host memory."""
    for part in owned_fragments(engine):
        if not part.trained:
            exact = weights[part.name].flatten()[part.start : part.start + part.length]
            setattr(part.parameter, EXACT, exact.clone())


@contextmanager
def loading(engine: DeepSpeedEngine) -> Iterator[None]:
    """Allow fragments to be written; at the end the weights that the model computes with follow. All ranks call."""
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    yield
    if stage == 3:
        for part in _of_stage_3(engine):
            if part.trained:
                part.parameter.ds_tensor.data[: part.length].copy_(part.read(WEIGHT))
        optimizer.checkpoint_event_epilogue()
    elif stage in (1, 2):
        optimizer.update_lp_params()
    else:
        for low, high in _master_copies(optimizer):
            low.data.copy_(high.data)


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The AdamW that DeepSpeed's optimiser wraps."""
    return engine.basic_optimizer


def optimizer_step(engine: DeepSpeedEngine) -> int:
    """Number of steps of AdamW."""
    steps = {float(state["step"]) for state in base_optimizer(engine).state.values() if "step" in state}
    assert len(steps) <= 1, steps
    return int(max(steps, default=0))


def set_optimizer_step(engine: DeepSpeedEngine, step: int) -> None:
    """Set how many steps AdamW has taken."""
    for state in base_optimizer(engine).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(float(step))
        elif "step" in state:
            state["step"] = step


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, also where ZeRO 3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _of_stage_3(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    optimizer: Any = engine.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat:
        _state(optimizer.optimizer, flat)  # which DeepSpeed's own access fails without, before the first step
    for name, parameter in _named_parameters(engine):
        padded = parameter.ds_tensor.ds_numel
        start = padded * distributed.get_rank()
        length = min(padded, parameter.ds_numel - start)
        if length <= 0:
            continue
        if parameter.requires_grad:
            yield _Partition(name, start, length, True, False, parameter, {})
        else:
            views = {WEIGHT: parameter.ds_tensor.data.view(-1)[:length]}
            yield Fragment(name, start, length, False, False, parameter, views)


def _of_stages_1_2(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """Not by `safe_get_full_*`, which sum each parameter over all ranks and fail before the first step."""
    optimizer: Any = engine.optimizer
    for name, parameter in _named_parameters(engine):
        if not parameter.requires_grad:
            yield _whole(name, parameter, {WEIGHT: parameter.data})
        elif (mapping := parameter._hp_mapping) is not None:  # else another rank's
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            address = mapping.hp_fragment_address
            own = slice(address.start, address.start + address.numel)
            views = {kind: tensor.data[own] for kind, tensor in _state(optimizer.optimizer, flat).items()}
            start = mapping.lp_fragment_address.start
            yield Fragment(name, start, address.numel, True, False, parameter, views)


def _unpartitioned(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    optimizer: Any = engine.optimizer
    copies = {id(low): high for low, high in _master_copies(optimizer)}
    base = base_optimizer(engine)
    for name, parameter in _named_parameters(engine):
        if parameter.requires_grad:
            yield _whole(name, parameter, _state(base, copies.get(id(parameter), parameter)))
        else:
            yield _whole(name, parameter, {WEIGHT: parameter.data})


def _whole(name: str, parameter: Any, tensors: dict[str, torch.Tensor]) -> Fragment:
    views = {kind: tensor.data.view(-1) for kind, tensor in tensors.items()}
    return Fragment(name, 0, parameter.numel(), parameter.requires_grad, True, parameter, views)


def _named_parameters(engine: DeepSpeedEngine) -> Iterator[tuple[str, Any]]:
    yield from engine.module.named_parameters()


def _master_copies(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Low-precision parameters and their single-precision copies, where DeepSpeed keeps such without ZeRO."""
    for low, high in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])):
        yield from zip(low, high)


def _state(base: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter of AdamW and its moments; created as by the first step if there are none."""
    state = base.state[parameter]
    if not state:
        tensor_step = isinstance(base, torch.optim.AdamW)
        fused = tensor_step and base.defaults.get("fused")
        device = parameter.device if fused else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device) if tensor_step else 0
        state.update({key: torch.zeros_like(parameter.data) for key in MOMENTS})
    return {WEIGHT: parameter, **{key: state[key] for key in MOMENTS}}
