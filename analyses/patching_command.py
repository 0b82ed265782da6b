"""Activation patching on pairs of pictures: which positions, at which layer, carry what tells them apart.

    hooked-mm analyse patching --model.id small:llava --model.dtype float32 --attribute colour --output runs/patching
    hooked-mm analyse patching --model.id small:llava --clean a.png --corrupt b.png \\
        --question 'what colour is the star ?' --clean_answer red --corrupt_answer blue --output runs/mine

Pairs are scenes that differ in one attribute of one object (`--attribute`), MMVP's (`--mmvp FOLDER`), or two pictures
of one's own. Scores are the recovered share of the difference between the two answers' logits, per component, layer and
group of positions, means over pairs with bootstrap intervals over pairs; beside them the control with another pair's
runs, and, with `--attribution true`, what attribution patching expects. Writes `recovery-COMPONENT.png`, every pair's
numbers (`recovery.safetensors`), and a gallery of pairs with maps of what each patch brings, by attribution patching
over four runs between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from analyses.attribution_patching import attributed, by_group
from analyses.causal_tracing import Direction, control, joined, over_pairs, partners, point_names, traced
from analyses.frame import finish, new_parser, parsed
from analyses.gallery import Entry, write_gallery
from analyses.heat_table import heat_figure
from analyses.map_overlay import SIDE, blended, scale_of
from analyses.model_samples import loaded
from analyses.pair_batches import PairBatch, pair_groups, pair_patches
from analyses.pair_options import add_pairs, batches_of, refuse_none, rounded, settings_of
from analyses.picture_maps import picture_maps
from analyses.position_groups import Groups
from analyses.result import Result, Score
from hooked_mm.drawing import enlarge
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.tensor_folder import write_folder

STEPS = 4
"""Runs between the two over which gradients are averaged unless told: the plain one may have the wrong sign."""

Table = dict[str, Float64[Tensor, "points n"]]


def by_name(values: Float64[Tensor, "points groups n"], groups: Groups) -> Table:
    """The columns of a batch by group."""
    return {name: values[:, place] for place, name in enumerate(groups)}


def table_scores(kind: str, table: Table, points: dict[str, str], layers: Sequence[int], made: Any) -> list[Score]:
    """A score per point and group; none where no pair has the group."""
    found = []
    names = list(points)
    for group, values in table.items():
        bands = over_pairs(values, made.draws, made.seed)
        counts = (~values.isnan()).sum(1).tolist()
        for place, name in enumerate(names):
            value, low, high = (float(end[place]) for end in bands)
            about = {"rows": counts[place], "samples": counts[place]}
            found.append(Score(f"{kind}, {points[name]}", group, layers[place], value, low, high, **about))
    return found


def pair_entries(model: HookedMM, pairs: PairBatch, groups: Groups, point: str, direction: Direction) -> list[Entry]:
    """What each pair is, and which of its patches bring how much of the difference at one point, by attribution."""
    gained = attributed(model, pairs, [point], direction, steps=STEPS)[0]
    whole = (pairs.clean_scores - pairs.corrupt_scores).abs().clamp_min(1e-9)
    entries = []
    for number, pair in enumerate(pairs.pairs):
        shown = pairs.pictures[number]
        large = [enlarge(one, SIDE) for one in shown]
        pictures = [(f"clean: {pair.answers[0]}", large[0]), (f"corrupt: {pair.answers[1]}", large[1])]
        sign = 1 if direction == "denoise" else -1
        values = sign * gained[number].double() / whole[number]
        if pairs.clean.layout.image_sample.numel():
            try:
                maps = picture_maps(model, pairs.clean, number, values, [shown[0]])
            except BadInputError as error:
                maps, pictures = [], [*pictures, (f"no map: {error.reason}", large[0])]
            scale = scale_of(*(one.values for one in maps), signed=True)
            pictures += [
                (
                    f"share attributed to each patch, {point}" + (" (overview)" if one.overview else ""),
                    blended(shown[0], one.values, one.box, scale=scale, signed=True),
                )
                for one in maps
            ]
        facts = [
            ("difference, clean", float(pairs.clean_scores[number])),
            ("difference, corrupt", float(pairs.corrupt_scores[number])),
            *((f"{name}: positions", int(mask[number].sum())) for name, mask in groups.items()),
        ]
        entries.append(Entry(pair.id, facts, pictures, pair.question))
    return entries


def analyse(model: HookedMM, made: Any) -> tuple[Result, dict[str, Table], list[Entry]]:
    """The result, every pair's numbers, and entries of a gallery."""
    points = point_names(model, made.components, made.layers, tower=made.tower)
    layers = [model.hook_points[name].layer or 0 for name in points]
    batches, notes = batches_of(made, model)
    parts: dict[str, list[Table]] = {"recovery": [], "control": [], "attribution": []}
    entries: list[Entry] = []
    kept = 0
    for pairs in batches:
        groups = (pair_patches if made.tower else pair_groups)(model, pairs, made.share)
        kept += len(pairs)
        parts["recovery"].append(by_name(traced(model, pairs, list(points), groups, made.direction), groups))
        if made.control and not made.tower:
            try:
                order = partners(pairs)
            except BadInputError as error:
                notes.append(f"{len(pairs)} pairs have no control: {error.reason}")
            else:
                parts["control"].append(by_name(control(model, pairs, list(points), groups, order), groups))
        if made.attribution:
            gained = attributed(model, pairs, list(points), made.direction, steps=made.steps)
            parts["attribution"].append(by_name(by_group(gained, groups, pairs, made.direction), groups))
        if len(entries) < made.gallery and not made.tower:
            some = pair_entries(model, pairs, groups, next(iter(points)), made.direction)
            entries += some[: made.gallery - len(entries)]
    refuse_none(kept, batches, notes)
    notes += [f"{kept} pairs", *batches.notes(), *rounded(model)]
    settings = settings_of(made, "components", "tower", "direction", "control", "attribution", "steps")
    result = Result("patching", made.name or made.model.name, [], settings, notes)
    tables = {kind: joined(some) for kind, some in parts.items() if some}
    for kind, table in tables.items():
        result.scores += table_scores(kind, table, points, layers, made)
    return result, tables, entries


def heat_tables(result: Result, kind: str) -> dict[str, Any]:
    """File name -> a figure of layers by groups, per component."""
    figures = {}
    for name in result.kinds():
        if not name.startswith(f"{kind}, "):
            continue
        own = result.of(name)
        groups = list(dict.fromkeys(one.modality for one in own))
        layers = list(dict.fromkeys(one.layer for one in own))
        values = np.full((len(layers), len(groups)), np.nan)
        for one in own:
            values[layers.index(one.layer), groups.index(one.modality)] = one.value
        figures[name.replace(", ", "-")] = heat_figure(values, list(map(str, layers)), groups, name, peak=1.0)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse patching`."""
    parser = new_parser("patching", __doc__)
    add_pairs(parser)
    parser.add_argument(
        "--components", type=list[str], default=["resid_post", "attn_out", "mlp_out"], help="points of a block"
    )
    parser.add_argument("--tower", type=bool, default=False, help="in the vision tower, by patches, without a control")
    parser.add_argument("--direction", type=Direction, default="denoise", help="clean into corrupt, or the other way")
    parser.add_argument("--control", type=bool, default=True, help="patch another pair's runs, too")
    parser.add_argument("--attribution", type=bool, default=False, help="beside it, attribution patching")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="runs that attribution averages the gradient over, or 0"
    )
    parser.add_argument("--gallery", type=int, default=12, help="pairs that are shown")
    made = parsed(parser, argv)
    if made.draws < 1 or (made.tower and made.attribution):
        raise BadInputError(
            f"draws={made.draws}, tower={made.tower}, attribution={made.attribution}: at least one draw; attribution "
            "patching is of the language model's positions"
        )
    model = loaded(made)
    result, tables, entries = analyse(model, made)
    arrays = {f"{kind}/{group}": values for kind, table in tables.items() for group, values in table.items()}
    points = list(point_names(model, made.components, made.layers, tower=made.tower))
    write_folder(made.output, "recovery", arrays, {"rows": points, "columns": "pairs, in their order"})
    for name, figure in heat_tables(result, "recovery").items():
        figure.savefig(made.output / f"{name}.png", dpi=120)
    if entries:
        write_gallery(made.output / "gallery.html", "patching", entries, result.notes)
    finish(result, made.output)
