"""Attention of chosen queries alone, computed while the model runs: a whole (heads, q, k) is never held.

A view of a 20-token answer at 2,900 positions needs 20 rows of 2,900. The blocks run the attention that the model was
loaded with; beside it the asked rows' scores are computed from their queries and all keys, with the same mask, scaling,
soft-cap, sinks and bias as `hook_pattern` has. That takes samples x heads x rows x k numbers per layer (x 2 while it
is normalised, in float32 at least).

Modules that compute their pattern themselves (those of BLIP, GIT and others that know no attention interface) hold it
for as long as they run, one layer at a time; of that, too, only the asked rows are kept. The same goes for layers at
whose `hook_pattern` a hook is active: the rows then are those of the pattern after the hooks, the one that acts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.pattern import PatternRows
from hooked_mm.runner import match_names

Stack = Literal["", "encoder", "vision"]
Part = Literal["attn", "xattn"]

Visit = Callable[[int, int, Tensor], None]
"""Takes the layer, the number of the first row asked, and (b, heads, rows, k)."""


def pattern_layers(model: HookedMM, stack: Stack = "", part: Part = "attn") -> list[int]:
    """The layers of a stack that have an attention pattern of this kind."""
    start, end = _name(stack, part, "|").split("|")
    names = (name for name in model.hook_points if name.startswith(start) and name.endswith(end))
    return [int(name[len(start) : -len(end)]) for name in names]


def attention_rows(
    model: HookedMM,
    batch: Batch,
    rows: Int[Tensor, "b r"],
    layers: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    stack: Stack = "",
    keys: Int[Tensor, "b c"] | None = None,
    part: Part = "attn",
) -> dict[int, Float[Tensor, "b heads r k"]]:
    """Attention of some rows in some layers, as `hook_pattern` has it, without gradients.

    The pass ends behind the last layer asked, unless hooks are active, which may lie further on.

    Args:
        model: The model, with its active hooks at work.
        batch: Padded on either side.
        rows: Per sample, the positions of the queries; -1 for none. In a tower they are patches per row of the tower,
            in an encoder-decoder's text positions of the decoder.
        layers: Layer numbers from 0; None for all that have a pattern.
        heads: Only these; None for all.
        stack: `""` for the language model (the decoder), `"encoder"`, or `"vision"` for the tower.
        keys: Per sample, the columns to keep, -1 for none; None for all. The softmax is over all.
        part: `"xattn"` for cross-attention.

    Returns:
        Layer -> its rows, NaN where a row or key is -1.

    Raises:
        UnknownHookError: If a layer has no such pattern.
        BadInputError: If a row, key or head does not exist, or `rows` does not fit the pattern.
    """
    kept: dict[int, Tensor] = {}
    lacking = rows < 0

    def keep(layer: int, _: int, pattern: Tensor) -> None:
        pattern = pattern.masked_fill(lacking.to(pattern.device)[:, None, :, None], torch.nan)
        if keys is not None:
            own = keys.to(pattern.device)[:, None, None].expand(*pattern.shape[:3], -1)
            pattern = pattern.gather(3, own.clamp_min(0)).masked_fill(own < 0, torch.nan)
        kept[layer] = pattern

    each_row(model, batch, rows, keep, layers, heads, stack, part, columns=keys)
    return dict(sorted(kept.items()))


def each_row(
    model: HookedMM,
    batch: Batch,
    rows: Int[Tensor, "b r"],
    visit: Visit,
    layers: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    stack: Stack = "",
    part: Part = "attn",
    chunk: int | None = None,
    columns: Int[Tensor, "b c"] | None = None,
) -> None:
    """Show attention rows to a function that keeps of them what it needs, some rows at a time.

    Args:
        model, batch, rows, layers, heads, stack, part: As in `attention_rows`; rows of -1 are shown as row 0.
        visit: Called inside the forward pass, layer by layer in the order in which they run; see `Visit`.
        chunk: Rows per sample at a time, which bounds the memory; None for all at once.
        columns: Keys that must exist; only checked.

    Raises:
        UnknownHookError, BadInputError: As in `attention_rows`.
    """
    if rows.ndim != 2 or rows.is_floating_point() or not rows.numel() or int(rows.min()) < -1:
        raise BadInputError(
            f"rows are {rows.dtype} {tuple(rows.shape)}; give (samples, rows) whole numbers from 0 on, -1 for none"
        )
    if chunk is not None and chunk < 1:
        raise BadInputError(f"chunk={chunk}; give 1 row at a time at least, or None for all")
    every = pattern_layers(model, stack, part) if layers is None else [layers] if isinstance(layers, int) else layers
    taps = [_Tap(layer, rows, visit, heads, chunk or rows.shape[1], columns) for layer in dict.fromkeys(every)]
    with torch.no_grad(), _switched_on(model, stack, part, taps):
        # Active hooks may lie behind the last layer asked, and those before it may need to be seen, too.
        stop = None if model._active or model._active_backward else 0 if stack else max(every, default=-1) + 1
        model.run_with_hooks(batch, stop_at_layer=stop)
    for tap in taps:
        tap.check(_name(stack, part, tap.layer))


def _name(stack: Stack, part: Part, layer: int | str) -> str:
    return f"{stack}.blocks.{layer}.{part}.hook_pattern".lstrip(".")


@dataclass
class _Tap:
    """Stands in one attention module and takes the rows that were asked; what is wrong is told after the pass."""

    layer: int
    rows: Tensor
    visit: Visit
    heads: Sequence[int] | None
    chunk: int
    columns: Tensor | None
    passes: int = 0
    wrong: list[str] = field(default_factory=list)

    def __call__(self, pattern: PatternRows) -> None:
        """Once a pass of its module."""
        self.passes += 1
        self.wrong += self._faults(pattern.shape)
        if self.wrong or self.passes > 1:
            return
        rows, heads = self.rows.clamp_min(0), None if self.heads is None else torch.tensor(list(self.heads))
        for start in range(0, rows.shape[1], self.chunk):
            self.visit(self.layer, start, pattern.take(rows[:, start : start + self.chunk], heads))

    def _faults(self, shape: Sequence[int]) -> Iterator[str]:
        samples, heads, length, keys = shape
        if len(self.rows) != samples:
            yield f"has {samples} samples or rows of a tower, but rows are given for {len(self.rows)}; give one each"
        if int(self.rows.max()) >= length:
            yield f"has {length} queries, there is no row {int(self.rows.max())}; rows are counted from 0"
        if self.columns is not None and (len(self.columns) != samples or int(self.columns.max()) >= keys):
            yield (
                f"has {keys} keys for each of {samples} samples, but keys {tuple(self.columns.shape)} up to "
                f"{int(self.columns.max())} are asked; they are counted from 0"
            )
        if self.heads is not None and not all(0 <= head < heads for head in self.heads):
            yield f"has {heads} heads, but heads {list(self.heads)} are asked; they are counted from 0"

    def check(self, name: str) -> None:
        """Refuse what could not be read."""
        if self.wrong:
            raise BadInputError(f"{name} {self.wrong[0]}")
        if self.passes != 1:
            times = f"runs {self.passes} times in one forward pass" if self.passes else "is not reached by this batch"
            raise BadInputError(f"{name} {times}, so its rows are not known; look at others, or at other samples")


@contextmanager
def _switched_on(model: HookedMM, stack: Stack, part: Part, taps: Iterable[_Tap]) -> Iterator[None]:
    """While open, the attention modules of these layers show their rows."""
    runner, sites = model._runner, []
    try:
        for tap in taps:
            name = _name(stack, part, tap.layer)
            (name,) = match_names(name, model.hook_points, (), runner.unavailable)
            point = model.hook_points[name]
            assert point.tap is not None
            site = runner.sites[point.tap[0]]
            sites.append(site)
            site.taps.rows = tap
        yield
    finally:
        for site in sites:
            site.taps.rows = None
