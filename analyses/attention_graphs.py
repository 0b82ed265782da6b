"""What the causal graphs of a model's heads are learned from: the attention rows of their nodes.

Two passes as far as the layer: one for the row t of every target, which chooses heads and nodes, one for the rows of
the nodes. What is held grows with the nodes, never with the square of the positions (`hooked_mm.attention_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.causal_explanation import MOST_IMAGES, THRESHOLD, Nodes, choose_nodes
from analyses.targets import Targets
from hooked_mm.attention_rows import attention_rows
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM


@dataclass(frozen=True)
class HeadRows:
    """What one head holds for one prediction.

    Attributes:
        target: Number of the target.
        layer, head: Which.
        image_mass: The share of t's attention on image tokens.
        nodes: The tokens.
        rows: Their attention over all positions.
    """

    target: int
    layer: int
    head: int
    image_mass: float
    nodes: Nodes
    rows: Float[Tensor, "nodes keys"]


def node_masks(batch: Batch) -> tuple[Bool[Tensor, "b p"], Bool[Tensor, "b p"]]:
    """Which positions can be nodes: image tokens, and text behind a sample's first image."""
    every = batch.mask(modality="image")
    behind = every.cumsum(dim=1) > 0
    return every & ~batch.separator.to(every.device), behind & batch.mask(modality="text")


def node_labels(batch: Batch, sample: int, nodes: Nodes) -> list[str]:
    """What is written beside each node: an image token's number among the sample's, a text token's word.

    Args:
        batch: The batch; without tokens' texts a word is its position.
        sample: Its number.
        nodes: Of a graph.
    """
    images = node_masks(batch)[0][sample].cumsum(0)
    names = batch.tokens[sample] if batch.tokens else [str(place) for place in range(batch.modality.shape[1])]
    return [
        f"image {int(images[place]) - 1}" if image else names[place]
        for place, image in zip(nodes.positions, nodes.image, strict=True)
    ]


def head_rows(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    layer: int | None = None,
    heads: Sequence[int] | int = 2,
    *,
    threshold: float = THRESHOLD,
    most_images: int = MOST_IMAGES,
) -> list[HeadRows]:
    """The rows from which graphs are learned, in one pass: target by target, head by head.

    Args:
        model: The model.
        batch: The batch.
        targets: The predictions to explain.
        layer: Which; the last unless given, as in CLEANN. Negative ones count from the end.
        heads: Numbers of heads; or how many, then those whose row t has the largest mass on image tokens.
        threshold, most_images: As in `causal_explanation.choose_nodes`.

    Raises:
        UnsupportedModelError: For an encoder-decoder, or text that reads pictures by cross-attention.
        BadInputError: If there is no such layer or head.
    """
    if model.structure.encoder is not None:
        raise UnsupportedModelError(
            "this is an encoder-decoder: its image tokens are the encoder's and its predictions the decoder's, so no "
            "row of attention holds both"
        )
    layers, count = model.cfg.n_layers, model.cfg.n_heads
    asked = layers - 1 if layer is None else layer
    if not -layers <= asked < layers:
        raise BadInputError(f"layer={layer} of {layers}; layers count from 0, negative ones from the end")
    asked %= layers
    given = range(heads) if isinstance(heads, int) else heads
    if not len(given) or not 0 <= min(given) <= max(given) < count:
        raise BadInputError(f"heads={heads} of {count}; give numbers from 0, or how many to choose")
    images, text = node_masks(batch)
    samples, rows = targets.sample.tolist(), targets.row.tolist()
    if lacking := [sample for sample in samples if not bool(images[sample].any())]:
        raise UnsupportedModelError(
            f"sample {lacking[0]} has no image positions in the sequence: it has no picture, or the model's text reads "
            "pictures by cross-attention, whose weights are not rows of the same matrix"
        )
    first = _by_sample([{row} for row in rows], samples, len(batch))
    (attention,) = attention_rows(model, batch, first, asked).values()
    chosen: list[tuple[int, int, float, Nodes]] = []
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        own = attention[sample, :, first[sample].tolist().index(row)].double().cpu()
        mass = own[:, images[sample].cpu()].sum(dim=1)
        best = mass.argsort(descending=True, stable=True).tolist()
        for head in best[:heads] if isinstance(heads, int) else heads:
            nodes = choose_nodes(
                own[head], images[sample], text[sample], row, threshold=threshold, most_images=most_images
            )
            chosen.append((number, head, float(mass[head]), nodes))
    wanted = _by_sample([{*one[3].positions} for one in chosen], [samples[one[0]] for one in chosen], len(batch))
    (attention,) = attention_rows(model, batch, wanted, asked).values()
    found = []
    for number, head, share, nodes in chosen:
        places = {place: index for index, place in enumerate(wanted[samples[number]].tolist())}
        held = attention[samples[number], head, [places[position] for position in nodes.positions]]
        found.append(HeadRows(number, asked, head, share, nodes, held.double().cpu()))
    return found


def _by_sample(sets: Sequence[set[int]], samples: Sequence[int], count: int) -> Int[Tensor, "b r"]:
    """The union of the sets of each sample, filled up with -1."""
    every = [
        sorted(set().union(*(one for one, own in zip(sets, samples, strict=True) if own == sample)))
        for sample in range(count)
    ]
    width = max(map(len, every))
    return torch.tensor([[*one, *[-1] * (width - len(one))] for one in every])
