"""A module's weights where they really are: also those that accelerate brings from disk or memory only for its forward.

Between two forward passes an offloaded weight is a tensor on the device "meta": it has shape and dtype, and nothing
else. accelerate's hook, which lies on the module as `_hf_hook`, fetches it before the module's forward and lets it go
behind it. Who looks at weights without running the module asks here. A packed weight (4 or 8 bits) is whole numbers;
what goes into its module is not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module, one by one."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def offloads(module: nn.Module) -> bool:
    """Whether accelerate holds the module's own weights elsewhere between forward passes."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its first weights, while they are there."""
    for inner in module.modules():
        if (first := next(inner.parameters(recurse=False), None)) is None:
            continue
        told = [hook.execution_device for hook in _hooks(inner) if getattr(hook, "execution_device", None) is not None]
        if first.is_meta and told:
            return torch.device(told[0])
        return first.device
    return torch.device("cpu")


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first weights that are numbers with a fraction: packed ones are not."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)


@contextmanager
def placed(module: nn.Module) -> Iterator[None]:
    """While open, the weights of a module and of those inside it can be looked at.

    A tensor taken meanwhile stays whole afterwards. Not to be opened while the module itself runs, nor to run it in:
    its forward lets the weights go.
    """
    with ExitStack() as stack:
        for inner in module.modules():
            if offloads(inner):
                hook: Any = inner._hf_hook
                hook.pre_forward(inner)
                stack.callback(hook.post_forward, inner, None)
        yield


def weight_of(module: Any, name: str = "weight") -> Tensor | None:
    """One of a module's own tensors, detached, with its numbers; None if it has none of that name."""
    if not isinstance(getattr(module, name, None), Tensor):
        return None
    with placed(module):
        value: Tensor = getattr(module, name).detach()
    return value


def float32_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with its weights in float32, all of them there, without accelerate's hooks."""
    # A hook holds, or leads to, the weights of the whole model.
    made: nn.Module = copy.deepcopy(module, {id(m._hf_hook): m._hf_hook for m in module.modules() if _hooks(m)})
    for original, own in zip(module.modules(), made.modules(), strict=True):
        if _hooks(original):
            for name in ("_hf_hook", "_old_forward", "forward"):
                own.__dict__.pop(name, None)
        if offloads(original):
            with placed(original):
                for name, weight in original.named_parameters(recurse=False):
                    setattr(own, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return made.float()
