"""Finds what would make the host wait for a GPU, on a machine without one.

On a GPU the host runs ahead of the kernels that it queues. Reading a value back, bringing numbers from pageable memory,
finding out how many elements a mask has, and an explicit synchronisation make it wait for all of them.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from places import ROOT
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}
MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.copy_, torch.Tensor.type_as}
READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__,
    torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.nonzero, torch.Tensor.nonzero,
    torch.masked_select, torch.Tensor.masked_select, torch.unique, torch.Tensor.unique, torch.multinomial,
}  # fmt: skip
BY_MASK = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


def caller() -> str:
    """The innermost line that is not this file's nor PyTorch's."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__ and "contextlib" not in frame.filename:
            return f"{frame.filename.removeprefix(f'{ROOT}/')}:{frame.lineno}"
    return "?"


class OneKernel(torch.autograd.Function):
    """Attention as a GPU has it, one kernel forward and one backward; the meta device would compute it in steps."""

    @staticmethod
    def forward(context, query, key, value, kernels):
        context.save_for_backward(query, key, value)
        context.kernels = kernels
        kernels.launched += 1
        return torch.empty_like(query)

    @staticmethod
    def backward(context, gradient):
        context.kernels.launched += 1
        return (*(torch.empty_like(tensor) for tensor in context.saved_tensors), None)


class Calls(TorchFunctionMode):
    """Records calls of PyTorch's functions that would wait; `device` is the GPU's."""

    def __init__(self, device: str, found: list[str], kernels: "Kernels") -> None:
        super().__init__()
        self.device, self.found, self.kernels = device, found, kernels

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention and self.device == "meta":
            self.check_mask(kwargs.get("attn_mask"))
            return OneKernel.apply(*args[:3], self.kernels)
        if self.waits(function, args, kwargs):
            self.found.append(f"{getattr(function, '__name__', function)} in {caller()}")
        return function(*args, **kwargs)

    def check_mask(self, mask) -> None:
        """Note a mask that no fused kernel of a GPU takes as it is; PyTorch falls back to plain operators silently."""
        if mask is not None and mask.stride(-1) != 1:
            self.found.append(f"a mask of strides {mask.stride()} in {caller()}")

    def waits(self, function, args, kwargs) -> bool:
        if function in FROM_NUMBERS:
            return kwargs.get("device") is not None and self.is_there(torch.device(kwargs["device"]))
        if function in READS:
            return self.is_there(args[0].device)
        if function in BY_MASK:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [part for part in index if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
            return any(self.is_there(mask.device) for mask in masks)
        if function is torch.repeat_interleave or function is torch.Tensor.repeat_interleave:
            counted = any(isinstance(value, torch.Tensor) and value.ndim for value in args[1:])
            return counted and kwargs.get("output_size") is None
        if function in MOVES and self.device != "cpu":
            return self.comes_over(function, args, kwargs)
        return False

    def comes_over(self, function, args, kwargs) -> bool:
        """Whether a tensor of the host goes to the device, or back, and the host waits for it."""
        others = [
            value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor | torch.device | str)
        ]
        devices = [value.device if isinstance(value, torch.Tensor) else torch.device(value) for value in others]
        crosses = any(self.is_there(device) != self.is_there(args[0].device) for device in devices)
        return crosses and not kwargs.get("non_blocking", False)

    def is_there(self, device: torch.device) -> bool:
        return device.type == self.device


class Kernels(TorchDispatchMode):
    """Records all reads of values and counts the operators that launch a kernel on a GPU."""

    def __init__(self, device: str, found: list[str]) -> None:
        super().__init__()
        self.device, self.found, self.launched = device, found, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(f"{operator} in {caller()}")
        self.launched += launches(operator)
        return operator(*args, **(kwargs or {}))


def launches(operator) -> bool:
    """Whether an operator computes something; views and empty memory do not."""
    name = operator._schema.name.removeprefix("aten::")
    is_view = operator.is_view or name in ("_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh")
    return not (is_view or name.startswith(("empty", "new_empty", "sym_", "is_same_size", "_fused_sdp_choice")))


@contextmanager
def watched(device: str) -> Iterator[tuple[list[str], Kernels]]:
    """What would wait in the block, as `FUNCTION in FILE:LINE`, and the kernels it launches; `device` is the GPU's."""
    found: list[str] = []
    kernels = Kernels(device, found)
    with Calls(device, found, kernels), kernels:
        yield found, kernels
