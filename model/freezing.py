"""Parameters chosen by the prefix of their names, and parts of a model that training leaves as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from runtime.errors import UserError
from runtime.settings import listed_nearest, nearest


def names_below(names: Collection[str], prefixes: Sequence[str], setting: str) -> set[str]:
    """Those of a model's parameter `names` that are one of `prefixes`, such as vision_encoder, or are below one.

    Raises UserError, with the nearest names, for a prefix of `setting` that matches none.
    """
    found: set[str] = set()
    for prefix in prefixes:
        below = {name for name in names if name == prefix or name.startswith(f"{prefix}.")}
        if not below:
            known = {name.rsplit(".", depth)[0] for name in names for depth in range(1, 6)} | set(names)
            near = nearest(prefix, sorted(known)) or sorted({name.split(".")[0] for name in names})
            raise UserError(
                f"{setting} names {prefix!r}, which matches no parameter of this model: {listed_nearest(near)}"
            )
        found |= below
    return found


class Freezable(nn.Module):
    """A module of which parts can be excluded from training."""

    _frozen_modules: tuple[nn.Module, ...] = ()

    def freeze(self, prefixes: Sequence[str]) -> None:
        """Exclude the parameters whose names have one of `prefixes` (see `names_below`) from training.

        Modules whose parameters are all frozen are in evaluation mode from now on: without dropout and drop path.
        Raises UserError for a prefix that matches no parameter.
        """
        parameters = dict(self.named_parameters())
        for name in names_below(parameters.keys(), prefixes, "freeze"):
            parameters[name].requires_grad_(False)
        self._frozen_modules = tuple(module for name, module in self.named_modules() if name and _is_frozen(module))
        self.train(self.training)

    def train(self, mode: bool = True) -> Freezable:
        """As in nn.Module, but frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self


def _is_frozen(module: nn.Module) -> bool:
    own = [parameter.requires_grad for parameter in module.parameters()]
    return bool(own) and not any(own)
