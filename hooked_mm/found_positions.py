"""Image positions of models whose inputs do not mark them: another picture is shown, and what it changes is image.

Some models make room for images themselves, in front of the tokens (GIT) or behind them (UDOP): the stream then has
more positions than there are ids, and those are the image's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_mm.architectures import IMAGE_MASK_NAMES
from hooked_mm.layout_source import pictures
from hooked_mm.structure import Structure


@dataclass(frozen=True)
class Found:
    """Positions of a stream.

    Attributes:
        image: (b, p) bool, where the image stands.
        before: How many positions the model puts in front of the ids.
        behind: How many it puts behind them.
    """

    image: Bool[Tensor, "b p"]
    before: int = 0
    behind: int = 0

    def widened(self, value: Tensor, fill: Tensor | int) -> Tensor:
        """What is said of every id, said of every position; the others get `fill` (a number, or (b, p))."""
        whole = torch.as_tensor(fill, device=value.device).to(value.dtype).expand(self.image.shape).clone()
        whole[:, self.before : whole.shape[1] - self.behind] = value
        return whole


def other_pictures(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Other pictures of the same shapes; padding crops, tiles and patches are all zero and stay so."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, pixels in pictures(inputs).items():
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        if name == "flattened_patches":
            # Each patch stands behind its row and column.
            noise = noise * pixels.any(dim=-1, keepdim=True)
            noise[..., :2] = 0
        elif pixels.ndim > 3:
            noise = noise * (pixels.flatten(-3).abs().amax(-1) > 0)[..., None, None, None]
        found[name] = pixels + noise
    return found


def find_positions(model: nn.Module, structure: Structure, inputs: Mapping[str, Any]) -> Found | None:
    """Where the stream that holds the images depends on the pictures; None if a token or a mask says where they stand.

    Args:
        model: The transformers model.
        structure: Its structure.
        inputs: Its forward tensors.
    """
    named = structure.image_token_id is not None or any(name in inputs for name in IMAGE_MASK_NAMES)
    if named or structure.cross_attention or "input_ids" not in inputs or not pictures(inputs):
        return None
    block = (structure.encoder or structure.text).blocks[0].path
    first = _entering(model, block, inputs)
    other = _entering(model, block, {**inputs, **other_pictures(inputs)})
    changed = (first != other).any(dim=-1)
    length = inputs["input_ids"].shape[1]
    more = changed.shape[1] - length
    if more <= 0:
        return Found(changed)
    # What was put in comes before or behind all ids; where tokens change too, features are added to them.
    before = more if bool(changed[:, :more].all()) else 0
    added = torch.zeros_like(changed)
    added[:, slice(0, more) if before else slice(length, None)] = True
    return Found(changed & added, before, more - before)


class _Enough(Exception):
    """The block is reached; nothing more is needed."""


def _entering(model: nn.Module, block: str, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b p d"]:
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).clone())
        raise _Enough

    handle = model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]
