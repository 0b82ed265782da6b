"""How linear each layer is: plain and main contribution, in sample, adjusted and held out, with bands over samples.

    hooked-mm analyse linearity --store runs/scenes --output runs/linearity
    hooked-mm analyse linearity --model.id small:llava --data ScenesDataModule --data.size 200 --output runs/linearity

A layer of a score is the first of its pair: 0 is the step from h^0 to h^1, the last one ends in what leaves the last
block. Rows are read twice per pair: once for the moments of each fold, once for errors with the maps held fixed (bands,
and with `--errors` a table of E_i per token). Memory is about folds x 24 d^2 bytes. `linearity.py` says the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float64
from torch import Tensor

from analyses.frame import add_layers, add_rows, by_modality, called, everywhere, finish, new_parser, opened, parsed
from analyses.layer_pass import LayerPass, told_copies
from analyses.layers import Layers
from analyses.linearity import (
    Linearity,
    LinearMap,
    adjusted,
    basis,
    cross_fits,
    fit,
    folds_of,
    held_out_score,
    score_of,
)
from analyses.moments import combine, grouped_pair_moments
from analyses.resampling import share
from analyses.result import Result, Score
from hooked_mm.processes import Processes

VARIANTS = {"linearity": False, "main contribution": True}
"""Score -> whether it is of y - x."""


@dataclass(frozen=True)
class Settings:
    """What scores depend on besides rows.

    Attributes:
        folds: Of the held-out score.
        draws: Of the bootstrap; 0 for no bands.
        seed: Of folds and draws.
    """

    folds: int = 5
    draws: int = 200
    seed: int = 0


@dataclass
class Found:
    """What one pair of layers has.

    Attributes:
        scores: In their order; of y or y - x that do not vary there are none.
        errors: (n,), E_i of each row.
        copies: Rows of the first layer that are there before.
        doubtful: Whether the rows are too near to dependent for nine digits.
    """

    scores: list[Score]
    errors: Tensor
    copies: int
    doubtful: bool


def second_pass(
    pair: LayerPass, maps: dict[str, list[LinearMap]], fold: Tensor
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, "samples s"], Float64[Tensor, "samples s"]]:
    """Errors with maps held fixed.

    Args:
        pair: Its rows.
        maps: Per variant that of all rows, and behind it those for each fold.
        fold: Of each row.

    Returns:
        E_i in sample; per sample sums of squared errors, and of squared spreads, in sample and held out of each
        variant (s).
    """
    errors = torch.zeros(len(pair), dtype=torch.float64)
    left, spread = (torch.zeros(pair.samples, 2 * len(maps), dtype=torch.float64) for _ in range(2))
    for rows, (x, y) in pair.chunks():
        squares, sizes = [], []
        for name, (whole, *outside) in maps.items():
            target = y.double() - x.double() if VARIANTS[name] else y.double()
            own = whole.errors(x, target)
            # Of y and of y - x they are the same.
            errors[rows] = own.cpu()
            held, size = torch.full_like(own, torch.nan), torch.full_like(own, torch.nan)
            for number, fitted in enumerate(outside):
                chosen = (fold[rows] == number).to(x.device)
                held[chosen] = fitted.errors(x[chosen], target[chosen])
                size[chosen] = (target[chosen] - fitted.mean_y).norm(dim=1)
            squares += [own.square(), held.square()]
            sizes += [(target - whole.mean_y).square().sum(1), size.square()]
        left.index_add_(0, pair.sample[rows], torch.stack(squares, 1).cpu())
        spread.index_add_(0, pair.sample[rows], torch.stack(sizes, 1).cpu())
    return pair.total(errors), pair.total(left), pair.total(spread)


def pair_scores(pair: LayerPass, settings: Settings) -> Found:
    """The scores of the step from one layer to the next.

    Raises:
        BadInputError: If a row is not finite.
    """
    folds = min(settings.folds, pair.samples)
    fold = folds_of(pair.sample, folds, settings.seed)
    chunks = ((x, y, fold[rows]) for rows, (x, y) in pair.chunks(count=True))
    parts = grouped_pair_moments(chunks, folds, pair.width, pair.width, pair.device)
    parts = [part.reduce(pair.processes) for part in parts]
    common = basis(combine(parts).x)
    maps: dict[str, list[LinearMap]] = {}
    found: dict[str, Linearity] = {}
    for name, main in VARIANTS.items():
        own = [part.difference() for part in parts] if main else parts
        whole = combine(own)
        # Where y = x the difference is but a rounding.
        if not float(whole.spread_y) > 1e-13 * float(whole.x.spread):
            continue
        outside = cross_fits(own) if folds > 1 else []
        maps[name] = [fit(whole, common), *outside]
        found[name] = score_of(whole, held_out_score(own, outside) if outside else math.nan, common)
    if not found:
        return Found([], torch.zeros(len(pair), dtype=torch.float64), pair.copies, doubtful=False)
    errors, left, spread = second_pass(pair, maps, fold)
    counts = torch.zeros(pair.samples, 2, dtype=torch.float64)
    counts.index_add_(0, pair.sample, torch.stack([errors, torch.ones_like(errors)], 1))
    ends = bands(torch.cat([left, counts[:, :1]], 1), torch.cat([spread, counts[:, 1:]], 1), settings)
    scores = []
    for name, one in found.items():
        # Of what is left over; its lower end is the score's upper one.
        inside, outside_ends = ((1 - high, 1 - low) for low, high in (next(ends), next(ends)))
        low, high = (adjusted(end, one.n, one.rank) for end in inside)
        scores += [
            pair.score(name, one.score, inside),
            pair.score(f"{name}, adjusted", one.adjusted, (low, high)),
            pair.score(f"{name}, held out", one.held_out, outside_ends),
        ]
    scores.append(pair.score("token error", float(errors.mean()), next(ends)))
    return Found(scores, errors, pair.copies, common.doubtful)


def bands(parts: Tensor, wholes: Tensor, settings: Settings) -> Iterator[tuple[float, float]]:
    """The ends of each column's share; NaN without draws."""
    if not settings.draws:
        return iter([(math.nan, math.nan)] * parts.shape[1])
    _, low, high = share(parts, wholes, draws=settings.draws, seed=settings.seed)
    return zip(low.tolist(), high.tolist(), strict=True)


def write_errors(layers: Layers, errors: dict[int, Tensor], path: Path) -> None:
    """E_i of every row: a Parquet table of sample, position, word, and a column per step."""
    table = layers.store.rows.select(["sample", "position", "modality", "word"])
    for first, values in errors.items():
        table = table.append_column(f"error_{first}", pa.array(values.numpy()))
    pq.write_table(table, path)


def analyse(
    layers: Layers,
    modalities: Sequence[str],
    settings: Settings,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    errors: Path | None = None,
) -> tuple[list[Score], list[str]]:
    """All pairs of layers, each modality by itself.

    Args:
        layers: All rows.
        modalities: `all`, `text`, `image`, ...
        settings: See `Settings`.
        device: Where sums are computed.
        processes: Each takes its share of the rows.
        errors: A folder for tables of E_i, one per modality.

    Returns:
        Scores, and notes on what a reader must know.
    """
    processes = processes or Processes()
    scores: list[Score] = []
    notes: list[str] = []

    def one(part: Layers, modality: str) -> None:
        found = {}
        for first, _ in part.pairs:
            pair = LayerPass(part, (first, first + 1), modality, device, processes)
            found[first] = pair_scores(pair, settings)
        scores.extend(score for own in found.values() for score in own.scores)
        notes.append(told_copies(modality, {first: own.copies for first, own in found.items()}, "they count"))
        notes.extend(
            f"{modality}, layer {first}: nothing varies in some of y and y - x, so it has no score"
            for first, own in found.items()
            if len(own.scores) < 3 * len(VARIANTS) + 1
        )
        notes.extend(
            f"{modality}, layer {first}: the rows are nearly dependent, so scores have fewer than nine digits"
            for first, own in found.items()
            if own.doubtful
        )
        if errors is not None and not processes.rank:
            write_errors(
                part, {first: own.errors for first, own in found.items()}, errors / f"errors_{modality}.parquet"
            )

    by_modality(layers, modalities, one, notes)
    return scores, notes


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse linearity`.

    Raises:
        BadInputError: As `frame.opened`, `Layers.pairs`, `by_modality`.
    """
    parser = new_parser("linearity", __doc__)
    add_rows(parser)
    add_layers(parser)
    parser.add_argument("--folds", type=int, default=5, help="of samples, for the held-out score; 1 for none")
    parser.add_argument("--errors", action="store_true", help="write a table of every token's error, too")
    made = parsed(parser, argv)
    store = opened(made)
    layers = Layers.of_store(store, made.point, made.layers)
    settings = Settings(made.folds, made.draws, made.seed)
    scores, notes = everywhere(
        made.trainer,
        lambda device: analyse(
            layers, made.modalities, settings, device, Processes(), made.output if made.errors else None
        ),
    )
    told = {"point": made.point, "folds": made.folds, "draws": made.draws, "seed": made.seed}
    finish(Result("linearity", called(made, store), scores, told, notes), made.output)
