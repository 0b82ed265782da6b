"""The batch on which a model is checked: a picture made for it, or one sample of the first batch that comes.

Patterns and per-head results of the blocks looked at are kept at once, so the batch must not be a large one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.errors import BadInputError
from hooked_mm.structure import Stack, Structure

if TYPE_CHECKING:
    from hooked_mm.hooked import HookedMM

MOST_BYTES = 2**28
_PICTURE_NAMES = ("pixel", "image", "aspect_ratio")


def tested_layers(stack: Stack, *, full: bool) -> tuple[int, ...]:
    """All blocks, or the first and the last of each kind."""
    if full:
        return tuple(range(len(stack.blocks)))
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for layer, block in enumerate(stack.blocks):
        kinds.setdefault((block.kind, block.inserted, block.d_model, tuple(block.scales)), []).append(layer)
    return tuple(sorted({layer for layers in kinds.values() for layer in (layers[0], layers[-1])}))


def bytes_of_sample(model: HookedMM, length: int) -> int:
    """About what a check keeps of one sample of so many positions: per-head results and patterns."""
    tested = sum(len(tested_layers(stack, full=False)) for stack in model.structure.stacks.values())
    return length * max(1, model.cfg.n_heads) * (model.cfg.d_model + length) * model.dtype.itemsize * tested


def made_batch(model: HookedMM) -> tuple[Batch, int]:
    """Noise as a picture with a few words (these alone without a tower), and how many times the batch holds this.

    Every copy lets a pass of writes test one more point.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture, text = Image.fromarray(pixels).resize((96, 96)), "What is in this picture?"
    # A decoder of its own has one position until it is given an answer: nothing to attend to.
    answer = text if model.structure.encoder else None
    shown = None if model.structure.left_out else picture
    one = model.prepare([shown], [text], [answer])
    copies = int(min(8, max(1, MOST_BYTES // bytes_of_sample(model, one.length))))
    return (model.prepare([shown] * copies, [text] * copies, [answer] * copies), copies) if copies > 1 else (one, 1)


def small_enough(model: HookedMM, batch: Batch) -> Batch:
    """The batch, or of a large one the first sample with an image, if its tensors can be cut."""
    if len(batch) * bytes_of_sample(model, batch.input_ids.shape[1]) <= 4 * MOST_BYTES:
        return batch
    return one_sample(batch, model.structure, model.hf_model.config)


def one_sample(batch: Batch, structure: Structure, config: Any) -> Batch:
    """A batch of the first sample that has an image; the batch itself if its tensors can't be cut.

    Tensors belong to samples, to images, or to rows of the tower; which, is told by how many there are. Where that is
    ambiguous both readings are tried, and `batch_from_inputs` judges.
    """
    owner, rows = batch.layout.image_sample, batch.layout.tower_image
    if not len(owner):
        return batch
    sample = int(owner[0])
    images = int((owner == sample).sum())
    shown = 0 if rows is None else int(((rows >= 0) & (rows < images)).sum())

    def cut(name: str, value: Tensor, *, by_sample: bool) -> Tensor:
        picture = name.startswith(_PICTURE_NAMES)
        if name == "position_ids" and value.ndim == 3:
            return value[:, sample : sample + 1]
        if value.shape[0] == len(batch) and (by_sample or not picture):
            return value[sample : sample + 1]
        if value.shape[0] == len(owner):
            return value[:images]
        return value[:shown] if rows is not None and value.shape[0] == len(rows) else value[sample : sample + 1]

    for by_sample in (False, True):
        inputs = {name: cut(name, value, by_sample=by_sample) for name, value in batch.inputs.items()}
        try:
            made = batch_from_inputs(inputs, structure, config)
        except BadInputError:
            continue
        if len(made) == 1 and len(made.layout.image_sample) == images:
            return made
    return batch
