"""Multimodal neurons: which turn what a picture shows into a word, and whether silencing them silences the word.

    hooked-mm analyse neurons --model.id small:llava --model.dtype float32 --words '[red, blue]' \\
        --data ScenesDataModule --data.task questions --data.split train --data.size 300 \\
        --check ScenesDataModule --check.task questions --check.size 150 --output runs/neurons

Neurons are found on `--data`, wherever an answer says one of the words, and silenced on `--check`, other samples,
against draws of neurons of the same layers and about as active. Writes `neurons.csv`: the top neurons of each word,
with the words that they write. Where samples are scenes, whose masks are known, receptive fields (|z| over patches) are
held against what the word names. Effects may be smaller than what half precision can tell apart.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from analyses.frame import new_parser, parsed
from analyses.model_samples import Samples, add_model, loaded, samples_of
from analyses.neurons import (
    POINT,
    Neuron,
    ablated_logits,
    attributions,
    matched_draws,
    neuron_layers,
    receptive_fields,
    top_neurons,
    written_words,
)
from analyses.patch_maps import auroc, iou, on_picture, pointing
from analyses.result import Result, Score
from analyses.segment_command import NAMED, in_parts, object_masks
from analyses.segmentation import Threshold
from hooked_mm.batch import Batch
from hooked_mm.data import SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.frames import frame
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.scenes.captions import STYLES
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.selectors import TokenOfInterest


@dataclass
class Found:
    """What was attributed to one word so far.

    Attributes:
        scores, activity: layer -> (neurons,), summed over samples.
        by_layer: Per sample, what the neurons of each layer do together.
    """

    scores: dict[int, Float64[Tensor, " k"]] = field(default_factory=dict)
    activity: dict[int, Float64[Tensor, " k"]] = field(default_factory=dict)
    by_layer: list[Float64[Tensor, "b layers"]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many."""
        return sum(map(len, self.by_layer))


def said(
    samples: Samples, words: Sequence[str]
) -> Iterator[tuple[list[str], Batch, Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """Where answers first say one of the words: per place the word, its sample, the row that predicts it, its token."""
    selector = TokenOfInterest(words)
    for _, batch in samples:
        text = batch.decoder or batch
        # Of a word that an answer repeats, the first.
        first = {(pick.sample, pick.word): pick for pick in reversed(selector(text, samples.model.tokenizer))}
        if picks := sorted(first.values(), key=lambda pick: (pick.sample, pick.positions)):
            rows = torch.tensor([pick.positions[0] for pick in picks])
            own = torch.tensor([pick.sample for pick in picks])
            targets = text.input_ids.cpu()[own, rows + 1]
            yield [str(pick.word) for pick in picks], batch.take(own.tolist()), rows, targets


def find(samples: Samples, words: Sequence[str]) -> dict[str, Found]:
    """Attributions of every neuron to each word, over all samples that say it."""
    layers, found = neuron_layers(samples.model), {word: Found() for word in words}
    for names, batch, rows, targets in said(samples, words):
        made = attributions(samples.model, batch, targets, rows, layers=layers)
        for word in dict.fromkeys(names):
            own, mine = torch.tensor([name == word for name in names]), found[word]
            for sums, values in ((mine.scores, made.scores), (mine.activity, made.activity)):
                for layer, value in values.items():
                    sums[layer] = sums.get(layer, 0) + value[own].double().sum(0)
            mine.by_layer.append(torch.stack([made.scores[layer][own].double().sum(1) for layer in layers], dim=1))
    return found


def check(
    samples: Samples, words: Sequence[str], sets: dict[str, Sequence[Sequence[Neuron]]]
) -> dict[str, Float64[Tensor, "samples sets"]]:
    """What each word's logit loses under each of its sets of neurons, on the samples that say it."""
    lost: dict[str, list[Tensor]] = {word: [] for word in words}
    for names, batch, rows, targets in said(samples, words):
        for word in dict.fromkeys(name for name in names if name in sets):
            own = [place for place, name in enumerate(names) if name == word]
            # All occurrences of a word begin with the same token but for case or a leading space.
            logits = ablated_logits(samples.model, batch.take(own), [[], *sets[word]], targets[own].unique(), rows[own])
            index = torch.searchsorted(targets[own].unique(), targets[own])
            chosen = logits.double().gather(2, index.expand(len(logits), -1)[..., None])[..., 0]
            lost[word].append((chosen[0] - chosen[1:]).T)
    return {word: torch.cat(parts) for word, parts in lost.items() if parts}


def effects(lost: Float64[Tensor, "samples sets"], word: str, draws: int, seed: int) -> list[Score]:
    """The drop under the top neurons with its interval over samples, and what draws of matched neurons give."""
    means, matched = bootstrap(lost[:, :2], draws=draws, seed=seed), lost[:, 2:].mean(0)
    about = {"rows": len(lost), "samples": len(lost)}
    names = ("top neurons silenced", "most active silenced")
    found = []
    for place, name in enumerate(names):
        value, low, high = (float(end[place]) for end in means)
        found.append(Score(f"{word}: logit lost, {name}", "image", None, value, low, high, **about))
    reached = {"mean": matched.mean(), "99th percentile": matched.quantile(0.99), "largest": matched.max()}
    for name, drop in reached.items():
        found.append(Score(f"{word}: logit lost, {name} of matched draws", "image", None, float(drop), **about))
    return found


def most_active(activity: dict[int, Tensor], chosen: Sequence[Neuron]) -> list[Neuron]:
    """As many neurons of the same layers, the most active besides those chosen."""
    found = []
    for layer in dict.fromkeys(neuron.layer for neuron in chosen):
        taken = {neuron.number for neuron in chosen if neuron.layer == layer}
        order = [n for n in activity[layer].argsort(descending=True).tolist() if n not in taken]
        found += [Neuron(layer, n) for n in order[: len(taken)]]
    return found


def fields(
    model: HookedMM, data: SceneDataset, word: str, neurons: Sequence[Neuron], size: int = 32
) -> dict[str, Float64[Tensor, "pictures neurons"]]:
    """How well receptive fields show where in a scene a word's objects are; of the scenes that have such.

    Args:
        model: The model.
        data: Scenes; a caption's prompt stands behind each picture.
        word: A colour or a shape.
        neurons: Whose fields.
        size: Scenes at a time.

    Returns:
        `pixel AUROC`, `pointing` and `IoU`, that of the twentieth of the pixels of largest |z|.
    """
    attribute = next(NAMED[name] for name in NAMED if word in WORD_CLASSES[name])
    points, rows = [POINT.format(layer) for layer in dict.fromkeys(neuron.layer for neuron in neurons)], []
    for items in in_parts(data, size):
        pictures = [picture(item) for item in items]
        _, cache = model.run_with_cache(model.prepare(pictures, STYLES["any"].prompt), points)
        for number, (item, image) in enumerate(zip(items, pictures, strict=True)):
            if (mask := object_masks(item, attribute).get(word)) is None:
                continue
            (grid,) = receptive_fields(cache, neurons, number)
            box = frame(model, image, (grid.shape[0], grid.shape[1]))
            maps = [on_picture(grid[..., place].abs(), box, image.size) for place in range(len(neurons))]
            top = Threshold("quantile", 0.95)
            rows.append([[auroc(one, mask), pointing(one, mask), iou(top.choose(one), mask)] for one in maps])
    found = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(neurons), 3)
    return dict(zip(("pixel AUROC", "pointing", "IoU"), found.unbind(2), strict=True))


def field_scores(
    model: HookedMM, data: SceneDataset, word: str, sets: Sequence[Sequence[Neuron]], made: Any
) -> list[Score]:
    """Of the top neurons' receptive fields, beside those of the first draw of matched ones."""
    found = []
    for name, neurons in (("top neurons", sets[0]), ("matched neurons", sets[2])):
        for what, values in fields(model, data, word, neurons).items():
            if len(values):
                band = bootstrap(values.mean(1), draws=made.draws, seed=made.seed)
                value, low, high = (float(end) for end in band)
                title = f"{word}: {what} of receptive fields, {name}"
                found.append(Score(title, "image", None, value, low, high, values.numel(), len(values)))
    return found


def says(model: HookedMM, neuron: Neuron, count: int = 5) -> list[str]:
    """The words that a neuron writes most."""
    best = written_words(model, neuron.layer, torch.tensor([neuron.number])).topk(count).indices[0]
    return [model.tokenizer.decode([token]).strip() for token in best.tolist()]


def analyse(model: HookedMM, made: Any) -> tuple[Result, list[list[Any]]]:
    """The result, and the table of neurons."""
    first = samples_of(made, model)
    found = {word: one for word, one in find(first, made.words).items() if one.samples}
    if not found:
        raise BadInputError(f"no answer says any of {made.words}; take more samples, or words of their answers")
    names = ("words", "count", "matched", "pool", "answer", "draws", "seed")
    result = Result("neurons", made.name or made.model.name, [], {name: made[name] for name in names})
    result.notes += [f"no answer says {word!r}" for word in made.words if word not in found] + first.notes()
    if model.dtype in (torch.float16, torch.bfloat16):
        result.notes.append("logits are rounded to half precision; --model.dtype float32 tells smaller effects apart")
    table: list[list[Any]] = []
    sets: dict[str, Sequence[Sequence[Neuron]]] = {}
    for word, one in found.items():
        layers = torch.cat(one.by_layer)
        bands = bootstrap(layers, draws=made.draws, seed=made.seed)
        for place, layer in enumerate(one.scores):
            about = {"rows": one.samples, "samples": one.samples}
            value, low, high = (float(end[place]) for end in bands)
            result.scores.append(Score(f"{word}: attributed to neurons", "image", layer, value, low, high, **about))
        top = top_neurons({layer: value[None] for layer, value in one.scores.items()}, made.count)
        sets[word] = [top, most_active(one.activity, top)]
        sets[word] += matched_draws(one.activity, top, made.matched, pool=made.pool, seed=made.seed)  # type: ignore[operator]
        for neuron in top:
            means = [float(of[neuron.layer][neuron.number]) / one.samples for of in (one.scores, one.activity)]
            table.append([word, *neuron, *means, " ".join(says(model, neuron))])
        drawn = sum(float(one.activity[n.layer][n.number]) for drawn in sets[word][2:] for n in drawn)
        mine = sum(float(one.activity[n.layer][n.number]) for n in top) * max(1, made.matched)
        result.notes.append(f"{word}: matched neurons are {drawn / mine:.2f} times as active as the top ones")
    if made.check is not None:
        other = samples_of(made, model, made.check)
        lost = check(other, list(found), sets)
        result.notes += [f"no answer of --check says {word!r}" for word in found if word not in lost] + other.notes()
        for word, drops in lost.items():
            result.scores += effects(drops, word, made.draws, made.seed)
    scenes = getattr(made.check or made.data, "scenes", None)
    for word in found:
        if isinstance(scenes, SceneDataset) and any(word in WORD_CLASSES[name] for name in NAMED):
            result.scores += field_scores(model, scenes, word, sets[word], made)
    return result, table


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse neurons`."""
    parser = new_parser("neurons", __doc__)
    add_model(parser, "generated")
    parser.add_argument("--words", type=list[str], required=True, help="whose neurons are looked for")
    parser.add_argument("--count", type=int, default=10, help="how many neurons of a word are listed and silenced")
    parser.add_argument("--matched", type=int, default=200, help="draws of other neurons as active")
    parser.add_argument("--pool", type=int, default=10, help="from how many neighbours in activity one is drawn")
    parser.add_subclass_arguments(
        SampleDataModule, "check", required=False, help="other samples, to silence neurons on"
    )
    made = parsed(parser, argv)
    if made.matched < 1 or made.draws < 1:
        raise BadInputError(f"matched={made.matched}, draws={made.draws}: at least one of each")
    result, table = analyse(loaded(made), made)
    with open(made.output / "neurons.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["word", "layer", "neuron", "attribution", "activity", "says"], *table])
    result.write(made.output)
    for word in dict.fromkeys(row[0] for row in table):
        print(word, *(f"{row[1]}.{row[2]} ({row[5]})" for row in table if row[0] == word), sep="\n  ")
    print(result.table())
    print(f"written to {str(made.output)!r}")
