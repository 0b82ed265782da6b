"""What the positions of one activation hold, in a forward pass as in every step of a generation.

- At step s of a generation a sample consists of the P positions it was given and of s generated ones (modality text,
  role answer); an activation of p positions holds the last p of those P + s.
- Beam search and several returned sequences give k rows per sample, one after the other.
- Tower and projector points hold rows of patches, several rows if an image was cut into crops, or all images' patches
  in one packed row (`batch.layout`); patches have no role. Patches that only fill rows up are padding.
- In an encoder-decoder model text points hold the decoder's positions, and the keys and values of its cross-attention
  those of the encoder. Where text attends to patches, keys and values are laid out as these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.errors import BadInputError
from hooked_mm.runner import Hook

# Also `xattn.`, and with any prefix (`encoder.`, `vision.`).
_HEADS = re.compile(r"attn\.hook_(q|k|v|z|rot_q|rot_k|result)$")
_CROSS_KEYS = re.compile(r"xattn\.hook_(k|v|rot_k)$")


def stream_of(name: str) -> Literal["tower", "encoder", "text"]:
    """Whose positions a hook point has: patches (tower and projector), the text encoder's, or the language model's."""
    if name.startswith(("vision.", "projector.")):
        return "tower"
    return "encoder" if name.startswith("encoder.") else "text"


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
        own: The how-manieth token of its sample a position is (or patch of its image, crop by crop as the tower has
            them, a leading class token counted); -1 for padding. None where that can't be told.
        length: How many tokens the sample was given (or patches its image has). None as for `own`.
        last_prompt: Where the answer's first token is predicted; None for patches.
        generated: Tokens the model has generated in this run; None for patches.
        unit: Which row a position belongs to (at tower points which image, copies in beam search apart); -1: none.
        image: The how-manieth image of its sample that is, copies in beam search counted once; 0 for text, -1: none.
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

    @property
    def patches(self) -> bool:
        """Whether these are patches, not tokens."""
        return self.role is None

    def need(self, field: str, what: str) -> Tensor:
        """A field that `what` can't do without.

        Raises:
            BadInputError: If this activation does not have it.
        """
        value: Tensor | None = getattr(self, field)
        if value is not None:
            return value
        if self.patches and field in ("role", "last_prompt", "generated"):
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
        shape: (rows, positions, ...), or as the tower has it: (patches, ...), (samples, images, tiles, patches, ...).

    Raises:
        BadInputError: If the shape can't come from the batch, or if the point has no (row, position) dimensions.
    """
    if hook.name.endswith("hook_pattern"):
        raise BadInputError(
            f"{hook.name!r} is not laid out by positions of the text; to cut attention between positions, use KnockOut"
        )
    places = tuple(shape[: len(shape) - 1 - has_heads(hook.name)])
    if _CROSS_KEYS.search(hook.name):
        if hook.batch.layout.kind == "cross":
            return patch_layout(hook.name, hook.batch, places)
        return token_layout(hook.name, hook.batch, 0, *places)
    if stream_of(hook.name) == "tower":
        return patch_layout(hook.name, hook.batch, places)
    return row_layout(hook, *places)


def row_layout(hook: Hook, rows: int, count: int) -> Layout:
    """The layout of an activation of so many rows and positions, whatever its other dimensions."""
    stream, batch = stream_of(hook.name), hook.batch
    if stream == "tower":
        return patch_layout(hook.name, batch, (rows, count))
    # In an encoder-decoder model the given positions are the encoder's; the decoder has its own.
    if batch.decoder is not None and stream == "text":
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


def patch_layout(name: str, batch: Batch, places: tuple[int, ...]) -> Layout:
    """The layout of a value of patches, or of what the projector made of them; in beam search with copies of all.

    Args:
        name: The hook point.
        batch: The batch, whose layout knows the tower's rows.
        places: The value's dimensions before heads and width.

    Raises:
        BadInputError: If there are not two of them where the tower has rows.
    """
    known = batch.layout
    rows, count = _sheet(batch, places)
    device, owner = known.image_sample.device, known.tower_image
    image = torch.full((1, 1), int(Modality.IMAGE), device=device)
    lost = Layout(name, len(batch), (rows, count), True, image, *[None] * 8)
    packed = known.kind == "packed"
    # Behind the projector several patches have become one image token.
    base = int((batch.image_index >= 0).sum()) if packed and name == "projector.hook_out" else 0
    base = base or (0 if owner is None else len(owner))
    if owner is None or not base or (count if packed else rows) % base:
        return lost
    times = (count if packed else rows) // base
    entry = known.owners(1, base)[0] if packed else owner
    sample = torch.where(
        entry >= 0, known.image_sample[entry], torch.arange(base, device=device) * len(batch) // max(1, base)
    )
    order, copy = _copies(_repeated(batch, entry, sample), times)
    number = torch.where(entry >= 0, _image_numbers(known.image_sample)[entry], -1)
    unit = torch.where(entry[order] >= 0, entry[order] * times + copy, -1)
    # Windows of a tower of stages stand in rows of their own, which look like copies: places in them have no order.
    windows = times > 1 and not packed and not known.patches and "attn." in name
    columns = [item[None] if packed else item[:, None] for item in (entry[order] if windows else unit, number[order])]
    owners = entry[order][None] if packed else known.owners(base, count)[order]
    real = owners >= 0
    own, length = (None, None) if windows else _count(columns[0].expand(rows, count), real)
    return Layout(
        name=name,
        samples=len(batch),
        shape=(rows, count),
        has_given=True,
        modality=torch.where(real, int(Modality.IMAGE), int(Modality.PAD)),
        role=None,
        own=own,
        length=length,
        last_prompt=None,
        generated=None,
        unit=columns[0],
        image=columns[1],
        sample=sample[order][None] if packed else sample[order][:, None],
    )


def _sheet(batch: Batch, places: tuple[int, ...]) -> tuple[int, int]:
    """(rows, places) of a value: packed as one row, an image's tiles one behind the other."""
    known = batch.layout
    if known.kind == "packed":
        return 1, math.prod(places)
    if known.kind == "cross" and len(places) == 4:
        return places[0] * places[1], places[2] * places[3]
    if len(places) != 2:
        raise BadInputError(f"a value of {places} places is none of this batch's tower, which has rows of patches")
    rows, count = places
    # Keys of cross-attention have a row per tile.
    if known.kind == "cross" and known.places(count, known.patches) is None and rows % known.tiles == 0:
        return rows // known.tiles, count * known.tiles
    return rows, count


def _repeated(batch: Batch, entry: Int[Tensor, " n"], sample: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """What generation repeats as a whole, for every row (or packed patch): a row of `pixel_values`, or a sample."""
    pixels = batch.inputs.get("pixel_values")
    if batch.layout.kind == "packed" or pixels is None:
        return sample
    if pixels.ndim == 4:
        return torch.arange(len(entry), device=entry.device)
    return entry if batch.layout.kind == "newline" else sample


def _copies(item: Int[Tensor, " n"], times: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Items repeated one after the other, each `times` as a whole: which entry stands where, and in which copy."""
    entry = torch.arange(len(item), device=item.device).repeat(times)
    copy = torch.arange(times, device=item.device).repeat_interleave(len(item))
    order = (item[entry] * times + copy).argsort(stable=True)
    return entry[order], copy[order]


def _count(unit: Int[Tensor, "r p"], real: Bool[Tensor, "r p"]) -> tuple[Int[Tensor, "r p"], Int[Tensor, "r p"]]:
    """The how-manieth real place of its unit each is, -1 for others; and how many real places its unit has."""
    mine = unit[real]
    total = torch.bincount(mine, minlength=1)
    order = mine.argsort(stable=True)
    place = torch.empty_like(mine)
    place[order] = torch.arange(len(mine), device=mine.device) - (total.cumsum(dim=0) - total)[mine[order]]
    own = torch.full_like(unit, -1)
    own[real] = place
    return own, torch.where(unit >= 0, total[unit], 0)


def _image_numbers(owner: Tensor) -> Tensor:
    """For every image, how many of its sample's images come before it."""
    return (owner[:, None] == owner[None]).tril(-1).sum(dim=1)


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
