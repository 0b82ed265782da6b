"""The residual stream of a store, layer by layer: h^0, what enters the first block, to h^L, what leaves the last one.

h^L is taken as the last block leaves it: the model's final norm is no part of the stream, and a statistic over h^0 ...
h^(L-1) and norm(h^L) would compare what can't be compared.

| hook | layer |
|---|---|
| `blocks.0.hook_resid_pre`, or `hook_embed` where that is not stored | 0 |
| `blocks.{l}.hook_resid_post` | l + 1 |
| `blocks.{l}.hook_resid_pre`, where the one before is not stored | l |
| any other point of a block (`point="hook_attn_out"`, `"hook_mlp_out"`, ...) | l |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.processes import Processes
from hooked_mm.store import ActivationStore

Modality = Literal["all", "text", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
STREAM = ("blocks.*.hook_resid_post", "blocks.0.hook_resid_pre")
"""What to extract for the whole stream."""


def layer_hooks(hooks: Iterable[str], point: str = "resid") -> dict[int, str]:
    """Layer -> hook, in the order of layers; see the table above.

    Args:
        hooks: Names of hooks.
        point: `"resid"` for the stream, or the name of another point of the blocks.

    Raises:
        UnknownHookError: If none of them is one of the language model's layers.
    """
    known = list(hooks)
    found: dict[int, str] = {}
    forms = (
        {r"hook_embed": 0, r"blocks\.(\d+)\.hook_resid_pre": 0, r"blocks\.(\d+)\.hook_resid_post": 1}
        if point == "resid"
        else {rf"blocks\.(\d+)\.{re.escape(point)}": 0}
    )
    # Later forms win: what leaves a block is what enters the next one, and `hook_embed` may lack added positions.
    for form, behind in forms.items():
        for name in known:
            if match := re.fullmatch(form, name):
                found[(int(match[1]) if match.groups() else 0) + behind] = name
    if not found:
        wanted = "hook_resid_post" if point == "resid" else point
        raise UnknownHookError(f"none of {known} is a layer; extract with --hooks 'blocks.*.{wanted}'")
    return dict(sorted(found.items()))


class Layers:
    """Rows of a store at each of its layers.

    Args:
        store: Whose rows.
        hooks: Layer -> hook, in the order of layers.

    Attributes:
        store: Whose rows.
        hooks: Layer -> hook.
    """

    def __init__(self, store: ActivationStore, hooks: Mapping[int, str]) -> None:
        self.store, self.hooks = store, dict(hooks)

    @classmethod
    def of_store(cls, store: ActivationStore, point: str = "resid", layers: Sequence[int] | None = None) -> Layers:
        """The layers that a store holds.

        Args:
            store: A store of rows at several layers.
            point: See `layer_hooks`.
            layers: Only these.

        Raises:
            UnknownHookError: If the store holds none.
            BadInputError: If one of `layers` is not there.
        """
        hooks = layer_hooks(store.hooks, point)
        if layers is not None:
            lost = [layer for layer in layers if layer not in hooks]
            if lost:
                raise BadInputError(f"the store {str(store.path)!r} holds no layer {lost[0]}; it holds {list(hooks)}")
            hooks = {layer: hook for layer, hook in hooks.items() if layer in set(layers)}
        return cls(store, hooks)

    def of(self, modality: str) -> Layers:
        """The rows of a modality; `"all"` for every row.

        Raises:
            BadInputError: For a modality that the rows do not have; it names those that they have.
        """
        if modality == "all":
            return self
        part = self.store.where(modality=modality)
        if not len(part):
            there = sorted(set(self.store.rows.column("modality").to_pylist()) - {None})
            raise BadInputError(
                f"the store {str(self.store.path)!r} has no rows of modality {modality!r}; it has {', '.join(there)}"
            )
        return Layers(part, self.hooks)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def numbers(self) -> list[int]:
        """The layers."""
        return list(self.hooks)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Layers that follow each other, the last one among them.

        Raises:
            BadInputError: If a layer between is missing, so that two that are far apart would pass for neighbours.
        """
        found = list(zip(self.numbers, self.numbers[1:], strict=False))
        apart = [pair for pair in found if pair[1] - pair[0] != 1]
        if apart or not found:
            why = f"between {apart[0][0]} and {apart[0][1]} layers are missing" if apart else "there is one layer only"
            raise BadInputError(f"no layers that follow each other: {why}; extract --hooks '{list(STREAM)}'")
        return found

    @property
    def samples(self) -> Int[np.ndarray, " n"]:
        """Per row, which sample it is of, 0, 1, ... in the order of the store's table."""
        return self.store.row_samples()

    @property
    def positions(self) -> Int[np.ndarray, " n"]:
        """Per row, its position in the sample, padding not counted.

        Raises:
            BadInputError: If rows are means over positions.
        """
        column = self.store.rows.column("position")
        if column.null_count:
            raise BadInputError("some rows are means over positions and have none; extract with the selector EachOf")
        return column.to_numpy()

    @property
    def words(self) -> list[str | None]:
        """Per row, its word or token, if it has one."""
        return self.store.rows.column("word").to_pylist()

    def values(self, layer: int, rows: Int[np.ndarray, " m"] | slice = slice(None)) -> Float[Tensor, "m d"]:
        """Rows at one layer, in the store's dtype.

        Raises:
            BadInputError: If there is no such layer.
        """
        if layer not in self.hooks:
            raise BadInputError(f"there is no layer {layer}; there are {self.numbers}")
        return self.store.activations(self.hooks[layer], rows)

    def reader(self, layer: int, device: torch.device | str) -> Callable[[Int[np.ndarray, " m"]], Tensor]:
        """What reads rows at one layer onto a device, for analyses that choose their rows."""
        return lambda rows: self.values(layer, rows).to(device)

    def batches(
        self, layers: Sequence[int], size: int = 8192, processes: Processes | None = None
    ) -> Iterator[tuple[Int[np.ndarray, " m"], dict[int, Float[Tensor, "m d"]]]]:
        """Go through the rows, which may be more than fit into memory.

        Args:
            layers: At which layers.
            size: Rows at a time.
            processes: Each takes its share of the batches; this one takes all unless given.

        Yields:
            Indices of rows, and per layer their values.
        """
        names = {layer: self.hooks[layer] for layer in layers}
        rank, count = (0, 1) if processes is None else (processes.rank, processes.size)
        for start in range(rank * size, len(self), count * size):
            rows = np.arange(start, min(start + size, len(self)))
            yield rows, {layer: self.store.activations(hook, rows) for layer, hook in names.items()}
