"""Concepts as points in TensorBoard's embedding projector: with their words, their fact, and a picture each.

What stands in the columns `word` and `fact` can be searched for and coloured by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hooked_mm.drawing import grid
from hooked_mm.errors import BadInputError

THUMBNAIL = 48
SPRITE = 8192
"""TensorBoard shows no sheet of thumbnails that is wider."""


def thumbnail(images: Sequence[Image.Image], side: int = THUMBNAIL) -> Float[Tensor, "3 side side"]:
    """The mean of pictures, each fitted into a white square; white without any. Values 0 to 1."""
    if not images:
        return torch.ones(3, side, side)
    squares = [np.asarray(grid([image.convert("RGB")], 1, side, 0), np.float32) for image in images]
    return torch.from_numpy(np.mean(squares, axis=0) / 255).permute(2, 0, 1)


def cell(text: str) -> str:
    """Text that is one entry of a table with tabs and lines."""
    return " ".join(text.split())


def add_concepts(
    writer: SummaryWriter,
    concepts: Float[Tensor, "k d"],
    columns: dict[str, Sequence[str]],
    pictures: Sequence[Sequence[Image.Image]] | None = None,
    tag: str = "concepts",
) -> None:
    """Write concepts to the projector.

    Args:
        writer: Of the run.
        concepts: C (k, d).
        columns: What is known of each concept, a text per concept under a name.
        pictures: Per concept the pictures whose mean is its thumbnail; none for plain points.
        tag: Name of the embedding.

    Raises:
        BadInputError: If there is not one entry per concept.
    """
    counts = {name: len(values) for name, values in columns.items()}
    if pictures is not None:
        counts["pictures"] = len(pictures)
    wrong = {name: count for name, count in counts.items() if count != len(concepts)}
    if wrong or not columns:
        raise BadInputError(f"{len(concepts)} concepts need as many entries of every column; got {counts}")
    names = list(columns)
    rows = [[cell(columns[name][k]) for name in names] for k in range(len(concepts))]
    labels = None
    if pictures is not None and any(pictures):
        across = int(np.ceil(np.sqrt(len(concepts))))
        labels = torch.stack([thumbnail(found, min(THUMBNAIL, SPRITE // across)) for found in pictures])
    # With one column TensorBoard takes no header.
    header = names if len(names) > 1 else None
    writer.add_embedding(
        concepts.float(),
        metadata=rows if header else [row[0] for row in rows],
        metadata_header=header,
        label_img=labels,
        tag=tag,
    )
