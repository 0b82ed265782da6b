"""Patterns of attention modules that compute them by themselves, and not by transformers' attention interface.

While such a module runs, PyTorch tells us of every function that it calls; what its softmax gives is the pattern, and
goes on through a tap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hooked_mm.sources import source_of

Tap = Callable[[torch.Tensor], torch.Tensor]
_SOFTMAX = (torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax)


def by_interface(attention: nn.Module) -> bool:
    """Whether a module attends by transformers' interface, which our function can stand in for."""
    source = source_of(type(attention).forward)
    # One that asks the table for an attribute never gets one, and falls back on its own function.
    return "ALL_ATTENTION_FUNCTIONS" in source and not re.search(r"getattr\(\s*ALL_ATTENTION_FUNCTIONS", source)


def by_softmax(attention: nn.Module) -> bool:
    """Whether a module calls a softmax of its own, or the eager attention of its file."""
    source = source_of(type(attention).forward)
    return not by_interface(attention) and bool(re.search(r"[sS]oftmax\(|eager_attention_forward", source))


class _Watch(TorchFunctionMode):
    """Sends what a softmax gives through a tap."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        return self.tap(found) if func in _SOFTMAX else found


@contextmanager
def watched(taps: Iterable[tuple[nn.Module, Tap]]) -> Iterator[None]:
    """While open, the softmax of each attention module goes through its tap; pairs (attention, tap).

    timm's attention has a switch between a fused kernel and a softmax of its own; it is set to the latter.
    """
    taps = list(taps)
    open_now: list[_Watch] = []
    handles = []
    fused: list[Any] = [attention for attention, _ in taps if getattr(attention, "fused_attn", False)]

    def enter(tap: Tap) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            watch = _Watch(tap)
            watch.__enter__()
            open_now.append(watch)

        return begin

    def leave(*_: Any) -> None:
        open_now.pop().__exit__(None, None, None)

    try:
        for attention in fused:
            attention.fused_attn = False
        for attention, tap in taps:
            handles.append(attention.register_forward_pre_hook(enter(tap)))
            handles.append(attention.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in fused:
            attention.fused_attn = True
