"""Which tokens cause a prediction, by the causal graph of attention heads, and whether masking them changes it.

    hooked-mm analyse causal-graph --model.id small:llava --data ScenesDataModule --data.task questions \\
        --data.size 20 --tokens first --output runs/causal

For each token of an answer and each head: nodes, a partial ancestral graph, an explanation, and its verification
(`causal_explanation`). Writes `graphs.json` (all of that), `gallery.html` (graphs, and explanations on the picture),
and scores: how many explanations are verified, how often masking a whole explanation changes the prediction beside as
many tokens drawn by chance of the same kinds, and, for questions about an object of a scene, the share of verified
image tokens that lies on it, beside that of all image tokens (what as many by chance have on average).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyses.ablation_command import asked_masks
from analyses.attention_graphs import HeadRows, head_rows, node_labels, node_masks
from analyses.causal_check import check, maskable, summary
from analyses.causal_discovery import MOST_CONDITIONS, MOST_TESTS
from analyses.causal_explanation import (
    BUDGET,
    DEPTH,
    MOST_IMAGES,
    THRESHOLD,
    Explanation,
    Verification,
    explain,
)
from analyses.causal_graph_drawing import graph_picture, node_crops, token_pictures, token_values
from analyses.frame import new_parser, parsed
from analyses.gallery import Entry, write_gallery
from analyses.model_samples import add_model, loaded, samples_of
from analyses.partial_correlation import ALPHA, SAMPLES
from analyses.picture_maps import on_pixels, picture_maps
from analyses.result import Result, Score
from analyses.targets import NoTargetsError, Targets, answer_targets, special_ids
from analyses.token_masking import How, check_maskable, predicted_tokens
from hooked_mm.batch import Batch
from hooked_mm.connector import Connector, connector_map
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.prepare import load_images, sources
from hooked_mm.store_format import write_json

FILE = "graphs.json"
SETTINGS = (
    *("tokens", "layer", "heads", "threshold", "most_images", "alpha", "samples", "depth", "most_conditions"),
    *("most_tests", "how", "budget", "chance", "answer", "draws", "seed"),
)
"""Options that are written beside the scores."""


@dataclass
class Judged:
    """One head's explanation of one token, with its check.

    Attributes:
        sample: Its id.
        token, predicted: What is explained; what the model predicts with the found subset masked, None without one.
        whole: Whether masking the whole explanation changes the prediction; None if it has no token.
        chance: The share of draws of as many tokens of the same kinds that do; NaN without draws.
        on_object: Of the verified subset's image tokens, the share that lies on the asked object; NaN if unknown.
        area: The same of all image tokens.
    """

    sample: str
    held: HeadRows
    explanation: Explanation
    verification: Verification
    token: str
    predicted: str | None
    whole: bool | None
    chance: float
    on_object: float = math.nan
    area: float = math.nan


@dataclass
class Judge:
    """Explains and verifies, by settings that hold for a run."""

    model: HookedMM
    made: Any
    rng: np.random.Generator
    found: list[Judged] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def batch(self, samples: Sequence[Sample], batch: Batch, asked: Sequence[Any]) -> list[str]:
        """All answer tokens of a batch, all heads; the samples that have none, with the reason."""
        made = self.made
        try:
            targets = answer_targets(batch, made.tokens, special_ids(self.model))
        except NoTargetsError:
            targets = Targets(*torch.zeros(3, 0, dtype=torch.long))
        answered = set(targets.sample.tolist())
        without = [f"{one.id}: no answer with such a token" for n, one in enumerate(samples) if n not in answered]
        without += [
            f"{one.id}: no picture" for n, one in enumerate(samples) if n in answered and not sources(one.images)
        ]
        targets = targets.take([n for n, own in enumerate(targets.sample.tolist()) if sources(samples[own].images)])
        if not len(targets):
            return without
        connector = connector_map(self.model, batch) if batch.layout.kind == "resampled" else None
        every = head_rows(
            self.model, batch, targets, made.layer, made.heads, threshold=made.threshold, most_images=made.most_images
        )
        for number in range(len(targets)):
            own = [held for held in every if held.target == number]
            self._target(samples, batch, targets, own, connector, asked)
        return without

    def _target(
        self,
        samples: Sequence[Sample],
        batch: Batch,
        targets: Targets,
        heads: Sequence[HeadRows],
        connector: Connector | None,
        asked: Sequence[Any],
    ) -> None:
        sample, row = (int(values[heads[0].target]) for values in (targets.sample, targets.row))
        item, pictures = samples[sample], []
        base = predicted_tokens(self.model, batch, sample, row, [()], self.made.how)[0]
        word = self.model.tokenizer.decode([int(targets.token[heads[0].target])])
        for held in heads:
            judged = self._judge(batch, sample, row, held, base, word, item.id)
            subset = judged.verification.subset
            images = load_images(item.images)
            if asked[sample] is not None and subset:
                self._place(judged, batch, sample, images, connector, asked[sample])
            self.found.append(judged)
            name = f"layer {held.layer}, head {held.head}"
            values = token_values(judged.explanation, batch.modality.shape[1], subset)
            labels = node_labels(batch, sample, held.nodes)
            crops = node_crops(self.model, batch, sample, held.nodes, images)
            told = summary(judged.explanation, judged.verification, judged.predicted)
            pictures.append((f"{name}: {told}", graph_picture(judged.explanation, labels, subset, crops)))
            pictures += [
                (f"{name}: nodes, explanation, verified subset", one)
                for one in token_pictures(self.model, batch, sample, values, images, connector)
            ]
        if len(self.entries) < self.made.shown:
            self.entries.append(Entry(f"{item.id}: {word!r}", [("prompt", item.text)], pictures))

    def _judge(self, batch: Batch, sample: int, row: int, held: HeadRows, base: int, word: str, name: str) -> Judged:
        made, positions = self.made, held.nodes.positions
        told = explain(
            held.rows,
            held.nodes,
            alpha=made.alpha,
            samples=made.samples,
            depth=made.depth,
            most_conditions=made.most_conditions,
            most_tests=made.most_tests,
        )
        checked = check(
            self.model, batch, sample, row, told, how=made.how, budget=made.budget, at_once=made.at_once, base=base
        )
        members = maskable(told, made.how)
        whole, chance = None, math.nan
        if members:
            drawn = self._drawn(batch, sample, row, [held.nodes.image[node] for node in members])
            sets = [[positions[node] for node in members], *drawn]
            every = predicted_tokens(self.model, batch, sample, row, sets, made.how, made.at_once)
            whole, *others = (token != base for token in every)
            chance = float(np.mean(others)) if others else math.nan
        predicted = None if checked.predicted is None else self.model.tokenizer.decode([checked.predicted])
        return Judged(name, held, told, checked.verification, word, predicted, whole, chance)

    def _drawn(self, batch: Batch, sample: int, row: int, image: Sequence[bool]) -> list[list[int]]:
        """Positions by chance, as many of each kind as an explanation has."""
        masks = [mask[sample].clone().cpu() for mask in node_masks(batch)]
        for mask in masks:
            mask[row:] = False
        pools = [mask.nonzero()[:, 0].numpy() for mask in masks]
        counts = (sum(image), len(image) - sum(image))
        return [
            [
                int(place)
                for pool, count in zip(pools, counts, strict=True)
                for place in self.rng.choice(pool, count, False)
            ]
            for _ in range(self.made.chance)
        ]

    def _place(
        self,
        judged: Judged,
        batch: Batch,
        sample: int,
        images: Sequence[Any],
        connector: Connector | None,
        mask: Tensor,
    ) -> None:
        """Where the verified image tokens lie."""
        nodes = judged.held.nodes
        chosen = [nodes.positions[node] for node in judged.verification.subset if nodes.image[node]]
        if not chosen:
            return
        for name, places in (
            ("on_object", torch.tensor(chosen)),
            ("area", node_masks(batch)[0][sample].nonzero()[:, 0]),
        ):
            values = torch.zeros(batch.modality.shape[1])
            values[places.cpu()] = 1
            maps = picture_maps(self.model, batch, sample, values.to(self.model.device), images, connector)
            pixels = on_pixels(maps, 0, images[0].size, smooth=False).nan_to_num()
            setattr(judged, name, float(pixels[mask].sum() / pixels.sum()))


def as_json(judged: Judged) -> dict[str, Any]:
    """What `graphs.json` says of one head and token."""
    held, told, checked = judged.held, judged.explanation, judged.verification
    nodes = zip(held.nodes.positions, held.nodes.image, held.nodes.weights, told.tiers, strict=True)
    return {
        "sample": judged.sample,
        "token": judged.token,
        "layer": held.layer,
        "head": held.head,
        "image_mass": held.image_mass,
        "nodes": [
            {"position": place, "image": image, "attention": weight, "tier": tier}
            for place, image, weight, tier in nodes
        ],
        "edges": told.pag.edges(),
        "tests": told.learned.tests,
        "refused": told.learned.refused,
        "complete": told.learned.complete,
        "explanation": told.members,
        "paths": {str(node): path for node, path in told.paths.items()},
        "verification": {
            "status": checked.status,
            "verified": checked.verified,
            "subset": checked.subset,
            "others": checked.others,
            "tried": checked.tried,
            "all_up_to": checked.size,
            "predicts": judged.predicted,
        },
        "whole_changes": judged.whole,
        "chance_changes": None if math.isnan(judged.chance) else judged.chance,
        "on_object": None if math.isnan(judged.on_object) else judged.on_object,
        "area": None if math.isnan(judged.area) else judged.area,
    }


MEASURES = {
    "tokens of an explanation": lambda one: float(len(one.explanation.members)),
    "explanations verified": lambda one: float(one.verification.verified) if one.whole is not None else math.nan,
    "whole explanation masked: prediction changes": lambda one: math.nan if one.whole is None else float(one.whole),
    "as many tokens by chance masked: prediction changes": lambda one: one.chance,
    "tokens of a verified subset": lambda one: float(len(one.verification.subset)) or math.nan,
    "verified image tokens on the asked object": lambda one: one.on_object,
    "all image tokens on the asked object": lambda one: one.area,
}
"""Score -> its value for one head and token; NaN where it has none."""


def scores(found: Sequence[Judged], draws: int, seed: int) -> list[Score]:
    """Means, with intervals over samples."""
    made = []
    names = [one.sample for one in found]
    for title, measure in MEASURES.items():
        values = torch.tensor([measure(one) for one in found], dtype=torch.float64)
        known = ~values.isnan()
        own = [name for name, there in zip(names, known.tolist(), strict=True) if there]
        if not own:
            continue
        index = {name: number for number, name in enumerate(dict.fromkeys(own))}
        sums, counts = torch.zeros(2, len(index), dtype=torch.float64)
        for name, value in zip(own, values[known].tolist(), strict=True):
            sums[index[name]] += value
            counts[index[name]] += 1
        value, low, high = (float(end) for end in bootstrap(sums / counts, draws=draws, seed=seed))
        layers = {one.held.layer for one in found}
        made.append(Score(title, "all", layers.pop(), value, low, high, len(own), len(index)))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse causal-graph`."""
    parser = new_parser("causal-graph", __doc__)
    add_model(parser, "generated")
    parser.add_argument("--tokens", type=str | list[int], default="all", help="of answers: all, first, or numbers")
    parser.add_argument("--layer", type=int | None, help="whose heads; the last unless given")
    parser.add_argument("--heads", type=int | list[int], default=2, help="numbers, or how many of most image mass")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="attention that makes a token a node")
    parser.add_argument("--most_images", type=int, default=MOST_IMAGES, help="image tokens at the most")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="level of the tests")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="n of Fisher's z")
    parser.add_argument("--depth", type=int, default=DEPTH, help="of the explanation, in steps from the token")
    parser.add_argument("--most_conditions", type=int | None, default=MOST_CONDITIONS, help="in a test; null: any")
    parser.add_argument("--most_tests", type=int, default=MOST_TESTS, help="for one graph")
    parser.add_argument("--how", type=How, default="knockout", help="mask by cutting attention, or by the mean")
    parser.add_argument("--budget", type=int, default=BUDGET, help="masked runs for one explanation")
    parser.add_argument("--at_once", type=int, default=16, help="masked runs in one pass")
    parser.add_argument("--chance", type=int, default=20, help="draws of tokens by chance for one explanation")
    parser.add_argument("--shown", type=int, default=20, help="entries of the gallery at the most")
    made = parsed(parser, argv)
    model = loaded(made)
    check_maskable(model, made.how)
    judge = Judge(model, made, np.random.default_rng(made.seed))
    samples = samples_of(made, model)
    for items, batch in samples:
        samples.skipped += judge.batch(items, batch, asked_masks(made.data, items) or [None] * len(items))
    if not judge.found:
        raise BadInputError("no answer has such a token; give samples with answers, or other --tokens")
    result = Result("causal-graph", made.name or made.model.name, [], {name: made[name] for name in SETTINGS})
    result.scores += scores(judge.found, made.draws, made.seed)
    result.notes += [*notes(judge.found), *samples.notes()]
    write_json(made.output / FILE, {"graphs": [as_json(one) for one in judge.found]})
    write_gallery(made.output / "gallery.html", f"Causal graphs: {result.model}", judge.entries, result.notes)
    result.write(made.output)
    print(result.table())
    print(f"written to {str(made.output)!r}")


def notes(found: Sequence[Judged]) -> list[str]:
    """What a reader must know: costs, refused tests, searches cut short."""
    kinds = [one.verification.status if one.whole is not None else "without a token" for one in found]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    tests = [sum(one.explanation.learned.tests) for one in found]
    cut = sum(not one.explanation.learned.complete for one in found)
    refused = sum(one.explanation.learned.refused for one in found)
    return [
        f"explanations: {told}",
        f"{max(tests)} tests for a graph at the most, {refused} refused of {sum(tests)}",
        f"{cut} of {len(found)} searches were cut short by a limit",
        f"{sum(one.verification.tried for one in found)} masked runs for verification",
    ]
