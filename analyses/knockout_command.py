"""Attention knockout on pairs of pictures: which positions must read which others, and in which layers.

    hooked-mm analyse knockout --model.id small:llava --model.dtype float32 --attribute colour --output runs/colour
    hooked-mm analyse knockout --model.id small:llava --attribute shape --window 3 --cuts '[last -> object]' \\
        --output runs/shape

Pairs as for `patching`; the clean picture is run, the other's answer is the foil. In a window of layers around each
layer attention from one group of positions to another is cut on the attention weights themselves; scores are the
relative change of the answer's probability and the change of the difference of logits, means over pairs with bootstrap
intervals. Writes a heat table of each, and every pair's numbers (`changes.safetensors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from analyses.attention_knockout import CUTS, Change, Cut, knocked_out, known_cuts, scores, windows
from analyses.causal_tracing import joined, over_pairs
from analyses.frame import finish, new_parser, parsed
from analyses.heat_table import heat_figure
from analyses.model_samples import loaded
from analyses.pair_batches import pair_groups
from analyses.pair_options import add_pairs, batches_of, refuse_none, rounded, settings_of
from analyses.result import Result, Score
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.tensor_folder import write_folder

TITLES: dict[Change, str] = {"probability": "change of the probability", "difference": "change of the logit difference"}
Table = dict[str, Float64[Tensor, "windows n"]]


def parsed_cuts(given: Sequence[str] | None) -> list[Cut]:
    """Cuts written `queries -> keys`; all that are known, unless given.

    Raises:
        BadInputError: If one is written otherwise.
    """
    found = []
    for text in given or []:
        parts = [part.strip() for part in text.split("->")]
        if len(parts) != 2 or not all(parts):
            raise BadInputError(f"the cut {text!r} is none; write who may no longer read what: 'last -> object'")
        found.append(Cut(*parts))
    return found or list(CUTS)


def analyse(model: HookedMM, made: Any) -> tuple[Result, dict[Change, Table], list[int]]:
    """The result, every pair's changes per cut, and the windows' layers."""
    layers = list(range(model.cfg.n_layers)) if made.layers is None else list(made.layers)
    every = windows(model.cfg.n_layers, made.window)
    if wrong := [layer for layer in layers if not 0 <= layer < len(every)]:
        raise BadInputError(f"layer {wrong[0]} was asked for; this model has the layers 0 to {len(every) - 1}")
    chosen, asked = [every[layer] for layer in layers], parsed_cuts(made.cuts)
    batches, notes = batches_of(made, model)
    parts: dict[Change, list[Table]] = {kind: [] for kind in get_args(Change)}
    kept = 0
    for pairs in batches:
        groups = pair_groups(model, pairs, made.share)
        cuts = asked if made.cuts else known_cuts(groups, asked)
        kept += len(pairs)
        base = scores(model, pairs.clean, pairs.targets)
        found = knocked_out(model, pairs.clean, pairs.targets, groups, cuts, chosen)
        for kind, some in parts.items():
            values = found.change(base, kind)
            some.append({str(cut): values[:, place] for place, cut in enumerate(cuts)})
    refuse_none(kept, batches, notes)
    notes += [f"{kept} pairs; windows of {max(map(len, every))} layers", *batches.notes(), *rounded(model)]
    result = Result("knockout", made.name or made.model.name, [], settings_of(made, "window", "cuts"), notes)
    tables = {kind: joined(some) for kind, some in parts.items()}
    for kind, table in tables.items():
        for cut, values in table.items():
            bands, counts = over_pairs(values, made.draws, made.seed), (~values.isnan()).sum(1).tolist()
            for place, layer in enumerate(layers):
                value, low, high = (float(end[place]) for end in bands)
                about = {"rows": counts[place], "samples": counts[place]}
                result.scores.append(Score(TITLES[kind], cut, layer, value, low, high, **about))
    return result, tables, layers


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse knockout`."""
    parser = new_parser("knockout", __doc__)
    add_pairs(parser)
    parser.add_argument("--window", type=int | None, help="layers that are cut together; a fifth of all unless given")
    parser.add_argument(
        "--cuts", type=list[str] | None, help="who may not read what: ['last -> object']; all unless given"
    )
    made = parsed(parser, argv)
    if made.draws < 1:
        raise BadInputError(f"draws={made.draws}; at least one")
    result, tables, layers = analyse(loaded(made), made)
    arrays = {f"{kind}/{cut}": values for kind, table in tables.items() for cut, values in table.items()}
    write_folder(made.output, "changes", arrays, {"rows": layers, "columns": "pairs, in their order"})
    for kind, table in tables.items():
        values = np.array([values.nanmean(1).numpy() for values in table.values()]).T
        names, title = list(map(str, layers)), TITLES[kind]
        figure = heat_figure(values, names, list(table), title, peak=1.0 if kind == "probability" else None)
        figure.savefig(made.output / f"heat-{kind}.png", dpi=120)
    finish(result, made.output)
