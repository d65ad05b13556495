"""Learning rates and weight decay: groups of parameters, and the factor of every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import cos, pi

from torch import nn

from model.freezing import names_below
from runtime.errors import UserError
from train.config.settings import OptimizerConfig

ALIGNED_SIZE = 8  # elements: 16 bytes of half precision


@dataclass(frozen=True)
class ParameterGroup:
    """Names of the parameters that share a learning rate and a weight decay."""

    lr: float
    weight_decay: float
    names: tuple[str, ...]


def parameter_groups(dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
    """Groups of all parameters, given as name -> number of dimensions.

    No weight decay for biases and for parameters of exactly one dimension. Modules named in
    `different_lr.module_names`, and all modules below them, have their own learning rate.
    Raises ValueError when a named module has no parameter.
    """
    own_lr = config.different_lr
    modules = own_lr.module_names if own_lr.enable else []
    different = names_below(dimensions.keys(), modules, "optimizer.different_lr.module_names")
    groups: dict[tuple[float, float], list[str]] = {}
    for name, ndim in dimensions.items():
        lr = own_lr.lr if name in different else config.lr
        decay = 0.0 if ndim == 1 or name.endswith(".bias") else config.weight_decay
        groups.setdefault((lr, decay), []).append(name)
    return [ParameterGroup(lr, decay, tuple(names)) for (lr, decay), names in groups.items()]


def trainable_groups(model: nn.Module, config: OptimizerConfig, aligned: bool = False) -> list[ParameterGroup]:
    """The optimiser's groups of the parameters that are not frozen; none is empty.

    aligned: in each group, parameters whose size is not a multiple of ALIGNED_SIZE are last. DeepSpeed lays a group's
    parameters end to end, and a GPU multiplies matrices that do not begin at multiples of 16 bytes several times more
    slowly (benchmarks/RESULTS.md). The order changes the rounding of the gradient's norm.

    Raises UserError when all are frozen, or when `different_lr` names a module that the model does not have.
    """
    parameters = dict(model.named_parameters())
    groups = parameter_groups({name: p.ndim for name, p in parameters.items()}, config)
    trainable = []
    for group in groups:
        names = [name for name in group.names if parameters[name].requires_grad]
        if aligned:
            names.sort(key=lambda name: parameters[name].numel() % ALIGNED_SIZE != 0)
        if names:
            trainable.append(replace(group, names=tuple(names)))
    if not trainable:
        raise UserError("every parameter of the model is frozen: leave some of them out of freeze")
    return trainable


@dataclass(frozen=True)
class Schedule:
    """Warm-up over `warmup_steps` (fractions count), cosine decay until `total_steps`, floored at `min_multiplier`."""

    warmup_steps: float
    total_steps: int
    min_multiplier: float

    def multiplier(self, step: int) -> float:
        """The factor of the base learning rates at optimiser step `step` = 0, 1, 2, ...

        Past the last step it stays at `min_multiplier`.
        """
        if step < self.warmup_steps:
            return max(self.min_multiplier, step / max(1.0, self.warmup_steps))
        if step >= self.total_steps:
            return self.min_multiplier
        progress = (step - self.warmup_steps) / max(1.0, self.total_steps - self.warmup_steps)
        return max(self.min_multiplier, 0.5 * (1.0 + cos(pi * progress)))
