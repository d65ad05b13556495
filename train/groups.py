"""Groups of a model's parameters that share a learning rate and a weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import UserError
from runtime.settings import nearest
from train.config.settings import OptimizerConfig


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
    for module in modules:
        if not any(_below(name, module) for name in dimensions):
            known = {name.rsplit(".", depth)[0] for name in dimensions for depth in range(1, 6)} | set(dimensions)
            near = nearest(module, sorted(known)) or sorted({name.split(".")[0] for name in dimensions})
            raise UserError(
                f"optimizer.different_lr.module_names names {module!r}, which matches no parameter of this model: "
                f"nearest are {', '.join(near)}"
            )
    groups: dict[tuple[float, float], list[str]] = {}
    for name, ndim in dimensions.items():
        lr = own_lr.lr if any(_below(name, module) for module in modules) else config.lr
        decay = 0.0 if ndim == 1 or name.endswith(".bias") else config.weight_decay
        groups.setdefault((lr, decay), []).append(name)
    return [ParameterGroup(lr, decay, tuple(names)) for (lr, decay), names in groups.items()]


def _below(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")
