"""Which part of a picture a grid of patches covers: processors pad, crop and stretch before they cut.

A box (left, top, right, bottom) is in pixels of the picture; it reaches beyond the picture where a processor pads.

| rule | processors | the grid covers |
|---|---|---|
| `centre` | LLaVA-NeXT, LLaVA-OneVision, Molmo | a canvas of the grid's shape, the picture in its middle |
| `corner` | Mllama | a canvas of the grid's shape, the picture in its top left corner |
| `square` | LLaVA with `do_pad` | a square around the picture |
| `crop` | any with `do_center_crop` | the middle, where the shorter side was resized |
| `patches` | Idefics2 | the picture but for a border narrower than a patch |
| `whole` | all others | the picture, stretched if need be |

The small overview that some models see beside the crops covers the whole picture, stretched (LLaVA-NeXT, Idefics2), or
a canvas as the crops do (Molmo).

Add a processor whose grid covers something else: a row of `RULES`, and of `OVERVIEWS`.
"""

from __future__ import annotations

from typing import Any, Protocol

from PIL import Image

from hooked_mm.errors import BadInputError

Box = tuple[float, float, float, float]

RULES = {
    "LlavaNextImageProcessor": "centre",
    "LlavaOnevisionImageProcessor": "centre",
    "MolmoImageProcessor": "centre",
    "MllamaImageProcessor": "corner",
    "Idefics2ImageProcessor": "patches",
}
"""By the name of the image processor's class, without its backend; others are told by their settings."""

OVERVIEWS = {"MolmoImageProcessor": "centre"}
"""The rule of the overview, where it is not `whole`."""


class Framed(Protocol):
    """What is needed of a model: `HookedMM` has it."""

    hf_model: Any
    processor: Any


def rule_of(images: Any) -> str:
    """The rule of an image processor."""
    name = _named(images)
    # Quarters are padded each by itself, together by less than a patch.
    if name in RULES and not getattr(images, "do_image_splitting", False):
        return RULES[name]
    if name == "LlavaImageProcessor" and getattr(images, "do_pad", False):
        return "square"
    return "crop" if getattr(images, "do_center_crop", False) else "whole"


def _named(images: Any) -> str:
    return type(images).__name__.removesuffix("Pil").removesuffix("Fast")


def frame(model: Framed, image: Image.Image, grid: tuple[int, int], overview: bool = False) -> Box:
    """The part of a picture that a grid of this model covers, in pixels of the picture; see `covered`."""
    vision = getattr(model.hf_model.config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    return covered(model.processor, image.size, grid, patch if isinstance(patch, int) else None, overview)


def covered(
    processor: Any, size: tuple[int, int], grid: tuple[int, int], patch: int | None = None, overview: bool = False
) -> Box:
    """The part of a picture that a grid covers.

    Args:
        processor: The model's processor.
        size: (width, height) of the picture as it was given to the processor.
        grid: (rows, cols) of the grid.
        patch: The side of a patch in pixels of the resized picture, which the rule `patches` needs.
        overview: The grid is that of the overview beside the crops.

    Returns:
        The box, in pixels of the picture.

    Raises:
        BadInputError: For a size or a grid without extent, or a rule that lacks `patch`.
    """
    (width, height), (rows, cols) = size, grid
    if min(width, height, rows, cols) < 1:
        raise BadInputError(f"a picture of {size} and a grid of {grid}: both need at least one of each")
    images = processor.image_processor
    rule = OVERVIEWS.get(_named(images), "whole") if overview else rule_of(images)
    if rule in ("centre", "corner"):
        # The smallest canvas of the grid's shape that holds the picture.
        wide = max(width, height * cols / rows)
        high = wide * rows / cols
        left, top = ((width - wide) / 2, (height - high) / 2) if rule == "centre" else (0.0, 0.0)
        return left, top, left + wide, top + high
    if rule == "square":
        side = max(width, height)
        return _middle(width, height, side, side)
    if rule == "crop":
        kept, resized = images.crop_size, images.size
        shortest = _side(resized, "shortest_edge")
        if shortest:
            across = down = min(width, height) / shortest
        else:
            across, down = width / _side(resized, "width"), height / _side(resized, "height")
        return _middle(width, height, _side(kept, "width") * across, _side(kept, "height") * down)
    if rule == "patches":
        if patch is None:
            raise BadInputError("this processor leaves a border out, which only the patch's side tells; give patch")
        wide, high = _resized(width, height, images.size)
        return 0.0, 0.0, min(1.0, cols * patch / wide) * width, min(1.0, rows * patch / high) * height
    return 0.0, 0.0, float(width), float(height)


def _side(size: Any, name: str) -> Any:
    """Sizes of processors are objects, in older versions of transformers dictionaries."""
    return size.get(name) if isinstance(size, dict) else getattr(size, name)


def _resized(width: float, height: float, size: Any) -> tuple[int, int]:
    """(width, height) as Idefics2 resizes to: the longer side at most `longest_edge`, both at least `shortest_edge`."""
    shortest, longest = _side(size, "shortest_edge"), _side(size, "longest_edge")
    ratio = width / height
    if max(width, height) > longest:
        width, height = (longest, longest / ratio) if width >= height else (longest * ratio, longest)
    return max(int(width), shortest), max(int(height), shortest)


def _middle(width: float, height: float, wide: float, high: float) -> Box:
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high
