"""What the positions of one activation hold, in a forward pass as in every step of a generation.

- At step s of a generation a sample consists of the P positions it was given and of s generated ones (modality text,
  role answer); an activation of p positions holds the last p of those P + s.
- Beam search and several returned sequences give k rows per sample, one after the other.
- Tower and projector points hold one row per image, or all images' patches in one packed row; patches have no role.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.errors import BadInputError
from hooked_mm.runner import Hook

_HEADS = re.compile(r"attn\.hook_(q|k|v|z|rot_q|rot_k|result)$")
_NO_POSITIONS = re.compile(r"hook_pattern$|xattn\.hook_(k|v|rot_k)$")


def is_tower(name: str) -> bool:
    """Whether a hook point lies before the language model: in the vision tower or the projector."""
    return name.startswith(("vision.", "projector."))


def has_heads(name: str) -> bool:
    """Whether a hook point's values are (..., heads, d_head)."""
    return _HEADS.search(name) is not None


@dataclass(frozen=True)
class Layout:
    """What the positions of one activation hold. Tensors broadcast to (rows, positions).

    Attributes:
        name: The hook point.
        samples: Samples in the batch.
        shape: (rows, positions).
        has_given: Whether any position was given, not generated.
        modality: Values of `Modality`.
        role: Values of `Role`; None for patches.
        own: The how-manieth token of its sample (or patch of its image) a position is; -1 for padding. None where a
            packed row can't be split into images.
        length: How many tokens the sample was given (or patches its image has). None as for `own`.
        last_prompt: Where the answer's first token is predicted; None for patches.
        generated: Tokens the model has generated in this run; None for patches.
        unit: Which row a position belongs to, or which image of a packed row.
        image: The how-manieth row (image, at tower points) of its sample that is; copies in beam search count once.
        sample: The sample a position belongs to. None where that can't be told.
    """

    name: str
    samples: int
    shape: tuple[int, int]
    has_given: bool
    modality: Int[Tensor, "r p"]
    role: Int[Tensor, "r p"] | None
    own: Int[Tensor, "r p"] | None
    length: Int[Tensor, "r p"] | None
    last_prompt: Bool[Tensor, "r p"] | None
    generated: Bool[Tensor, "r p"] | None
    unit: Int[Tensor, "r p"] | None
    image: Int[Tensor, "r p"] | None
    sample: Int[Tensor, "r p"] | None

    def need(self, field: str, what: str) -> Tensor:
        """A field that `what` can't do without.

        Raises:
            BadInputError: If this activation does not have it.
        """
        value: Tensor | None = getattr(self, field)
        if value is not None:
            return value
        if is_tower(self.name) and field in ("role", "last_prompt", "generated"):
            why = "it holds image patches, which are no tokens; choose by modality, index or sample"
        else:
            why = f"its {self.shape} rows and positions can't be traced to single images"
        raise BadInputError(f"{what} was asked for at {self.name!r}, but {why}")

    def pick(self, values: Tensor, what: str) -> Tensor:
        """`values` (samples, ...), one per sample, as (rows or 1, positions or 1, ...).

        Raises:
            BadInputError: If there is not one per sample of the batch.
        """
        if values.shape[0] != self.samples:
            raise BadInputError(
                f"{what} of shape {tuple(values.shape)} is one per sample for {values.shape[0]}, but the batch has "
                f"{self.samples} samples"
            )
        return values[self.need("sample", f"{what} per sample").to(values.device)]


def layout(hook: Hook, shape: Sequence[int]) -> Layout:
    """What the positions of an activation of this shape hold.

    Args:
        hook: Where the activation was met: name, step and batch count.
        shape: (rows, positions, ...), or (positions, ...) in a tower that packs its images.

    Raises:
        BadInputError: If the shape can't come from the batch, or if the point has no (row, position) dimensions.
    """
    if _NO_POSITIONS.search(hook.name):
        raise BadInputError(
            f"{hook.name!r} is not laid out by positions of the text; to cut attention between positions, use KnockOut"
        )
    if not is_tower(hook.name):
        return row_layout(hook, shape[0], shape[1])
    packed = len(shape) - has_heads(hook.name) == 2
    return _packed_layout(hook, shape[0]) if packed else row_layout(hook, shape[0], shape[1])


def row_layout(hook: Hook, rows: int, count: int) -> Layout:
    """The layout of an activation of so many rows and positions, whatever its other dimensions; towers not packed."""
    if is_tower(hook.name):
        return patch_layout(hook.name, hook.batch, rows, count)
    batch = hook.batch
    # In an encoder-decoder model the given positions are the encoder's; the decoder has its own.
    if batch.decoder is not None and not hook.name.startswith("encoder."):
        batch = batch.decoder
    return token_layout(hook.name, batch, hook.step, rows, count)


def token_layout(name: str, batch: Batch, step: int, rows: int, count: int) -> Layout:
    """The layout of an activation of the language model that holds the last `count` positions at this step.

    Raises:
        BadInputError: If rows are not a multiple of the samples, or positions more than there can be.
    """
    samples, given = batch.modality.shape
    if rows % samples or not rows:
        raise BadInputError(
            f"the value at {name!r} has {rows} rows, which is no multiple of the batch's {samples} samples"
        )
    if count > given + step:
        raise BadInputError(
            f"the value at {name!r} has {count} positions at step {step}, but the batch has {given} and {step} were "
            "generated; was the model run on other inputs, or with a static cache?"
        )
    device, times = batch.modality.device, rows // samples
    new = min(count, step)
    columns = slice(given - (count - new), given)
    real = batch.modality != Modality.PAD
    length = real.sum(dim=1, keepdim=True)
    order = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
    later = torch.arange(step - new, step, device=device)
    last = torch.arange(given, device=device) == batch.last_prompt()[:, None]

    def joined(old: Tensor, fill: Tensor | int) -> Tensor:
        tail = torch.as_tensor(fill, device=device).to(old.dtype).expand(samples, new)
        return torch.cat([old[:, columns], tail], dim=1).repeat_interleave(times, dim=0)

    return Layout(
        name=name,
        samples=samples,
        shape=(rows, count),
        has_given=count > new,
        modality=joined(batch.modality, int(Modality.TEXT)),
        role=joined(batch.role, int(Role.ANSWER)),
        own=joined(order, length + later),
        length=length.repeat_interleave(times, dim=0),
        last_prompt=joined(last, 0),
        generated=(torch.arange(count, device=device) >= count - new)[None],
        unit=torch.arange(rows, device=device)[:, None],
        image=torch.zeros(1, 1, dtype=torch.long, device=device),
        sample=torch.arange(samples, device=device).repeat_interleave(times)[:, None],
    )


def patch_layout(name: str, batch: Batch, rows: int, count: int) -> Layout:
    """The layout of a tower or projector point with one row per image (k rows per image in beam search)."""
    owner = batch.image_sample
    device, images = owner.device, owner.shape[0]
    sample = image = None
    pixels = batch.inputs.get("pixel_values")
    # More rows than images are beams only if the tower sees an image as one row: otherwise they may be tiles.
    one_row = pixels is not None and pixels.ndim == 4 and pixels.shape[0] == images
    if images and (rows == images or (one_row and rows % images == 0)):
        sample, image = (item.repeat_interleave(rows // images)[:, None] for item in (owner, _image_numbers(owner)))
    return _patches(
        name,
        batch,
        (rows, count),
        own=torch.arange(count, device=device)[None],
        length=torch.full((1, 1), count, device=device),
        unit=torch.arange(rows, device=device)[:, None],
        image=image,
        sample=sample,
    )


def _packed_layout(hook: Hook, count: int) -> Layout:
    """The layout of a tower that packs the patches of all images into one row."""
    batch = hook.batch
    owner = batch.image_sample
    device, images = owner.device, owner.shape[0]
    grid = batch.inputs.get("image_grid_thw")
    sizes: list[int] = [count] if images == 1 else []
    if grid is not None:
        patches = grid.prod(dim=-1)
        if hook.name == "projector.hook_out":
            # Behind the projector several patches have become one image token.
            patches = patches * (batch.modality == Modality.IMAGE).sum() // patches.sum()
        sizes = patches.tolist()
    if len(sizes) != images or not sum(sizes) or count % sum(sizes):
        return _patches(hook.name, batch, (1, count), own=None, length=None, unit=None, image=None, sample=None)
    # Generation repeats all images of a sample before those of the next.
    times, owners = count // sum(sizes), owner.tolist()
    order = [
        image
        for sample in range(len(batch))
        for _ in range(times)
        for image in range(images)
        if owners[image] == sample
    ]
    repeats = torch.tensor([sizes[image] for image in order], device=device)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(repeats)[None]

    first = repeats.cumsum(dim=0) - repeats
    return _patches(
        hook.name,
        batch,
        (1, count),
        own=torch.arange(count, device=device)[None] - spread(first),
        length=spread(repeats),
        unit=spread(torch.arange(len(order), device=device)),
        image=spread(_image_numbers(owner)[order]),
        sample=spread(owner[order]),
    )


def _image_numbers(owner: Tensor) -> Tensor:
    """For every image, how many of its sample's images come before it."""
    return (owner[:, None] == owner[None]).tril(-1).sum(dim=1)


def _patches(name: str, batch: Batch, shape: tuple[int, int], **known: Tensor | None) -> Layout:
    image = torch.full((1, 1), int(Modality.IMAGE), device=batch.image_sample.device)
    return Layout(name, len(batch), shape, True, image, role=None, last_prompt=None, generated=None, **known)


def whole_numbers(name: str, value: Any) -> int | tuple[int, ...]:
    """A number or several, the latter as a tuple.

    Raises:
        BadInputError: If they are not whole numbers, or none.
    """
    several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not several or not all(isinstance(item, int) and not isinstance(item, bool) for item in several):
        raise BadInputError(f"{name}={value!r}; it must be a whole number or several of them")
    return value if isinstance(value, int) else tuple(value)


def head_mask(heads: int | Sequence[int] | None, count: int, name: str, device: torch.device) -> Tensor:
    """(count,), the chosen heads; None chooses all.

    Raises:
        BadInputError: If a head does not exist.
    """
    if heads is None:
        return torch.ones(count, dtype=torch.bool, device=device)
    chosen = [heads] if isinstance(heads, int) else list(heads)
    wrong = [head for head in chosen if not -count <= head < count]
    if wrong:
        raise BadInputError(f"head {wrong[0]} was asked for, but {name!r} has {count} heads")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return mask.to(device)
