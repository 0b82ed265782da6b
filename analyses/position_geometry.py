"""The geometry of one conversation's representations: each measure layer by layer, of its image and its text positions.

| measure | at a layer |
|---|---|
| `norm` | mean ||x_i|| |
| `anisotropy`, `mean_cosine` | as in `analyses.anisotropy` |
| `means` | cos(mean of image positions, mean of text positions) |
| `linearity` | the step to the next layer, on positions that the map was not fitted to (`analyses.linearity`) |
| `adjusted` | the same step in sample, adjusted for the number of predictors; needs more positions than dimensions |
| `dimension` | TwoNN (`analyses.intrinsic_dimension`) |

One conversation has few positions, and they are no independent draws: its figures describe it, not the model. Where
there are fewer than a measure needs, there is no number (NaN). Studies over a data set are those analyses' commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from analyses.anisotropy import anisotropy, mean_cosine
from analyses.intrinsic_dimension import intrinsic_dimension
from analyses.layers import MODALITIES
from analyses.linearity import linearity
from analyses.logit_lens import STREAM, lens_points
from hooked_mm.batch import Batch, Modality
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM

MOST = 1000
"""Positions of a modality at the most."""

MASSIVE = 10
"""Times the median norm of a layer's positions: a position beyond it is *massive*, as attention sinks are."""

WIDEST = 1024
"""Dimensions for which least squares of one conversation are tried."""

FOLDS = 5


@dataclass(frozen=True)
class PositionRows:
    """Representations of one sample's positions.

    Attributes:
        layers: Their numbers, as in `logit_lens.lens_points`.
        values: (layers, n, d), on the CPU.
        position: (n,), in the batch (of an encoder-decoder, in its decoder).
        image: (n,), which are image positions; the others are text.
        left_out: Image and text positions that were not taken, being too many.
    """

    layers: tuple[int, ...]
    values: Float[Tensor, "layers n d"]
    position: Int[Tensor, " n"]
    image: Bool[Tensor, " n"]
    left_out: tuple[int, int] = (0, 0)

    def at(self, layer: int) -> Float[Tensor, "n d"]:
        """The rows of a layer.

        Raises:
            BadInputError: If there is no such layer.
        """
        if layer not in self.layers:
            raise unknown("layer", str(layer), map(str, self.layers))
        return self.values[self.layers.index(layer)]

    def of(self, modality: str) -> PositionRows:
        """Those of `all`, `text` or `image`.

        Raises:
            BadInputError: For another modality.
        """
        masks = {"all": torch.ones_like(self.image), "text": ~self.image, "image": self.image}
        if modality not in masks:
            raise unknown("modality", modality, masks)
        return self.take(masks[modality])

    def take(self, which: Bool[Tensor, " n"]) -> PositionRows:
        """Some of the positions."""
        return replace(self, values=self.values[:, which], position=self.position[which], image=self.image[which])

    def norms(self) -> Float64[Tensor, "layers n"]:
        """||x_i||."""
        return self.values.double().norm(dim=-1)

    def massive(self) -> Float64[Tensor, " n"]:
        """The largest share of a position's norm in its layer's median, over layers; beyond `MASSIVE` it is massive."""
        norms = self.norms()
        medians = norms.median(dim=1, keepdim=True).values
        return (norms / torch.where(medians > 0, medians, 1)).amax(0)

    def ordinary(self) -> PositionRows:
        """Without massive positions."""
        return self.take(self.massive() <= MASSIVE)


def position_rows(
    model: HookedMM, batch: Batch, point: str = STREAM, sample: int = 0, most: int = MOST
) -> PositionRows:
    """One pass, and what every layer holds at a sample's positions.

    Args:
        model: The model.
        batch: The batch.
        point: As in `logit_lens.lens_points`.
        sample: Its number in the batch.
        most: Positions of a modality at the most; of more, so many at even distances are taken.

    Raises:
        BadInputError: If the blocks have no such point.
    """
    names = lens_points(model.hook_names, point)
    _, cache = model.run_with_cache(batch, list(names.values()), stop_at_layer=max(1, max(names)))
    text = batch.decoder or batch
    every = cache.select(next(iter(names.values())), sample=sample).position.cpu()
    image = text.modality[sample].cpu()[every] == Modality.IMAGE
    kept = torch.zeros_like(image)
    for own in (image.nonzero()[:, 0], (~image).nonzero()[:, 0]):
        kept[own[torch.linspace(0, len(own) - 1, most).round().long()] if len(own) > most else own] = True
    rows = [cache.select(name, sample=sample).values.detach().cpu()[kept].flatten(1) for name in names.values()]
    left = tuple(int((of & ~kept).sum()) for of in (image, ~image))
    return PositionRows(tuple(names), torch.stack(rows), every[kept], image[kept], (left[0], left[1]))


@dataclass(frozen=True)
class Measure:
    """A measure of the rows of one layer, or of two that follow each other.

    Attributes:
        title: For people.
        least: Rows that it needs.
        of: Of the rows (n, d).
        step: Instead, of the rows of a layer and the next.
    """

    title: str
    least: int
    of: Callable[[Tensor], float] | None = None
    step: Callable[[Tensor, Tensor], float] | None = None


def _held_out(x: Tensor, y: Tensor) -> float:
    # Positions are dealt out one by one: within one conversation there is nothing larger to keep together.
    return linearity(x, y, samples=torch.arange(len(x)), folds=FOLDS).held_out


MEASURES: dict[str, Measure] = {
    "norm": Measure("mean norm", 1, lambda rows: float(rows.double().norm(dim=1).mean())),
    "anisotropy": Measure("anisotropy", 3, anisotropy),
    "mean_cosine": Measure("mean cosine of two positions", 2, mean_cosine),
    "linearity": Measure("linearity of the step to the next layer, held out", 20, step=_held_out),
    "adjusted": Measure(
        "linearity of the step to the next layer, adjusted", 3, step=lambda x, y: linearity(x, y).adjusted
    ),
    "dimension": Measure(
        "intrinsic dimension by two nearest neighbours", 50, lambda rows: intrinsic_dimension(rows).two_nn
    ),
}
MEANS = "means"
"""The one measure that is of both modalities together."""

Tell = Callable[[str, int, int], object]


def measured(rows: PositionRows, name: str, tell: Tell | None = None) -> dict[str, Float64[Tensor, " layers"]]:
    """A measure at every layer, of all positions, of text and of images.

    Args:
        rows: Of a conversation.
        name: One of `MEASURES`, or `means`.
        tell: Called before every layer with what is done, how many were and how many there are; may raise.

    Returns:
        Modality -> (layers,), NaN where there are too few positions, they do not vary, or no layer follows; of `means`
        `image and text` alone.

    Raises:
        BadInputError: For another measure.
    """
    if name == MEANS:
        return {"image and text": cosine_of_means(rows)}
    if name not in MEASURES:
        raise unknown("measure", name, [*MEASURES, MEANS])
    measure = MEASURES[name]
    parts: dict[str, Tensor] = {modality: rows.of(modality).values for modality in MODALITIES}
    found = {key: torch.full((len(rows.layers),), torch.nan, dtype=torch.float64) for key in parts}
    for place in range(len(rows.layers)):
        if tell is not None:
            tell(f"measuring {measure.title}", place, len(rows.layers))
        for key, values in parts.items():
            if values.shape[1] >= measure.least:
                found[key][place] = _at(measure, values, place)
    return found


def _at(measure: Measure, values: Float[Tensor, "layers n d"], place: int) -> float:
    try:
        if measure.of is not None:
            return measure.of(values[place])
        assert measure.step is not None
        if place + 1 == len(values) or values.shape[2] > WIDEST:
            return float("nan")
        return measure.step(values[place], values[place + 1])
    except BadInputError:
        # All alike, as one token many times: there is nothing to measure.
        return float("nan")


def cosine_of_means(rows: PositionRows) -> Float64[Tensor, " layers"]:
    """cos(mean of image positions, mean of text positions) per layer; NaN without positions of both."""
    if not bool(rows.image.any()) or bool(rows.image.all()):
        return torch.full((len(rows.layers),), torch.nan, dtype=torch.float64)
    image, text = (rows.values[:, mask].double().mean(1) for mask in (rows.image, ~rows.image))
    return torch.nn.functional.cosine_similarity(image, text, dim=-1)


def why_not(rows: PositionRows, name: str) -> list[str]:
    """What a reader must know of a measure of so few positions; a sentence each.

    Args:
        rows: What is measured.
        name: One of `MEASURES`, or `means`.
    """
    width, counts = rows.values.shape[2], _counts(rows)
    told = [f"There are no {key} positions." for key, count in counts.items() if not count]
    if name == MEANS:
        return told
    least = MEASURES[name].least
    told += [
        f"{MEASURES[name].title.capitalize()} needs {least} positions; there are {count} of {key}."
        for key, count in counts.items()
        if 0 < count < least
    ]
    if name == "anisotropy":
        told += [
            f"Of {count} positions of {key} it is {1 / min(count - 1, width):.3f} at the least."
            for key, count in counts.items()
            if count >= least
        ]
    if name in ("linearity", "adjusted") and width > WIDEST:
        told = [f"At a width of {width} a step has more coefficients than a conversation can tell."]
    elif name in ("linearity", "adjusted"):
        told += [
            f"{count} positions of {key} for {width} dimensions: in sample every step looks linear where they use as "
            "many, so there is no adjusted score, and the held-out one rests on few."
            for key, count in counts.items()
            if least <= count <= width + 1
        ]
    if name in ("linearity", "adjusted", "dimension"):
        told.append("Positions of one conversation are no independent draws; take a data set for what shall hold.")
    return told


def _counts(rows: PositionRows) -> Mapping[str, int]:
    return {"text": int((~rows.image).sum()), "image": int(rows.image.sum())}
