"""What a run has read: activations by hook name, selected by modality, role and sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mm.batch import Batch, Modality, Role, parse_modality
from hooked_mm.errors import BadInputError, UnknownHookError, nearest
from hooked_mm.hook_points import HookPoint
from hooked_mm.layout import Where


@dataclass(frozen=True)
class Selection:
    """Selected rows of one activation: `values` (n, ...), and where each row comes from.

    `sample` (n,) is the index in the batch; `position` (n,) the position in the sequence, or the patch index for
    vision and projector points (in a packed tower, the place in the pack).
    """

    values: Float[Tensor, "n ..."]
    sample: Int[Tensor, " n"]
    position: Int[Tensor, " n"]

    def __len__(self) -> int:
        return self.values.shape[0]


class ActivationCache(Mapping[str, Tensor]):
    """Activations of one run by hook name, in execution order.

    Text points are (batch, pos, ...), vision and projector points (crops, patches, ...), or packed (patches, ...).
    """

    def __init__(self, values: dict[str, Tensor], batch: Batch, points: Mapping[str, HookPoint]) -> None:
        self._values, self._points = values, points
        self.batch = batch

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._values[name]
        except KeyError:
            why = "was not cached; name it in names_filter" if name in self._points else "is not a hook of this model"
            raise UnknownHookError(f"{name!r} {why}{nearest(name, self._values)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in list(self._values.items())[:3])
        return f"ActivationCache({len(self)} activations: {shapes}{', ...' if len(self) > 3 else ''})"

    def _mask(
        self, name: str, modality: str | Modality | None, role: str | Role | None, sample: int | None
    ) -> tuple[Bool[Tensor, "n p"], Int[Tensor, "n p"]]:
        """Which (row, position) are chosen, and the sample each belongs to."""
        if self._points[name].stream not in ("vision", "projector"):
            batch = self._positions(name)
            samples = torch.arange(len(batch), device=batch.modality.device)
            return batch.mask(modality, role, sample), samples[:, None].expand_as(batch.modality)
        if role is not None:
            raise BadInputError(f"{name!r} holds image patches, which have no role; leave role={role!r} out")
        layout = self.batch.layout
        image = layout.owners(*layout.sheet(self[name]).shape[:2])
        keep = image >= 0
        owner = layout.image_sample[image.clamp_min(0)]
        if modality is not None and parse_modality(modality) != Modality.IMAGE:
            keep[:] = False
        if sample is not None:
            keep &= owner == sample % len(self.batch)
        return keep, owner

    def _positions(self, name: str) -> Batch:
        """The batch whose positions a text point has: an encoder-decoder's text points are its decoder's."""
        if self.batch.decoder is not None and self._points[name].stream == "text":
            return self.batch.decoder
        return self.batch

    def grid(self, name: str, sample: int, overview: bool = False) -> list[Float[Tensor, "rows cols ..."]]:
        """The values of one activation laid out as its images are, one tensor per image of the sample.

        Crops are stitched at the finest resolution. NaN where an image has no position or patch: a border that the
        model cut off.

        Args:
            name: Hook name: of the text (image positions), the projector or the tower (patches, class token left out).
            sample: Index in the batch.
            overview: The small overview that some models see beside the crops, instead of the crops.

        Raises:
            UnknownHookError: If the name was not cached.
            BadInputError: If there is no such sample, or no grid; it says why.
        """
        value, point, layout = self[name], self._points[name], self.batch.layout
        if not -len(self.batch) <= sample < len(self.batch):
            raise BadInputError(f"sample {sample} asked of a batch of {len(self.batch)}")
        where: Where = "sequence"
        if point.stream == "vision" or (point.stream == "projector" and point.side == "input"):
            # Some projectors are fed merged patches.
            merged = point.stream == "projector" and layout.patches and not layout.fits_patches(value)
            where = "tokens" if merged else "patches"
        elif point.stream == "projector":
            where = "tokens"
        elif self._positions(name) is not self.batch or value.shape[:2] != self.batch.modality.shape:
            raise BadInputError(f"{name!r} {tuple(value.shape)} does not have the batch's positions, so it has no grid")
        images = (layout.image_sample == sample % len(self.batch)).nonzero()[:, 0].tolist()
        return [layout.read(image, value, where, overview=overview) for image in images]

    def select(
        self,
        name: str,
        modality: str | Modality | None = None,
        role: str | Role | None = None,
        sample: int | None = None,
    ) -> Selection:
        """The rows of one activation at the positions asked for, padding never among them.

        Args:
            name: Hook name.
            modality: `"image"`, `"text"` or None for both.
            role: `"template"`, `"question"`, `"answer"` or None for all.
            sample: Index in the batch, or None for all.

        Raises:
            UnknownHookError: If the name was not cached.
            BadInputError: If modality, role or sample do not exist.
        """
        values = self[name]
        if self._points[name].stream in ("vision", "projector"):
            values = self.batch.layout.sheet(values)
        keep, owner = self._mask(name, modality, role, sample)
        rows, positions = keep.nonzero(as_tuple=True)
        return Selection(values[rows.to(values.device), positions.to(values.device)], owner[rows, positions], positions)

    def stack(
        self,
        point: str,
        modality: str | Modality | None = None,
        role: str | Role | None = None,
        sample: int | None = None,
    ) -> Float[Tensor, "layers n ..."]:
        """One point over all cached layers, (layers, n, ...).

        Args:
            point: The name within a block, `"resid_post"`, `"hook_resid_post"` or `"attn.hook_z"`; for the tower
                with `vision.` in front.
            modality: As in `select`.
            role: As in `select`.
            sample: As in `select`.

        Raises:
            UnknownHookError: If no layer of that point was cached.
        """
        prefix, inner = ("vision.", point[len("vision.") :]) if point.startswith("vision.") else ("", point)
        wanted = {f"{prefix}blocks.{{l}}.{inner}", f"{prefix}blocks.{{l}}.hook_{inner}"}
        names = [
            name
            for name in self
            if self._points[name].layer is not None and _template(name, self._points[name].layer) in wanted
        ]
        if not names:
            raise UnknownHookError(f"no layer of {point!r} was cached{nearest(f'{prefix}blocks.0.hook_{inner}', self)}")
        return torch.stack([self.select(name, modality, role, sample).values for name in names])

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> ActivationCache:
        """The same cache with its values on another device or of another dtype."""
        moved = {name: value.to(device, dtype or value.dtype) for name, value in self._values.items()}
        return ActivationCache(moved, self.batch, self._points)


def _template(name: str, layer: int | None) -> str:
    return name.replace(f"blocks.{layer}.", "blocks.{l}.", 1)
