"""How many dimensions each layer's representations locally have: TwoNN and maximum likelihood, with bands over samples.

    hooked-mm analyse intrinsic-dimension --store runs/scenes --output runs/dimension

Rows that are there twice are left out first, and counted, those that differ by a rounding with them (`--tolerance`). Of
more than `--most_rows` some are drawn: neighbours take time with the square of the rows. Neighbours stay as they are in
the bootstrap over samples. Processes share the layers. `intrinsic_dimension.py` says the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from analyses.frame import add_layers, add_rows, by_modality, called, everywhere, finish, new_parser, opened, parsed
from analyses.intrinsic_dimension import ESTIMATES, distinct_neighbours
from analyses.layer_pass import told_copies
from analyses.layers import Layers
from analyses.neighbours import Rows
from analyses.resampling import of_rows
from analyses.result import Result, Score
from hooked_mm.errors import BadInputError
from hooked_mm.processes import Processes

NAMES = {
    "two_nn": "TwoNN dimension",
    "two_nn_microscope": "TwoNN dimension, LLM-Microscope's",
    "maximum_likelihood": "maximum likelihood dimension",
    "levina_bickel": "Levina-Bickel dimension",
}
"""Estimate -> score."""

FEW = 100
"""Distinct rows below which it is noted that there are few: a vocabulary's embeddings are points, no manifold."""

HELD_BYTES = 1e9
"""Rows of a layer that take no more are read once and held; others are read in blocks, again and again."""


@dataclass(frozen=True)
class Settings:
    """What scores depend on besides rows.

    Attributes:
        neighbours: k of Levina and Bickel's.
        tolerance: See `neighbours.distinct`.
        most_rows: Of more, so many are drawn.
        draws: Of the bootstrap; 0 for no bands.
        seed: Of both.
    """

    neighbours: int = 20
    tolerance: float = 1e-5
    most_rows: int = 20_000
    draws: int = 200
    seed: int = 0


class Read:
    """Chosen rows of a layer, read when they are asked for."""

    def __init__(self, layers: Layers, layer: int, chosen: np.ndarray, device: torch.device | str) -> None:
        self.layers, self.layer, self.chosen, self.device = layers, layer, chosen, device

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        part = index if isinstance(index, slice) else index.cpu().numpy()
        return self.layers.values(self.layer, self.chosen[part]).to(self.device)


def layer_scores(
    layers: Layers, layer: int, modality: str, settings: Settings, device: torch.device | str
) -> tuple[list[Score], list[str]]:
    """The scores of a layer, and notes on those that could not be had."""
    chosen = np.arange(len(layers))
    if len(layers) > settings.most_rows:
        drawn = torch.randperm(len(layers), generator=torch.Generator().manual_seed(settings.seed))
        chosen = np.sort(drawn[: settings.most_rows].numpy())
    rows: Rows = Read(layers, layer, chosen, device)
    first = rows[slice(0, 1)]
    if len(chosen) * first.shape[1] * first.element_size() <= HELD_BYTES:
        rows = rows[slice(None)]
    try:
        found = distinct_neighbours(rows, settings.neighbours, settings.tolerance)
    except BadInputError as error:
        return [], [f"{modality}, layer {layer}: {error}"]
    near, samples = found.near.distances.cpu(), layers.samples[chosen][found.kept.cpu().numpy()]
    count = len(np.unique(samples))
    scores: list[Score] = []
    notes: list[str] = []
    if len(near) < FEW:
        notes.append(f"{modality}, layer {layer}: only {len(near)} distinct rows, too few for a dimension to mean much")
    for name, estimate in ESTIMATES.items():
        try:
            value, low, high = estimate(near), math.nan, math.nan
            if settings.draws:
                on = partial(_estimated, estimate, near)
                _, *ends = of_rows(samples, on, draws=settings.draws, seed=settings.seed)
                low, high = (float(end) for end in ends)
            scores.append(Score(NAMES[name], modality, layer, value, low, high, len(near), count, found.duplicates))
        except BadInputError as error:
            notes.append(f"{modality}, layer {layer}, {NAMES[name]}: {error}")
    return scores, notes


def _estimated(estimate: Callable[[Tensor], float], near: Tensor, rows: Tensor) -> list[float]:
    return [estimate(near[rows])]


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
        device: Where neighbours are sought.
        processes: Each takes its share of the layers.

    Returns:
        Scores, and notes on what a reader must know.
    """
    processes = processes or Processes()
    scores: list[Score] = []
    notes: list[str] = []

    def all_layers(part: Layers, modality: str) -> None:
        if len(part) > settings.most_rows:
            notes.append(f"{modality}: {settings.most_rows} of {len(part)} rows, drawn by chance")
        mine = [layer for place, layer in enumerate(part.numbers) if place % processes.size == processes.rank]
        each = {layer: layer_scores(part, layer, modality, settings, device) for layer in mine}
        found = {layer: own for share in processes.gather(each) for layer, own in share.items()}
        for layer in part.numbers:
            scores.extend(found[layer][0])
            notes.extend(found[layer][1])
        left_out = {layer: own[0].left_out for layer, (own, _) in found.items() if own}
        notes.append(told_copies(modality, left_out, "left out"))

    by_modality(layers, modalities, all_layers, notes)
    return scores, notes


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse intrinsic-dimension`.

    Raises:
        BadInputError: As `frame.opened`, `by_modality`.
    """
    parser = new_parser("intrinsic-dimension", __doc__)
    add_rows(parser)
    add_layers(parser)
    parser.add_argument("--neighbours", type=int, default=20, help="k of Levina and Bickel's estimate")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="rows this near count as copies, relative to the rows' mean norm"
    )
    parser.add_argument("--most_rows", type=int, default=20_000, help="of more rows, so many are drawn")
    made = parsed(parser, argv)
    store = opened(made)
    layers = Layers.of_store(store, made.point, made.layers)
    settings = Settings(made.neighbours, made.tolerance, made.most_rows, made.draws, made.seed)
    scores, notes = everywhere(
        made.trainer, lambda device: analyse(layers, made.modalities, settings, device, Processes())
    )
    told = {"point": made.point, **vars(settings)}
    finish(Result("intrinsic-dimension", called(made, store), scores, told, notes), made.output)
