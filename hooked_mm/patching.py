"""Activation patching: values of one run put into another.

Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.cache import ActivationCache
from hooked_mm.errors import BadInputError
from hooked_mm.interventions import Act, Intervention
from hooked_mm.positions import ALL, At, as_rule
from hooked_mm.runner import Hook, NamesFilter
from hooked_mm.value_layout import Layout, has_heads, head_mask, layout, whole_numbers
from hooked_mm.vectors import shown


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """x at the chosen positions becomes the source's x at its chosen positions, first to first, second to second, ...

    Each sample takes from one sample of the source; both must have chosen equally many positions. At tower and
    projector points an image takes from the image of the same place in the source's sample. Only what was given is
    patched, at the prefill: later steps of a generation read the patched prompt from the model's cache.

    Attributes:
        point: Names of text, tower or projector points.
        source: A cache that holds the point, or a tensor laid out as the point's values are.
        at: The positions patched.
        source_at: The positions taken from the source; None: the same rule, resolved in the source's batch.
        sample: Which sample of the source: one for all, or a list with one per sample of the batch; None: the same
            number, which needs equally many samples.
        batch: The batch a source tensor was read from; None: the batch that is run. A cache knows its own.
        heads: Only these heads, at points that have heads.
    """

    point: NamesFilter
    source: ActivationCache | Tensor
    at: At = ALL
    source_at: At = None
    sample: int | Sequence[int] | None = None
    batch: Batch | None = None
    heads: int | Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.source, ActivationCache | Tensor):
            raise BadInputError(f"source must be a cache or a tensor; got {type(self.source).__name__}")
        if isinstance(self.source, ActivationCache) and self.batch is not None:
            raise BadInputError("a cache knows its batch; leave batch= out")
        object.__setattr__(self, "at", as_rule(self.at))
        if self.source_at is not None:
            object.__setattr__(self, "source_at", as_rule(self.source_at))
        if self.heads is not None:
            object.__setattr__(self, "heads", whole_numbers("heads", self.heads))

    def acts(self) -> list[Act]:
        """One act at the point."""
        return [Act(self.point, self.apply)]

    def apply(self, value: Tensor, hook: Hook, where: Tensor | None = None) -> Tensor | None:
        """The patched activation; None at later steps of a generation.

        Args:
            value: The activation.
            hook: Where it was met.
            where: (rows, positions), narrows what is written; the alignment stays that of the whole rule.

        Raises:
            BadInputError: If samples, images, positions or widths of source and activation do not correspond.
        """
        if hook.step > 0:
            return None
        source, batch = self._source(hook)
        heads = has_heads(hook.name)
        width = value.shape[-1 - heads :]
        if source.ndim != value.ndim or source.shape[-1 - heads :] != width:
            raise BadInputError(
                f"the source is {tuple(source.shape)} and the value at {hook.name!r} {tuple(value.shape)}; they may "
                "differ in rows and positions only"
            )
        if self.heads is not None and not heads:
            raise BadInputError(f"heads={self.heads!r} was given, but {hook.name!r} has no heads; leave it out")
        here, there = layout(hook, value.shape), layout(Hook(hook.name, hook.layer, 0, batch), source.shape)
        rule, other = as_rule(self.at), as_rule(self.at if self.source_at is None else self.source_at)
        to, origin = self._align(here, rule.mask(here), there, other.mask(there))
        patched = value.reshape(*here.shape, *width).clone()
        if where is not None:
            keep = where.to(to.device).expand(here.shape)[to[0], to[1]]
            to, origin = to[:, keep], origin[:, keep]
        rows, columns = to.to(value.device)
        taken = source.reshape(*there.shape, *width)[tuple(origin.to(source.device))].to(value)
        if heads:
            chosen = head_mask(self.heads, value.shape[-2], hook.name, value.device)[None, :, None]
            taken = torch.where(chosen, taken, patched[rows, columns])
        return patched.index_put((rows, columns), taken).reshape(value.shape)

    def _source(self, hook: Hook) -> tuple[Tensor, Batch]:
        if isinstance(self.source, ActivationCache):
            return self.source[hook.name], self.source.batch
        return self.source, self.batch or hook.batch

    def _align(self, here: Layout, to: Tensor, there: Layout, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column indices written and read, (2, n) each, one beside the other."""
        offered = {(sample, image): places for sample, image, places in _chosen(there, origin)}
        written, read = [], []
        for sample, image, places in _chosen(here, to):
            other = self._other(sample, here.samples, there.samples)
            if (other, image) not in offered:
                raise BadInputError(
                    f"image {image} at {here.name!r} has no counterpart in the source's sample {other}", sample
                )
            taken = offered[other, image]
            if taken.shape != places.shape:
                raise BadInputError(
                    f"{places.shape[1]} positions at {here.name!r} are to be patched from {taken.shape[1]} of "
                    f"the source's sample {other}; choose equally many with at= and source_at=",
                    sample,
                )
            written.append(places)
            read.append(taken)
        return torch.cat(written, dim=1), torch.cat(read, dim=1)

    def _other(self, sample: int, samples: int, sources: int) -> int:
        """The source's sample that a sample takes from."""
        if self.sample is None:
            if samples != sources:
                raise BadInputError(
                    f"the batch has {samples} samples and the source {sources}; say which to take from with sample="
                )
            return sample
        if isinstance(self.sample, int):
            other = self.sample
        else:
            if len(self.sample) != samples:
                raise BadInputError(
                    f"sample={list(self.sample)} names {len(self.sample)} for a batch of {samples} samples"
                )
            other = self.sample[sample]
        if not -sources <= other < sources:
            raise BadInputError(f"sample {other} was asked of a source of {sources} samples")
        return other % sources

    def __repr__(self) -> str:
        return shown(self)


def _chosen(plan: Layout, mask: Tensor) -> list[tuple[int, int, Tensor]]:
    """Per row, or image of a packed row: its sample, its number among the sample's, and (row, column) indices."""
    units, images, samples = (
        plan.need(name, "patching").to(mask.device).expand(plan.shape) for name in ("unit", "image", "sample")
    )
    found = []
    for number in range(int(units.max()) + 1):
        own = units == number
        row, column = (int(item) for item in own.nonzero()[0])
        places = (own & mask).nonzero().T
        found.append((int(samples[row, column]), int(images[row, column]), places))
    return found
