"""Pictures of a causal explanation: the graph around the prediction, and its tokens on the picture.

In the graph, t stands at the right, and the nodes of its PDS tree left of it, as far away as they are steps from t,
sorted by position from top to bottom. At the ends of an edge: a triangle is an arrowhead, a ring a circle, a bare end a
tail. The verified subset has thick rims.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from PIL import Image
from torch import Tensor

from analyses.causal_explanation import Explanation, Nodes
from analyses.pag_orientation import Mark
from analyses.picture_maps import picture_maps
from hooked_mm.batch import Batch
from hooked_mm.connector import Connector
from hooked_mm.drawing import enlarge, overlay
from hooked_mm.errors import BadInputError
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM

COLOURS = {"row": "#f2c14e", "image": "#8ecae6", "text": "#d8d8d8"}
LEVELS = {"node": 0.25, "explanation": 0.6, "subset": 1.0}
"""How strongly a patch is coloured: a node of the graph, one of the explanation, one of the verified subset."""
_SIZE = 0.15
"""Radius of a node, in the units of the layout."""


def layout_of(explanation: Explanation) -> dict[int, tuple[float, float]]:
    """Node -> (x, y): t at the right, its tree to the left of it by depth, by position from top to bottom."""
    places = {explanation.root: (0.0, 0.0)}
    depths = {node: len(path) - 1 for node, path in explanation.paths.items()}
    for depth in sorted(set(depths.values())):
        column = sorted(node for node, own in depths.items() if own == depth)
        for place, node in enumerate(column):
            # A little slant, so that edges within a column do not run through its nodes.
            slant = 0.22 * (place % 2)
            places[node] = (-1.4 * depth - slant, 0.5 * ((len(column) - 1) / 2 - place))
    return places


def node_crops(
    model: HookedMM, batch: Batch, sample: int, nodes: Nodes, images: Sequence[Image.Image], around: float = 1.0
) -> dict[int, Image.Image]:
    """What of a picture each image token stands for: its patch, and so many patches about it.

    Args:
        model: The model.
        batch: The batch.
        sample: Its number.
        nodes: Of a graph.
        images: The sample's pictures.
        around: In patches, on each side.

    Returns:
        Node -> its part of a picture; no entry for text, and where no place in a picture is known.
    """
    node_at = {place: node for node, place in enumerate(nodes.positions) if nodes.image[node]}
    own = (batch.layout.image_sample == sample).nonzero()[:, 0].tolist()
    found: dict[int, Image.Image] = {}
    for picture, image in zip((batch.layout.images[one] for one in own), images, strict=True):
        for grid, overview in ((picture.grid, False), (picture.overview, True)):
            if grid is None:
                continue
            rows, cols = grid.shape
            left, top, right, bottom = frame(model, image, (rows, cols), overview)
            wide, high = (right - left) / cols, (bottom - top) / rows
            for row, line in enumerate(grid.tolist()):
                for col, place in enumerate(line):
                    if place in node_at:
                        box = (col - around, row - around, col + 1 + around, row + 1 + around)
                        sides = zip(box, (wide, high) * 2, (left, top) * 2, strict=True)
                        part = [round(side * size + start) for side, size, start in sides]
                        found[node_at[place]] = image.convert("RGB").crop((part[0], part[1], part[2], part[3]))
    return found


def graph_picture(
    explanation: Explanation,
    labels: Sequence[str],
    subset: Collection[int] = (),
    crops: Mapping[int, Image.Image] | None = None,
) -> Image.Image:
    """The graph of t and its explanation.

    Args:
        explanation: The head's.
        labels: Per node, what to write beside it.
        subset: Numbers of the nodes of the verified subset.
        crops: Node -> what is drawn in its circle (`node_crops`).
    """
    places = layout_of(explanation)
    across, down = (np.ptp([place[axis] for place in places.values()]) for axis in (0, 1))
    figure = Figure(figsize=(2.2 + 1.3 * across, 1.2 + 1.2 * down), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_aspect("equal")
    axes.axis("off")
    drawn = [(a, b) for a, b, _ in explanation.pag.edges() if a in places and b in places]
    for a, b in drawn:
        start, end = np.array(places[a]), np.array(places[b])
        way = (end - start) / np.linalg.norm(end - start)
        axes.plot(*zip(start, end, strict=True), color="#666666", linewidth=1, zorder=1)
        for place, mark, outward in (
            (start, explanation.pag.marks[b, a], way),
            (end, explanation.pag.marks[a, b], -way),
        ):
            _draw_end(axes, place + outward * _SIZE, -outward, Mark(mark))
    for node, (x, y) in places.items():
        kind = "row" if node == explanation.root else "image" if explanation.nodes.image[node] else "text"
        wide = 2.6 if node in subset else 0.8
        rim = _circle(x, y, _SIZE, COLOURS[kind], "#c1121f" if node in subset else "#333333", wide)
        axes.add_patch(rim)
        if crops and node in crops:
            extent = (x - _SIZE, x + _SIZE, y - _SIZE, y + _SIZE)
            shown = axes.imshow(np.asarray(crops[node]), extent=extent, zorder=3, interpolation="nearest")
            shown.set_clip_path(rim)
            axes.add_patch(_circle(x, y, _SIZE, "none", rim.get_edgecolor(), wide))
        axes.text(x, y - _SIZE - 0.03, labels[node][:24], ha="center", va="top", fontsize=7, zorder=4, parse_math=False)
    xs, ys = zip(*places.values(), strict=True)
    axes.set_xlim(min(xs) - 0.7, max(xs) + 0.7)
    axes.set_ylim(min(ys) - 0.5, max(ys) + 0.4)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _draw_end(axes: Axes, tip: np.ndarray, way: np.ndarray, mark: Mark) -> None:
    """A mark whose outer point is at `tip`, pointing along `way`."""
    side = np.array([-way[1], way[0]])
    if mark == Mark.ARROW:
        corners = [tip, tip - 0.11 * way + 0.05 * side, tip - 0.11 * way - 0.05 * side]
        axes.add_patch(Polygon(corners, closed=True, color="#333333", zorder=3))
    elif mark == Mark.CIRCLE:
        x, y = tip - 0.045 * way
        axes.add_patch(_circle(x, y, 0.045, "white", "#333333", 1))


def _circle(x: float, y: float, radius: float, inside: str, rim: Any, width: float) -> Circle:
    return Circle((x, y), radius, facecolor=inside, edgecolor=rim, linewidth=width, zorder=3)


def token_values(
    explanation: Explanation, length: int, subset: Collection[int] = (), levels: dict[str, float] | None = None
) -> Float[Tensor, " p"]:
    """How strongly each position is coloured.

    Args:
        explanation: The head's.
        length: Positions of the batch.
        subset: Numbers of the nodes of the verified subset.
        levels: Other strengths than `LEVELS`.
    """
    strength = levels or LEVELS
    values = torch.zeros(length)
    for node, place in enumerate(explanation.nodes.positions):
        kind = "subset" if node in subset else "explanation" if node in explanation.paths else "node"
        values[place] = strength[kind]
    return values


def token_pictures(
    model: HookedMM,
    batch: Batch,
    sample: int,
    values: Float[Tensor, " p"],
    images: Sequence[Image.Image],
    connector: Connector | None = None,
    side: int = 320,
) -> list[Image.Image]:
    """Values of positions over each picture, an overview as a picture of its own; faded alone if the place is unknown.

    Args:
        model: The model.
        batch: The batch.
        sample: Its number.
        values: Between 0 and 1.
        images: The sample's pictures.
        connector: As in `picture_maps`.
        side: Of the drawn pictures, in pixels.
    """
    try:
        maps = picture_maps(model, batch, sample, values, images, connector)
    except BadInputError:
        return [enlarge(image.convert("RGB"), side) for image in images]
    return [overlay(images[one.picture], one.values.float().numpy(), one.box, 1.0, side) for one in maps]
