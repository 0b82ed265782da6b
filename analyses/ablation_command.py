"""Visual-token ablation: what an answer loses without an object's tokens, without registers, without random ones.

    hooked-mm analyse ablation --model.id small:llava --data ScenesDataModule --data.task questions --data.size 40 \\
        --fill mean --output runs/ablation

The answer's first token is what is predicted. Sets of a sample are of one size: as many tokens as the object has that
a scene's question asks about; where no object is known, a share of all (`--share`). Deletion and insertion curves go
through the tokens in an order (`--orders`): the object's first, largest norm first, largest effect alone first; beside
random orders. Writes `curves.csv` and `curves.png`.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator
from torch import Tensor

from analyses.curves import Curve, draw_curves
from analyses.deletion_curves import Curves, deletion_curves, orders_of
from analyses.frame import new_parser, parsed
from analyses.model_samples import Samples, add_model, loaded, samples_of
from analyses.patch_maps import covers
from analyses.result import Result, Score
from analyses.targets import Targets, answer_targets
from analyses.token_ablation import Fill, FillKind, ImageTokens, ScoreKind, ablated_scores, data_means, token_features
from analyses.token_sets import largest_norm, random_orders, random_regions, random_tokens, region_tokens
from hooked_mm.batch import Batch
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.prepare import load_image, sources
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.draw import render

Order = Literal["region", "norm", "alone"]
ALL, REGION, OUTSIDE, NORM = "all tokens", "the object", "all but the object", "largest norm"
TOKENS, REGIONS = "random tokens", "random regions"


def asked_masks(data: SampleDataModule, samples: Sequence[Sample]) -> list[Bool[Tensor, "h w"] | None] | None:
    """The pixels of the object that each sample's question asks about; None where it asks about none.

    None for all, where the data set does not know.
    """
    scenes = getattr(data, "scenes", None)
    if not isinstance(scenes, SceneDataset) or scenes.task == "caption":
        return None
    place = {name: number for number, name in enumerate(scenes.ids())}
    masks: list[Bool[Tensor, "h w"] | None] = []
    for sample in samples:
        about, scene = scenes.asked(place[sample.id]).about, scenes.shown(place[sample.id])
        mask = None if about is None else covers(render(scene)[1][scene.objects.index(about)])
        masks.append(mask if mask is not None and bool(mask.any()) else None)
    return masks


class Ablation:
    """Effects and curves, batch by batch.

    Args:
        model: The model.
        fill: What replaced tokens become.
        made: The command's options.
    """

    def __init__(self, model: HookedMM, fill: Fill, made: Any) -> None:
        self.model, self.fill, self.made = model, fill, made
        self.effects: dict[str, list[Tensor]] = {}
        self.curves: dict[str, list[Curves]] = {}
        self.notes: list[str] = []

    def add(self, data: SampleDataModule, samples: Sequence[Sample], batch: Batch) -> None:
        """One more batch."""
        targets = answer_targets(batch, "first")
        keys = [zlib.crc32(sample.id.encode()) for sample in samples]
        tokens, values = token_features(self.model, batch)
        own = targets.sample.tolist()
        sets = self._sets(batch, tokens, values, asked_masks(data, samples), samples, keys)
        names = list(sets)
        gone = torch.stack([torch.zeros_like(tokens.real.cpu()), *sets.values()])[:, own]
        kind: ScoreKind = self.made.kind
        options: dict[str, Any] = {"keys": keys, "size": self.made.rows}
        scores = ablated_scores(self.model, batch, targets, gone, self.fill, kind=kind, **options)
        lost = scores[:1] - scores[1:]
        # A set that a sample does not have took nothing.
        lost = lost.masked_fill(~gone[1:].any(2), torch.nan)
        for name in dict.fromkeys(name.split(" #")[0] for name in names):
            mine = [number for number, other in enumerate(names) if other.split(" #")[0] == name]
            self.effects.setdefault(name, []).append(lost[mine].mean(0))
        self._add_curves(batch, targets, tokens, values, sets.get(REGION), keys)

    def _sets(
        self,
        batch: Batch,
        tokens: ImageTokens,
        values: Float[Tensor, "b n d"],
        masks: Sequence[Bool[Tensor, "h w"] | None] | None,
        samples: Sequence[Sample],
        keys: Sequence[int],
    ) -> dict[str, Bool[Tensor, "b n"]]:
        """Name -> tokens; draws of controls are numbered behind a #."""
        real, made = tokens.real.cpu(), self.made
        sizes = [[load_image(source).size for source in sources(sample.images)] for sample in samples]
        count = (tokens.counts.cpu() * made.share).round().long().clamp_min(1)
        found = {ALL: real}
        if masks is not None:
            blank = [[torch.zeros(height, width, dtype=torch.bool) for width, height in own] for own in sizes]
            shown = [empty if mask is None else [mask] for mask, empty in zip(masks, blank, strict=True)]
            region = region_tokens(self.model, batch, tokens, shown, made.region_share)
            known = region.any(1)
            count = torch.where(known, region.sum(1), count)
            found |= {REGION: region, OUTSIDE: real & ~region & known[:, None]}
        found[NORM] = largest_norm(values, real, count)
        drawn = random_tokens(real, count, made.controls, made.seed, keys)
        found |= {f"{TOKENS} #{number}": own for number, own in enumerate(drawn)}
        try:
            drawn = random_regions(self.model, batch, tokens, count, sizes, made.controls, made.seed, keys)
            found |= {f"{REGIONS} #{number}": own for number, own in enumerate(drawn)}
        except BadInputError as error:
            self._note(f"no random regions: {error.reason}")
        return found

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _add_curves(
        self,
        batch: Batch,
        targets: Targets,
        tokens: ImageTokens,
        values: Float[Tensor, "b n d"],
        region: Bool[Tensor, "b n"] | None,
        keys: Sequence[int],
    ) -> None:
        made, own = self.made, targets.sample.cpu()
        real, mine = tokens.real.cpu()[own], [keys[sample] for sample in own.tolist()]
        maps: dict[str, Tensor] = {}
        if "norm" in made.orders:
            maps["norm"] = values.double().norm(dim=2).cpu()[own]
        if "region" in made.orders and region is not None:
            maps["region"] = region.double()[own]
        if "alone" in made.orders:
            width = real.shape[1]
            each = torch.cat([torch.zeros(1, width, dtype=torch.bool), torch.eye(width, dtype=torch.bool)])
            single = each[:, None] & real[None]
            options: dict[str, Any] = {"keys": keys, "size": made.rows}
            scores = ablated_scores(self.model, batch, targets, single, self.fill, kind=made.kind, **options)
            maps["alone"] = (scores[:1] - scores[1:]).T
        orders = [random_orders(real, made.random_orders, made.seed, mine)]
        if maps:
            orders.insert(0, orders_of(torch.stack(list(maps.values())), real, made.seed, mine))
        curves = deletion_curves(
            self.model,
            batch,
            targets,
            torch.cat(orders),
            tokens,
            steps=made.steps,
            fill=self.fill,
            keys=keys,
            size=made.rows,
        )
        if "region" in maps:
            self._note("curves are of samples whose question asks about an object")
        names = [*maps, *["random"] * made.random_orders]
        # Orders are only compared on the same samples.
        lacks = torch.zeros(len(own), dtype=torch.bool) if "region" not in maps else ~region.any(1)[own]  # type: ignore[union-attr]
        for name in dict.fromkeys(names):
            which = [number for number, other in enumerate(names) if other == name]
            parts = [part[which].mean(0).masked_fill(lacks, torch.nan) for part in (curves.deletion, curves.insertion)]
            self.curves.setdefault(name, []).append(Curves(curves.shares, parts[0][None], parts[1][None]))


def joined(parts: Sequence[Curves]) -> Curves:
    """The curves of all batches as those of one."""
    shares, deletion, insertion = (
        torch.cat([getattr(part, name) for part in parts], dim=-1) for name in ("shares", "deletion", "insertion")
    )
    return Curves(shares, deletion, insertion)


def effect_scores(effects: dict[str, Float64[Tensor, " n"]], draws: int, seed: int) -> list[Score]:
    """What each set costs, and by how much the object's costs more than its controls of the same size."""
    found = dict(effects)
    for control in (TOKENS, REGIONS, NORM):
        if REGION in found and control in found:
            found[f"{REGION}, less {control}"] = found[REGION] - found[control]
    scores = []
    for name, values in found.items():
        count = int((~values.isnan()).sum())
        value, low, high = (float(end) for end in bootstrap(values, draws=draws, seed=seed))
        scores.append(Score(f"lost without {name}", "image", None, value, low, high, count, count))
    return scores


def curve_scores(curves: dict[str, Curves], draws: int, seed: int) -> list[Score]:
    """Areas under the curves, plain and normalised, over samples."""
    scores = []
    for which in ("deletion", "insertion"):
        for name, one in curves.items():
            for title, values in (
                (f"{which} AUC", one.auc(which)),
                (f"{which} AUC, normalised", one.normalised(which)),
            ):
                count = int((~values.isnan()).sum())
                value, low, high = (float(end) for end in bootstrap(values[0], draws=draws, seed=seed))
                left = values.shape[1] - count
                scores.append(Score(f"{title}: {name}", "image", None, value, low, high, count, count, left))
    return scores


def write_curves(folder: Path, curves: dict[str, Curves], model: str, draws: int, seed: int) -> None:
    """Means over samples after each step, as a table and as a picture."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    rows: list[list[Any]] = []
    handles: list[Any] = []
    for axes, which in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
        lines = []
        for name, one in curves.items():
            shares = one.shares.mean(1).tolist()
            means = bootstrap(getattr(one, which)[0].T, draws=draws, seed=seed)
            lines.append(Curve(name, model, shares, *(end.tolist() for end in means)))
            rows += [[which, name, *row] for row in zip(shares, *(end.tolist() for end in means), strict=True)]
        handles = draw_curves(axes, lines)
        axes.xaxis.set_major_locator(AutoLocator())
        axes.set_xlabel(f"share of image tokens {'replaced' if which == 'deletion' else 'left'}")
        axes.set_title(which, fontsize=11, loc="left")
    figure.supylabel("probability of the answer's first token", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False, fontsize=9)
    figure.savefig(folder / "curves.png", dpi=120)
    with open(folder / "curves.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["curve", "order", "share", "probability", "low", "high"], *rows])


def ablated(samples: Samples, fill: Fill, made: Any) -> Ablation:
    """Effects and curves of all samples that have pictures; how many have none is noted.

    Args:
        samples: With answers behind their prompts.
        fill: What replaced tokens become.
        made: The command's options.

    Raises:
        BadInputError: If no sample is left.
    """
    found, blind = Ablation(samples.model, fill, made), 0
    for part, batch in samples:
        shown = [number for number, sample in enumerate(part) if sources(sample.images)]
        blind += len(part) - len(shown)
        if shown:
            kept = batch if len(shown) == len(part) else batch.take(shown)
            found.add(samples.data, [part[number] for number in shown], kept)
    if blind:
        found.notes.append(f"{blind} samples have no picture, and count nowhere")
    if not found.effects:
        raise BadInputError(
            f"no sample is left to look at: {'; '.join([*found.notes, *samples.notes()]) or 'the data set is empty'}"
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse ablation`."""
    parser = new_parser("ablation", __doc__)
    add_model(parser, "generated")
    parser.add_argument(
        "--fill", type=FillKind, default="mean", help="mean of the image's own tokens, of the data, ..."
    )
    parser.add_argument("--kind", type=ScoreKind, default="logit", help="what effects are measured in")
    parser.add_argument("--share", type=float, default=0.1, help="size of sets where no object is known")
    parser.add_argument("--region_share", type=float, default=0.5, help="of a patch that an object covers at least")
    parser.add_argument("--controls", type=int, default=20, help="random sets per sample")
    parser.add_argument("--random_orders", type=int, default=4, help="beside the others, per sample; steps runs each")
    parser.add_argument("--orders", type=list[Order], default=["region", "norm"], help="of the curves")
    parser.add_argument("--steps", type=int, default=10, help="of the curves")
    parser.add_argument("--rows", type=int, default=64, help="samples in one pass at most")
    made = parsed(parser, argv)
    if min(made.controls, made.random_orders) < 1 or not 0 < made.share <= 1 or made.answer == "none":
        raise BadInputError(
            f"controls={made.controls}, random_orders={made.random_orders}, share={made.share}, "
            f"answer={made.answer!r}: at least one control and order, a share above 0 to 1, answers given or generated"
        )
    model, name = loaded(made), made.name or made.model.name
    samples = samples_of(made, model)
    means = {}
    if made.fill == "data":
        asked = Samples(model, made.data, "none", on_error=made.on_error)
        means = data_means(model, (batch for _, batch in asked if batch.has_images))
    fill = Fill(made.fill, means, made.seed)
    ablation = ablated(samples, fill, made)
    curves = {name_: joined(parts) for name_, parts in ablation.curves.items()}
    effects = {name_: torch.cat(parts) for name_, parts in ablation.effects.items()}
    scores = [*effect_scores(effects, made.draws, made.seed), *curve_scores(curves, made.draws, made.seed)]
    keys = (
        "fill",
        "kind",
        "share",
        "region_share",
        "controls",
        "random_orders",
        "orders",
        "steps",
        "answer",
        "draws",
        "seed",
    )
    settings = {key: made[key] for key in keys} | {"data": made.data.describe()}
    result = Result("ablation", name, scores, settings, [*ablation.notes, *samples.notes()])
    write_curves(made.output, curves, name, made.draws, made.seed)
    result.write(made.output)
    print(result.table())
    print(f"written to {str(made.output)!r}")
