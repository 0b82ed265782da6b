"""What a run has read: activations by hook name, selected by modality, role, sample and position; decomposed, saved.

The residual stream (decomposition, logit attribution) is in `residual`, the file format in `cache_file`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mm.attribution import Weights, stacked
from hooked_mm.batch import Batch, Modality, Role, parse_modality
from hooked_mm.cache_file import load_cache, save_cache
from hooked_mm.errors import BadInputError, StoreError, UnknownHookError, nearest
from hooked_mm.hook_points import HookPoint
from hooked_mm.layout import Where
from hooked_mm.residual import ResidualViews


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


class ActivationCache(ResidualViews):
    """Activations of one run by hook name, in execution order.

    Text points are (batch, pos, ...), vision and projector points (crops, patches, ...), or packed (patches, ...).

    Args:
        values: Activations by hook name.
        batch: What the run was on.
        points: All hook points of the model.
        model: For what needs weights (norms, heads, logits); everything else works without.
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        batch: Batch,
        points: Mapping[str, HookPoint],
        model: Weights | None = None,
    ) -> None:
        self._values, self._points, self._model = values, points, model
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
            if self[name].shape[:2] != batch.modality.shape:
                raise BadInputError(
                    f"{name!r} {tuple(self[name].shape)} does not have the positions of the text "
                    f"{tuple(batch.modality.shape)}; index it itself"
                )
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

    def _index(
        self,
        name: str,
        modality: str | Modality | None = None,
        role: str | Role | None = None,
        sample: int | None = None,
        positions: int | Sequence[int] | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Int[Tensor, " n"]]:
        """Where the chosen rows of a point's sheet lie, (row, place), and the sample of each."""
        keep, owner = self._mask(name, modality, role, sample)
        if positions is not None:
            text = self._points[name].stream not in ("vision", "projector")
            own = self._positions(name).mask() if text else self._mask(name, None, None, None)[0]
            if self.batch.layout.kind == "packed" and not text:
                # One row holds the patches of all images: those of one sample are counted together.
                samples = owner.unique()
                each = own & (owner == samples[:, None])
                keep = keep & chosen_positions(each, (each & keep).any(dim=1), positions, samples).any(dim=0)
            else:
                keep = keep & chosen_positions(own, keep.any(dim=1), positions, owner[:, 0])
        rows, places = keep.nonzero(as_tuple=True)
        return (rows, places), owner[rows, places]

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
        if point.stream == "vision" or name == "projector.hook_in":
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
        positions: int | Sequence[int] | None = None,
    ) -> Selection:
        """The rows of one activation at the positions asked for, padding never among them, in the batch's order.

        Args:
            name: Hook name.
            modality: `"image"`, `"text"` or None for both.
            role: `"template"`, `"question"`, `"answer"` or None for all.
            sample: Index in the batch, or None for all.
            positions: One or several numbers among a sample's own tokens (an image's patches): padding is not
                counted, -1 is the last. All conditions must hold.

        Raises:
            UnknownHookError: If the name was not cached.
            BadInputError: If modality, role, sample or a position do not exist.
        """
        values = self[name]
        if self._points[name].form == "pattern":
            raise BadInputError(
                f"{name!r} is (b, heads, queries, keys), which has no rows per position; index it itself"
            )
        index, samples = self._index(name, modality, role, sample, positions)
        return Selection(self._take(values, index, self._points[name].stream), samples, index[1])

    def stack(
        self,
        point: str,
        modality: str | Modality | None = None,
        role: str | Role | None = None,
        sample: int | None = None,
        positions: int | Sequence[int] | None = None,
    ) -> Float[Tensor, "layers n ..."]:
        """One point over all cached layers, (layers, n, ...).

        Args:
            point: The name within a block, `"resid_post"`, `"hook_resid_post"` or `"attn.hook_z"`; with `vision.` or
                `encoder.` in front for those stacks.
            modality: As in `select`.
            role: As in `select`.
            sample: As in `select`.
            positions: As in `select`.

        Raises:
            UnknownHookError: If no layer of that point was cached.
        """
        prefix = next((stack for stack in ("vision.", "encoder.") if point.startswith(stack)), "")
        inner = point.removeprefix(prefix)
        wanted = {f"{prefix}blocks.{{l}}.{inner}", f"{prefix}blocks.{{l}}.hook_{inner}"}
        names = [
            name
            for name in self
            if self._points[name].layer is not None and _template(name, self._points[name].layer) in wanted
        ]
        if not names:
            raise UnknownHookError(f"no layer of {point!r} was cached{nearest(f'{prefix}blocks.0.hook_{inner}', self)}")
        return stacked(self.select(name, modality, role, sample, positions).values for name in names)

    def grad(self, name: str) -> Tensor:
        """The gradient of an activation, after `backward()` was called on something made of the logits.

        Args:
            name: A hook name that was cached by `run_with_cache(..., grad=True)`.

        Raises:
            UnknownHookError: If the name was not cached.
            BadInputError: If the run kept no gradients, nothing was differentiated yet, or it does not depend on this.
        """
        value = self[name]
        if not value.requires_grad:
            raise BadInputError(f"the run kept no gradient of {name!r}; call run_with_cache(..., grad=True)")
        if value.grad is None:
            raise BadInputError(
                f"there is no gradient of {name!r}: call backward() on a number made of the logits first; if you did, "
                "that number does not depend on it"
            )
        return value.grad

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> ActivationCache:
        """The same cache with its values on another device or of another dtype."""
        moved = {name: value.to(device, dtype or value.dtype) for name, value in self._values.items()}
        return ActivationCache(moved, self.batch, self._points, model=self._model)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file (see `cache_file`), wholly or not at all; the path.

        Raises:
            BadInputError: If the path is a folder.
        """
        return save_cache(path, self._values, self.batch, self._points, _identity(self._model))

    @classmethod
    def load(
        cls, path: str | Path, model: Weights | None = None, *, device: str | torch.device = "cpu"
    ) -> ActivationCache:
        """The cache that `save` wrote, bit for bit.

        Args:
            path: The file.
            model: The `HookedMM` of the run, for what needs weights.
            device: Where values and batch shall lie.

        Raises:
            StoreError: If the file is missing, damaged or something else, or the model is another one.
        """
        values, batch, points, described = load_cache(path, str(device))
        here, there = _identity(model), described["model"]
        if here is not None and there is not None and here != there:
            raise StoreError(
                f"{str(path)!r} is from another model ({there}) than the one given ({here}); give that one"
            )
        return cls(values, batch, points, model=model)


def _identity(model: Weights | None) -> dict[str, Any] | None:
    """What a file says about its model, enough to notice another one."""
    if model is None:
        return None
    text = model.structure.text
    return {"family": model.structure.family, "n_layers": text.n_layers, "d_model": text.d_model}


def chosen_positions(
    own: Bool[Tensor, "n p"],
    asked: Bool[Tensor, " n"],
    positions: int | Sequence[int],
    owner: Int[Tensor, " n"],
) -> Bool[Tensor, "n p"]:
    """Positions given by number among a row's own (padding not counted), negative ones from their end.

    Args:
        own: Which positions are the row's own.
        asked: Rows that must have all of them.
        positions: One or several numbers; order and repetition do not matter.
        owner: The sample of each row, for the error.

    Raises:
        BadInputError: If a row that is asked has fewer positions.
    """
    number = own.long().cumsum(dim=1) - 1
    length = own.sum(dim=1)
    chosen = torch.zeros_like(own)
    for position in [positions] if isinstance(positions, int) else positions:
        target = length + position if position < 0 else torch.full_like(length, position)
        lacking = asked & ((target < 0) | (target >= length))
        if bool(lacking.any()):
            row = int(lacking.nonzero()[0])
            raise BadInputError(f"position {position} asked of {int(length[row])} positions", int(owner[row]))
        chosen |= own & (number == target[:, None])
    return chosen


def _template(name: str, layer: int | None) -> str:
    return name.replace(f"blocks.{layer}.", "blocks.{l}.", 1)
