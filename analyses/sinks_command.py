"""Attention sinks, and which kind of token takes how much attention from which: per layer and head, over a data set.

    hooked-mm analyse sinks --model.id small:llava --data ScenesDataModule --data.task questions --data.size 100 \\
        --output runs/sinks

Writes scores over layers with bootstrap intervals over samples: the share of attention from queries of each kind to
keys of each kind (`--queries`), the share of heads with a sink among the first position, the image's tokens, the
question's and the template's; and, where the model has massive activations, how many image tokens are visual sinks by
them and how much more they receive than other image tokens (the dimensions are found on the first batch, or given by
`--dimensions`). `budget.safetensors` with `budget.json`: all of it by head, with the ends of the intervals.
`heads.png`: where the rows that say the answer look, head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from analyses.attention_sinks import (
    EPSILON,
    KEYS,
    LEAST,
    QUERIES,
    Ledger,
    attention_ledgers,
    first_states,
    heads_with_a_sink,
    sink_dimensions,
    sinks,
    strengths,
    tau_of,
)
from analyses.frame import finish, new_parser, parsed
from analyses.head_figure import head_figure
from analyses.model_samples import Samples, add_model, loaded, samples_of
from analyses.result import Result, Score
from hooked_mm.attention_rows import pattern_layers
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.tensor_folder import write_folder

GROUPS = ("first", "image", "question", "template")
"""Kinds of keys among which sinks are looked for."""

QueryKind = Literal["image", "question", "template", "answer"]

VISUAL = ("share of image tokens that are visual sinks", "attention on visual sinks over that on other image tokens")


@dataclass
class Found:
    """What is kept of the samples.

    Attributes:
        budget: Per sample (layers, heads, queries, keys).
        rate: Per sample (layers, heads, groups), 1 where the head has a sink there.
        visual: Per sample (layers, 2), see `VISUAL`; empty without massive activations.
        layers: What was looked at.
        dimensions: Those of massive activations; None before the first batch.
    """

    budget: list[Tensor] = field(default_factory=list)
    rate: list[Tensor] = field(default_factory=list)
    visual: list[Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    dimensions: list[int] | None = None


def look(samples: Samples, made: Any) -> Found:
    """All samples, batch by batch."""
    model, found = samples.model, Found(dimensions=made.dimensions)
    tau = tau_of(model.cfg.d_model) if made.tau is None else made.tau
    for _, batch in samples:
        ledgers = attention_ledgers(model, batch, made.layers, made.part, made.chunk)
        found.layers = list(ledgers)
        found.budget += torch.stack([ledger.budget() for ledger in ledgers.values()], dim=1).cpu().unbind()
        found.rate += torch.stack([_rates(ledger, made) for ledger in ledgers.values()], dim=1).cpu().unbind()
        if found.dimensions is None:
            found.dimensions = common_dimensions(model, batch, found.layers, tau)
        if found.dimensions and made.part == "attn":
            found.visual += visual_scores(model, batch, ledgers, found.dimensions, tau).unbind()
    return found


def _rates(ledger: Ledger, made: Any) -> Tensor:
    own = sinks(ledger.alpha(), ledger.seen, made.epsilon, made.least)
    groups = [ledger.keys[group].to(own.device) for group in GROUPS]
    return torch.stack([heads_with_a_sink(own, group) for group in groups], dim=-1)


def common_dimensions(model: HookedMM, batch: Batch, layers: Sequence[int], tau: float) -> list[int]:
    """The dimensions in which the first positions have massive activations in half of the layers at least."""
    every = [sink_dimensions(state, tau) for state in first_states(model, batch, layers).values()]
    counted = torch.tensor([number for own in every for number in own], dtype=torch.long).bincount()
    return (counted >= max(1, len(every) / 2)).nonzero()[:, 0].tolist()


def visual_scores(
    model: HookedMM, batch: Batch, ledgers: dict[int, Ledger], dimensions: Sequence[int], tau: float
) -> Tensor:
    """(b, layers, 2), see `VISUAL`; NaN for samples without a picture, and where there is nothing to compare."""
    made = []
    for layer, phi in strengths(model, batch, dimensions, list(ledgers)).items():
        ledger = ledgers[layer]
        image = ledger.keys["image"].cpu()
        sink = (phi >= tau) & image
        alpha = ledger.alpha().cpu().mean(1)
        mean = [(alpha * mask).sum(1) / mask.sum(1) for mask in (sink, image & ~sink)]
        ratio = mean[0] / mean[1]
        made.append(torch.stack([sink.sum(1) / image.sum(1), ratio.masked_fill(ratio.isinf(), torch.nan)], dim=-1))
    return torch.stack(made, dim=1).double()


def scores(found: Found, queries: Sequence[str], draws: int, seed: int) -> list[Score]:
    """Means over heads and samples per layer, with intervals over samples."""
    made: list[Score] = []
    budget, rate = torch.stack(found.budget).mean(2), torch.stack(found.rate).mean(2)

    def add(name: str, modality: str, values: Tensor) -> None:
        there = ~values[:, 0].isnan()
        if not bool(there.any()):
            return
        band = bootstrap(values, draws=draws, seed=seed)
        for place, layer in enumerate(found.layers):
            value, low, high = (float(end[place]) for end in band)
            made.append(Score(name, modality, layer, value, low, high, int(there.sum()), int(there.sum())))

    for query in queries:
        for place, key in enumerate(KEYS):
            add(f"share of attention from {query}", key, budget[:, :, QUERIES.index(query), place])
    for place, group in enumerate(GROUPS):
        add("share of heads with a sink", group, rate[..., place])
    for place, name in enumerate(VISUAL):
        if found.visual:
            add(name, "image", torch.stack(found.visual)[..., place])
    return made


def arrays(found: Found, draws: int, seed: int) -> dict[str, Tensor]:
    """Budget (layers, heads, queries, keys) and sinks (layers, heads, groups): mean, low, high over samples."""
    made = {}
    for name, values in (("budget", torch.stack(found.budget)), ("sinks", torch.stack(found.rate))):
        bands = bootstrap(values.flatten(1), draws=draws, seed=seed)
        for end, band in zip(("mean", "low", "high"), bands, strict=True):
            made[f"{name}/{end}"] = band.reshape(values.shape[1:]).float()
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse sinks`."""
    parser = new_parser("sinks", __doc__)
    add_model(parser, "generated")
    group = parser.add_argument_group("sinks")
    group.add_argument("--layers", type=list[int] | None, help="only these; all unless given")
    group.add_argument("--part", type=Literal["attn", "xattn"], default="attn", help="xattn: cross-attention")
    group.add_argument("--queries", type=list[QueryKind], default=["answer", "question"], help="in the scores")
    group.add_argument("--epsilon", type=float, default=EPSILON, help="what a sink receives more than, of each query")
    group.add_argument("--least", type=int, default=LEAST, help="queries that must be able to see a sink")
    group.add_argument(
        "--tau", type=float | None, help="of massive activations; 20 unless given, less below a width of 1024"
    )
    group.add_argument("--dimensions", type=list[int] | None, help="of massive activations; found unless given")
    group.add_argument("--chunk", type=int, default=64, help="queries at a time, which bounds the memory")
    made = parsed(parser, argv)
    model = loaded(made)
    if not pattern_layers(model, part=made.part):
        raise BadInputError(
            f"this {model.structure.family} has no {made.part} patterns to look at; choose another --part or model"
        )
    samples = samples_of(made, model)
    found = look(samples, made)
    if not found.budget:
        raise BadInputError("no sample could be looked at; " + "; ".join(samples.notes() or ["the data set is empty"]))
    name = made.name or made.model.name
    tau = tau_of(model.cfg.d_model) if made.tau is None else made.tau
    notes = samples.notes()
    if found.dimensions:
        notes.append(f"massive activations (tau {tau:.3g}) in dimensions {found.dimensions}")
    else:
        notes.append(f"no dimension has massive activations (tau {tau:.3g}) at the first position, so no visual sinks")
    options = ("answer", "max_new_tokens", "layers", "part", "queries", "epsilon", "least", "tau", "draws", "seed")
    settings = {**{key: made[key] for key in options}, "data": made.data.describe()}
    result = Result("sinks", name, scores(found, made.queries, made.draws, made.seed), settings, notes)
    saved = arrays(found, made.draws, made.seed)
    about = {"layers": found.layers, "queries": QUERIES, "keys": KEYS, "groups": GROUPS, "samples": len(found.budget)}
    write_folder(made.output, "budget", saved, about)
    saying = saved["budget/mean"][:, :, QUERIES.index("answer")]
    panels = [(f"to {key}", saying[..., place]) for place, key in enumerate(KEYS)]
    heads = list(range(saying.shape[1]))
    title = "share of attention of the rows that say the answer"
    head_figure(panels, found.layers, heads, common=True, title=title).savefig(made.output / "heads.png", dpi=120)
    finish(result, made.output)
