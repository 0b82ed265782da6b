"""Reading the layout of models that are told the position of every image token: `image_input_idx` (Molmo).

An image is two blocks of rows with a mark behind each row: the whole picture made small, then its stitched crops. Crops
overlap, and of what two show one has no position. Only crops with a position run through the tower, in batch order.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.layout import ImageLayout, Plan
from hooked_mm.layout_source import Read, Source, nothing, runs_of


def has_index(source: Source) -> bool:
    """Whether the tensors tell the position of every image token."""
    return {"images", "image_input_idx"} <= set(source.inputs)


def read_indexed(source: Source) -> Read:
    """Where each image's tokens, crops and patches lie.

    Raises:
        BadInputError: If a sample's image positions are not pairs of blocks, or some have no image token.
    """
    index, patches = source.inputs["image_input_idx"], source.inputs["images"].shape[2]
    side = math.isqrt(index.shape[2])
    merge = math.isqrt(patches // index.shape[2])
    plans: list[Plan] = []
    owners: list[int] = []
    for sample, row in enumerate(source.image):
        crops = index[sample][(index[sample] >= 0).any(dim=-1)]
        cell = torch.full((len(row), 2), -1)
        for number, places in enumerate(crops, start=len(owners)):
            used = (places >= 0).nonzero()[:, 0]
            cell[places[used]] = torch.stack([torch.full_like(used, number), used], dim=1)
        mine: list[int] = []
        for whole, stitched in _pairs(sample, _blocks(runs_of(row))):
            for block in (whole, stitched):
                if bool((cell[block] < 0).any()):
                    raise BadInputError(
                        "has image positions that image_input_idx does not name; use the model's own processor", sample
                    )
            first = whole.numel()
            tokens, overview = cell[stitched], cell[whole]
            layout = ImageLayout(
                grid=first + torch.arange(stitched.numel()).view(stitched.shape),
                overview=torch.arange(first).view(whole.shape),
                tokens=tokens,
                tokens_overview=overview,
                patches=_patches(tokens, side, merge),
                patches_overview=_patches(overview, side, merge),
            )
            mine += [len(plans)] * len(torch.cat([tokens.flatten(0, 1), overview.flatten(0, 1)])[:, 0].unique())
            plans.append(Plan(layout, first + stitched.numel(), nothing(), sample))
        if len(mine) != len(crops):
            raise BadInputError(
                f"has {len(crops)} crops with positions, but tokens for {len(mine)}; use the model's own processor",
                sample,
            )
        owners += mine
    return Read("crops", plans, torch.tensor(owners, dtype=torch.long), {"patches": patches, "tokens": side**2})


def _blocks(runs: list[tuple[int, int]]) -> list[Int[Tensor, "rows cols"]]:
    """Positions of equally long runs with one mark between them, as grids."""
    found: list[list[tuple[int, int]]] = []
    for run in runs:
        if found and run[0] - found[-1][-1][1] == 1 and run[1] - run[0] == found[-1][0][1] - found[-1][0][0]:
            found[-1].append(run)
        else:
            found.append([run])
    return [torch.stack([torch.arange(*run) for run in block]) for block in found]


def _pairs(sample: int, blocks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The whole picture and the stitched crops of every image."""
    if len(blocks) % 2:
        raise BadInputError(
            f"has {len(blocks)} blocks of image positions, but each image has two, the whole and its crops; use the "
            "model's own processor",
            sample,
        )
    return list(zip(blocks[::2], blocks[1::2], strict=True))


def _patches(tokens: Int[Tensor, "rows cols 2"], side: int, merge: int) -> Int[Tensor, "rows*m cols*m 2"]:
    """The patches of a grid of tokens, each of m x m neighbours in its crop, whose patches follow row by row."""
    row, cell = tokens.unbind(dim=-1)
    step = torch.arange(merge)
    down = (cell // side * merge)[:, None, :, None] + step[:, None, None]
    across = (cell % side * merge)[:, None, :, None] + step
    patch = (down * side * merge + across).flatten(2).flatten(0, 1)
    crop = row.repeat_interleave(merge, dim=0).repeat_interleave(merge, dim=1)
    return torch.stack([crop, patch], dim=-1)
