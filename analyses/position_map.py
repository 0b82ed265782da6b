"""Positions of a conversation on the plane of their first two principal directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from sklearn.decomposition import PCA
from torch import Tensor

from analyses.curves import COLOURS, MARKS
from hooked_mm.errors import BadInputError

MOST_LABELS = 40
"""Of a map; more would hide each other."""


def principal_map(rows: Float[Tensor, "n d"]) -> tuple[Float64[Tensor, "n 2"], Float64[Tensor, " 2"]]:
    """Coordinates of rows along their first two principal directions, and the share of variance of each.

    Signs are scikit-learn's, which depend on the rows alone.

    Raises:
        BadInputError: If there are fewer than three rows, they are not finite, or they do not vary.
    """
    if rows.ndim != 2 or len(rows) < 3 or rows.shape[1] < 2:
        raise BadInputError(f"a plane needs three rows of two numbers; got {tuple(rows.shape)}")
    wide = rows.detach().double().cpu()
    if not bool(wide.isfinite().all()):
        raise BadInputError("some rows have values that are not finite, beside which no other shows; leave them out")
    if bool((wide == wide[0]).all()):
        raise BadInputError(
            f"all {len(wide)} rows are the same, so there is no plane they lie in; look at another layer"
        )
    fitted = PCA(2, svd_solver="full")
    placed = torch.from_numpy(fitted.fit_transform(wide.numpy()))
    return placed, torch.from_numpy(fitted.explained_variance_ratio_)


def map_figure(
    placed: Float[Tensor, "n 2"],
    image: Bool[Tensor, " n"],
    labels: Sequence[str],
    shares: Float[Tensor, " 2"],
    title: str = "",
) -> Figure:
    """Positions as marks coloured by modality, those of text with a label.

    Args:
        placed: Coordinates.
        image: Which are image positions.
        labels: One per position; empty for none. Of the first `MOST_LABELS` that are not empty those are written that
            are not in the way of earlier ones.
        shares: Of variance, of each direction.
        title: Above it.

    Raises:
        BadInputError: If there is not a label per position.
    """
    if not len(placed) == len(image) == len(labels):
        raise BadInputError(
            f"{len(labels)} labels and {len(image)} modalities for {len(placed)} positions; give one each"
        )
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, mask in (("image", image), ("text", ~image)):
        if bool(mask.any()):
            across, down = placed[mask].double().T.numpy()
            axes.scatter(across, down, s=18, c=COLOURS[name], marker=MARKS[name], alpha=0.65, linewidths=0, label=name)
    written = [number for number, label in enumerate(labels) if label][:MOST_LABELS]
    texts = [
        axes.annotate(
            labels[number][:16],
            (float(placed[number, 0]), float(placed[number, 1])),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=7,
            parse_math=False,
        )
        for number in written
    ]
    for axis, share in zip("xy", shares.tolist(), strict=True):
        getattr(axes, f"set_{axis}label")(f"{'first' if axis == 'x' else 'second'} direction: {share:.1%} of variance")
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _leave_room(figure, texts)
    return figure


def _leave_room(figure: Figure, texts: Sequence[Text]) -> None:
    """Hide labels that would be written over earlier ones."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    # Where labels stand is known once the layout is made.
    figure.draw_without_rendering()
    kept: list[Bbox] = []
    for text in texts:
        box = text.get_window_extent(renderer)
        text.set_visible(not any(box.overlaps(other) for other in kept))
        kept += [box] if text.get_visible() else []
