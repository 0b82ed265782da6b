"""A choice of a batch's samples, in any order and with repeats: what follows for its tensors and its layout.

An image model's tensors count different things: text has one row per sample, sizes one row per image, pixels one row
per sample, per image, per crop or per patch. What a tensor counts is known by its name; that of an unknown tensor is
told by its length, where that leaves no doubt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.layout import ImageLayout, Layout

PER_SAMPLE = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "mm_token_type_ids",
        "cross_attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask",
        "qformer_input_ids",
        "qformer_attention_mask",
        "batch_num_images",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "images",
        "image_masks",
        "image_input_idx",
    }
)
PER_IMAGE = frozenset({"image_grid_thw", "image_sizes", "target_sizes"})
PIXELS = frozenset({"pixel_values", "pixel_attention_mask", "spatial_shapes"})
OF_IMAGES = (
    PER_IMAGE
    | PIXELS
    | {"batch_num_images", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"}
    | {"images", "image_masks", "image_input_idx"}
)
"""Tensors that a batch without images does not have."""


@dataclass(frozen=True)
class Taken:
    """Which old rows the new ones are: of samples, of images, and of the tower (patches, if it is packed)."""

    samples: Int[Tensor, " b"]
    images: Int[Tensor, " n"]
    tower: Int[Tensor, " r"]

    def rows(self, name: str, value: Tensor, layout: Layout) -> Int[Tensor, " k"]:
        """Those that a tensor of the batch has.

        Raises:
            BadInputError: If what it counts can't be told.
        """
        samples, images = layout.image_index.shape[0], len(layout.image_sample)
        tower = 0 if layout.tower_image is None else len(layout.tower_image)
        kinds = {"sample": (samples, self.samples), "image": (images, self.images), "tower": (tower, self.tower)}
        if name in PER_SAMPLE:
            fitting = ["sample"]
        elif name in PER_IMAGE:
            fitting = ["image"]
        elif name in PIXELS and layout.tower_image is not None:
            fitting = [_counts(name, value, layout)]
        else:
            fitting = list(kinds)
        length = value.shape[0] if value.ndim else 0
        found = [kinds[kind][1] for kind in fitting if kinds[kind][0] == length]
        if not found or any(not torch.equal(other, found[0]) for other in found[1:]):
            why = "fits none of these" if not found else "may be either"
            raise BadInputError(
                f"can't take samples of the batch: its input {name!r} of shape {tuple(value.shape)} should have a row "
                f"per {' or '.join(fitting)} ({', '.join(str(kinds[kind][0]) for kind in fitting)}), and {why}; "
                "prepare a batch of these samples instead"
            )
        return found[0]


def _counts(name: str, value: Tensor, layout: Layout) -> str:
    """What the rows of pixels, or of their mask, are."""
    if layout.kind == "packed":
        # Whole pictures, which the tower cuts itself (Pixtral), or patches, some as little pictures.
        whole = value.ndim == 4 and layout.tower_image is not None and len(value) != len(layout.tower_image)
        return "image" if whole else "tower"
    if name == "spatial_shapes":
        return "tower"
    rows = value.ndim in (3, 4) if name == "pixel_values" else value.ndim == 2 and value.shape[1] == layout.patches
    return "tower" if rows else "image" if layout.kind == "newline" else "sample"


def taken(layout: Layout, rows: Sequence[int]) -> Taken:
    """Which samples, images and rows of the tower a choice of samples is.

    Raises:
        BadInputError: If there is none, or a number is not that of a sample.
    """
    samples = layout.image_index.shape[0]
    if not len(rows):
        raise BadInputError("no samples were asked for; take at least one row")
    wrong = [row for row in rows if not 0 <= row < samples]
    if wrong:
        raise BadInputError(f"sample {wrong[0]} asked of a batch of {samples}; rows count from 0 to {samples - 1}")
    device = layout.image_sample.device
    chosen = torch.tensor([int(row) for row in rows], dtype=torch.long, device=device)
    nothing = chosen.new_zeros(0)
    images = torch.cat([nothing, *((layout.image_sample == row).nonzero()[:, 0] for row in chosen)])
    owner = layout.tower_image
    if owner is None:
        return Taken(chosen, images, nothing)
    if layout.kind == "cross":
        # Every sample has as many slots as any other, some of them empty.
        slots = torch.arange(len(owner), device=device).view(samples, -1)
        return Taken(chosen, images, slots[chosen].flatten())
    return Taken(chosen, images, torch.cat([nothing, *((owner == image).nonzero()[:, 0] for image in images)]))


def take_layout(layout: Layout, which: Taken) -> Layout:
    """The layout of the chosen samples; their images are numbered anew, in batch order."""
    device = layout.image_sample.device
    index, separator = layout.image_index[which.samples], layout.separator[which.samples]
    if not len(which.images):
        return Layout("none", layout.image_sample.new_zeros(0), torch.full_like(index, -1), separator)
    counts = torch.stack([(layout.image_sample == row).sum() for row in which.samples])
    first = counts.cumsum(dim=0) - counts
    # An image's old number less that of its sample's first image, which every position's number has in common.
    before = torch.stack([(layout.image_sample < row).sum() for row in which.samples])
    index = torch.where(index >= 0, index - before[:, None] + first[:, None], -1)
    moved = replace(
        layout,
        image_sample=torch.arange(len(which.samples), device=device).repeat_interleave(counts),
        image_index=index,
        separator=separator,
    )
    if layout.tower_image is None:
        # Nothing is known of the tower's rows.
        return replace(moved, images=tuple(layout.images[image] for image in which.images.tolist()))
    owner = layout.tower_image[which.tower]
    sizes = torch.bincount(layout.tower_image[layout.tower_image >= 0], minlength=len(layout.image_sample))
    if layout.kind == "cross":
        real = owner >= 0
        owner = owner.clone()
        owner[real] = torch.arange(int(real.sum()), device=device)
    else:
        owner = torch.arange(len(which.images), device=device).repeat_interleave(sizes[which.images])
    return replace(
        moved,
        images=_images(layout, which, owner),
        tower_image=owner,
        tower_order=_order(layout, which, sizes),
        valid=None if layout.valid is None else layout.valid[which.tower],
    )


def _order(layout: Layout, which: Taken, sizes: Int[Tensor, " images"]) -> Int[Tensor, " patches"] | None:
    """A packed tower sorts the patches of each image apart, so each image's order moves as a whole."""
    if layout.tower_order is None:
        return None
    starts = sizes.cumsum(dim=0) - sizes
    parts, start = [], 0
    for image in which.images.tolist():
        old, size = int(starts[image]), int(sizes[image])
        parts.append(layout.tower_order[old : old + size] - old + start)
        start += size
    return torch.cat(parts)


def _images(layout: Layout, which: Taken, owner: Int[Tensor, " rows"]) -> tuple[ImageLayout, ...]:
    """The chosen images' grids, whose cells are in other rows of the tower, or further on in a packed one."""
    made: list[ImageLayout] = []
    starts = dict.fromkeys(("patches", "tokens"), 0)
    for number, image in enumerate(which.images.tolist()):
        grids = vars(layout.images[image]).copy()
        for name in ("patches", "tokens"):
            if layout.kind == "packed":
                cell = grids[name]
                if cell is not None:
                    shift = starts[name] - cell[..., 1].min()
                    grids[name] = torch.stack([cell[..., 0], cell[..., 1] + shift], dim=-1)
                    starts[name] += cell[..., 1].numel()
                continue
            assert layout.tower_image is not None
            shift = (owner == number).nonzero()[0, 0] - (layout.tower_image == image).nonzero()[0, 0]
            for key in (name, f"{name}_overview"):
                if grids[key] is not None:
                    grids[key] = torch.stack([grids[key][..., 0] + shift, grids[key][..., 1]], dim=-1)
        made.append(ImageLayout(**grids))
    return tuple(made)


def take_inputs(inputs: Mapping[str, Tensor], layout: Layout, which: Taken) -> dict[str, Tensor]:
    """The forward tensors of the chosen samples; without those of images where no image is left.

    Raises:
        BadInputError: If what a tensor counts can't be told.
    """
    had = layout.kind != "none"
    kept = {name: value for name, value in inputs.items() if not had or len(which.images) or name not in OF_IMAGES}
    found = {}
    for name, value in kept.items():
        if in_a_row(name, value, layout):
            # Patches side by side in one row of pixels, (1, 3, side, side * patches).
            patches = value.unflatten(-1, (-1, value.shape[-2]))
            found[name] = patches[..., which.tower.to(value.device), :].flatten(-2)
        else:
            found[name] = value[which.rows(name, value, layout).to(value.device)]
    return found


def in_a_row(name: str, value: Tensor, layout: Layout) -> bool:
    """Whether all pictures of a packed tower are one row of pixels (MiniCPM-V)."""
    if name != "pixel_values" or layout.kind != "packed" or layout.tower_image is None:
        return False
    return value.ndim == 4 and value.shape[0] == 1 and value.shape[-1] == value.shape[-2] * len(layout.tower_image)
