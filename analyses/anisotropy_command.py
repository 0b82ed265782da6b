"""How unevenly each layer's representations fill their space: anisotropy and mean cosine, with bands over samples.

    hooked-mm analyse anisotropy --store runs/scenes --output runs/anisotropy

Rows are read twice per layer: once for the sums, once for every sample's part of them (bands). Memory is 24 d^2 bytes.
`anisotropy.py` says the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from analyses.anisotropy import UnitSum, mean_cosine, principal, unit
from analyses.frame import add_layers, add_rows, by_modality, called, everywhere, finish, new_parser, opened, parsed
from analyses.layer_pass import LayerPass, told_copies
from analyses.layers import Layers
from analyses.moments import Moments, Running
from analyses.resampling import share
from analyses.result import Result, Score
from hooked_mm.processes import Processes


@dataclass(frozen=True)
class Settings:
    """What scores depend on besides rows.

    Attributes:
        baseline_size: Rows of a sampled mean cosine beside that of all pairs, as its source takes 1,000; 0 for none.
        draws: Of the bootstrap; 0 for no bands.
        seed: Of both.
    """

    baseline_size: int = 0
    draws: int = 200
    seed: int = 0


def sums(one: LayerPass) -> tuple[Moments, UnitSum]:
    """Of all rows, over all processes."""
    running = Running(one.width, device=one.device)
    units = UnitSum(0, torch.zeros(one.width, dtype=torch.float64, device=one.device))
    for _, (x,) in one.chunks(count=True):
        running.add(x)
        units = units + UnitSum.of(x)
    return running.moments().reduce(one.processes), units.reduce(one.processes)


def parts_of_samples(
    one: LayerPass, mean: Tensor, direction: Tensor, cosine_direction: Tensor
) -> Float64[Tensor, "samples 4"]:
    """Each sample's part of both scores, directions held fixed.

    Returns:
        Squares along the first principal direction, and in all; the sum of unit rows along the direction of their mean,
        and how many these are.
    """
    found = torch.zeros(one.samples, 4, dtype=torch.float64)
    for rows, (x,) in one.chunks():
        apart, units = x.double() - mean, unit(x)
        along = (apart @ direction).square(), apart.square().sum(1), units @ cosine_direction, units.norm(dim=1).round()
        found.index_add_(0, one.sample[rows], torch.stack(along, 1).cpu())
    return one.total(found)


def cosine_of_length(length: float, n: int) -> float:
    """The mean cosine of n unit rows whose mean has this length."""
    return (n * max(length, 0.0) ** 2 - 1) / (n - 1)


def layer_scores(one: LayerPass, settings: Settings) -> tuple[list[Score], list[str]]:
    """The scores of a layer, and what is to be noted of it.

    Raises:
        BadInputError: If a row is not finite.
    """
    moments, units = sums(one)
    where = f"{one.modality}, layer {one.numbers[0]}"
    if units.n < 2 or not float(moments.spread) > 0:
        return [], [f"{where}: {len(one)} rows, {units.zeros} of them zero, do not vary, so they have no scores"]
    value, direction = principal(moments)
    ends = cosine_ends = (math.nan, math.nan)
    if settings.draws:
        parts = parts_of_samples(one, moments.mean, direction, torch.nn.functional.normalize(units.total, dim=0))
        _, low, high = share(parts[:, ::2], parts[:, 1::2], draws=settings.draws, seed=settings.seed)
        ends = (float(low[0]), float(high[0]))
        cosine_ends = (cosine_of_length(float(low[1]), units.n), cosine_of_length(float(high[1]), units.n))
    scores = [one.score("anisotropy", value, ends), one.score("mean cosine", units.mean_cosine(), cosine_ends)]
    if size := settings.baseline_size:
        drawn = torch.randperm(len(one), generator=torch.Generator().manual_seed(settings.seed))[:size]
        rows = one.layers.values(one.numbers[0], drawn.sort().values.numpy()).to(one.device)
        scores.append(one.score(f"mean cosine of {size} rows", mean_cosine(rows), rows=len(rows)))
    return scores, [f"{where}: {units.zeros} rows are zero and have no cosine"] if units.zeros else []


def analyse(
    layers: Layers,
    modalities: Sequence[str],
    settings: Settings,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> tuple[list[Score], list[str]]:
    """All layers, each modality by itself.

    Args:
        layers: All rows.
        modalities: `all`, `text`, `image`, ...
        settings: See `Settings`.
        device: Where sums are computed.
        processes: Each takes its share of the rows.

    Returns:
        Scores, and notes on what a reader must know.
    """
    processes = processes or Processes()
    scores: list[Score] = []
    notes: list[str] = []

    def all_layers(part: Layers, modality: str) -> None:
        before = {}
        if len(part) < settings.baseline_size:
            notes.append(f"{modality}: only {len(part)} rows for a baseline of {settings.baseline_size}")
        for layer in part.numbers:
            one = LayerPass(part, (layer,), modality, device, processes)
            found, noted = layer_scores(one, settings)
            scores.extend(found)
            notes.extend(noted)
            before[layer] = one.copies
        notes.append(told_copies(modality, before, "they count"))

    by_modality(layers, modalities, all_layers, notes)
    return scores, notes


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse anisotropy`.

    Raises:
        BadInputError: As `frame.opened`, `by_modality`.
    """
    parser = new_parser("anisotropy", __doc__)
    add_rows(parser)
    add_layers(parser)
    parser.add_argument(
        "--baseline_size",
        type=int,
        default=0,
        help="rows of a sampled mean cosine beside that of all pairs; 0 for none",
    )
    made = parsed(parser, argv)
    store = opened(made)
    layers = Layers.of_store(store, made.point, made.layers)
    settings = Settings(made.baseline_size, made.draws, made.seed)
    scores, notes = everywhere(
        made.trainer, lambda device: analyse(layers, made.modalities, settings, device, Processes())
    )
    told = {"point": made.point, "baseline_size": made.baseline_size, "draws": made.draws, "seed": made.seed}
    finish(Result("anisotropy", called(made, store), scores, told, notes), made.output)
