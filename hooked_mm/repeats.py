"""Refusing values of modules that run several times in one pass, of which a hook point would show the first alone.

Some models run their tower once on overviews and once on crops. Text points of such a pass are as ever; a point in the
tower, or of a projector that runs crop by crop, would show a part of the images and change a part of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hooked_mm.errors import BadInputError
from hooked_mm.flow import first_tensor


@contextmanager
def run_once(watched: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """While open, these modules may run once on a tensor of floating point.

    Args:
        watched: (name of a hook point, the module at which it lies).

    Raises:
        BadInputError: At the end, if one ran several times.
    """
    calls: Counter[str] = Counter()
    first: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = first_tensor((*args, *kwargs.values()))
            # What is run again on a pooled token alone (BLIP's norm) is no other part of the images.
            calls[name] += value is not None and value.ndim >= first.setdefault(name, value.ndim)

        return hook

    handles = [module.register_forward_pre_hook(count(name), with_kwargs=True) for name, module in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, number in calls.items():
        if number > 1:
            raise BadInputError(
                f"{name!r} lies in a module that runs {number} times on this batch (once on overviews and once on "
                "crops, or image by image), and would show the first alone; ask for points of the text, or make the "
                "batch without crops"
            )
