"""How much of the text before it each token remembers, by a probe that learns to say it from the representation alone.

    hooked-mm analyse prefix-probe --store runs/scenes --output runs/memory

See `prefix_probe`. The store's rows must keep their tokens (`--selector EachOf --selector.tokens true`, which is what
is extracted unless told). `tokens.csv` says which tokens remember most. One process trains.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyses.by_sample import ratio_by_sample
from analyses.frame import add_layers, add_rows, called, finish, new_parser, opened, parsed
from analyses.layers import Layers
from analyses.occurrences import Occurrences, pictures
from analyses.prefix_probe import IntArray, Said, Setting, say, train
from analyses.prefixes import Prefixes
from analyses.result import Result, Score
from analyses.splits import PARTS, Part, deal_out
from hooked_mm.errors import BadInputError
from hooked_mm.extraction_job import quiet_trainer
from hooked_mm.intervals import bootstrap
from hooked_mm.processes import goes_on_alone

SCORES = (
    "information about the prefix",
    "prefix loss",
    "prefix loss given another's representation",
    "prefix loss given nothing",
)
"""Nats per token of the prefixes."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse prefix-probe`."""
    parser = new_parser("prefix-probe", __doc__)
    add_rows(parser)
    add_layers(parser)
    parser.add_class_arguments(Setting, "probe", skip={"seed"})
    group = parser.add_argument_group("prefixes")
    group.add_argument("--longest", type=int, default=32, help="tokens of a prefix at most, those nearest to the row")
    group.add_argument("--rows", type=int, default=20_000, help="rows to train on at most; of more so many are drawn")
    group.add_argument("--group", type=str | None, help="a column: samples of equal values are never parted")
    group.add_argument("--shares", type=list[float], default=[0.6, 0.2, 0.2], help="training, validation, test")
    made = parsed(parser, argv)
    store = opened(made)
    if not goes_on_alone():
        return
    layers = Layers.of_store(store, made.point, made.layers)
    seen = Occurrences.of(Layers.of_store(store, made.point))
    groups, notes = pictures(layers, seen, made.group)
    parts = deal_out(groups, made.shares, made.seed)
    prefixes = Prefixes.of(layers.words, seen.samples, layers.positions, parts["train"], made.longest)
    rows = _usable(layers, seen, prefixes, notes)
    dealt = {part: rows[parts[part][seen.samples[rows]]] for part in PARTS}
    if len(dealt["train"]) > made.rows:
        notes.append(f"{made.rows} of {len(dealt['train'])} rows were drawn to train on")
        rng = np.random.default_rng(made.seed)
        dealt["train"] = np.sort(rng.choice(dealt["train"], made.rows, replace=False))
    setting = Setting(**{**vars(made.probe), "seed": made.seed})
    # Rows were extracted by many processes, perhaps; one trains.
    own = {name: value for name, value in made.trainer.items() if name not in ("devices", "strategy", "num_nodes")}
    trainer = quiet_trainer(
        **{"accelerator": "cpu", "enable_progress_bar": True, **own, "devices": 1, "max_epochs": setting.epochs}
    )

    def read(chosen: IntArray) -> Tensor:
        return torch.stack([layers.values(layer, chosen) for layer in layers.numbers], dim=1)

    probe = train(read, prefixes, dealt, trainer, setting)
    said = say(probe, dealt["test"], seen.samples, made.seed)
    weights = probe.mixture.detach().softmax(0).tolist()
    notes += _counted(dealt, prefixes, probe.best[0], dict(zip(layers.numbers, weights, strict=True)))
    names = ("longest", "rows", "group", "shares", "modalities", "point", "draws", "seed")
    settings = {**{name: made[name] for name in names}, "probe": vars(setting)}
    result = Result("prefix-probe", called(made, store), [], settings, notes)
    modality = np.array(store.rows.column("modality").to_pylist())[said.rows]
    found = [one for name in made.modalities for one in _scores(said, name, modality, seen.samples, layers, made)]
    result.scores = [one for name in SCORES for one in found if one.score == name]
    _tokens(made.output / "tokens.csv", said, [seen.names[word] if word >= 0 else "" for word in seen.words[said.rows]])
    finish(result, made.output)


def _usable(layers: Layers, seen: Occurrences, prefixes: Prefixes, notes: list[str]) -> IntArray:
    """Rows in contexts of their own, with a prefix; not those of a modality whose prefixes are all the same."""
    kept = (seen.firsts == np.arange(len(seen.words))) & (prefixes.lengths() > 0)
    notes.append(f"{int((~kept).sum())} of {len(kept)} rows repeat a context or have no token before them: left out")
    modality = np.array(layers.store.rows.column("modality").to_pylist())
    for name in np.unique(modality[kept]):
        own = kept & (modality == name)
        if not prefixes.differ(np.flatnonzero(own)):
            kept &= ~own
            notes.append(
                f"{int(own.sum())} {name} rows have the same text before them all: nothing to remember, left out"
            )
    if not kept.any():
        raise BadInputError("no row has text before it that another has not; take rows behind the prompt, or answers")
    return np.flatnonzero(kept)


def _counted(dealt: dict[Part, IntArray], prefixes: Prefixes, loss: float, weights: dict[int, float]) -> list[str]:
    """Rows, lengths and what the mixture looks at, in words."""
    lengths = prefixes.lengths()[np.concatenate(list(dealt.values()))]
    told = [
        f"{len(dealt['train'])} rows to train on, {len(dealt['validation'])} to end training, {len(dealt['test'])} to "
        f"score; prefixes of {lengths.mean():.1f} tokens, {len(prefixes.names) - 1} different tokens",
        f"best validation loss {loss:.4f} nats per token, over all inputs",
        "the mixture's weights of layers: " + ", ".join(f"{layer}: {weight:.2f}" for layer, weight in weights.items()),
    ]
    return told + [f"{prefixes.cut} rows have longer prefixes, which were cut at their beginning"] * bool(prefixes.cut)


def _scores(
    said: Said, name: str, modality: np.ndarray, samples: IntArray, layers: Layers, made: Any
) -> Iterator[Score]:
    """Of one modality: every layer, and the mixture as one without a layer."""
    own = np.flatnonzero((modality == name) | (name == "all"))
    if not len(own):
        return
    of = samples[said.rows[own]]
    for place, layer in enumerate([*layers.numbers, None]):
        totals = (
            said.nothing[own] - said.own[own, place],
            said.own[own, place],
            said.other[own, place],
            said.nothing[own],
        )
        for score, total in zip(SCORES, totals, strict=True):
            pseudo = ratio_by_sample(total, said.tokens[own], of)
            low = high = math.nan
            if made.draws:
                band = bootstrap(pseudo, draws=made.draws, seed=made.seed)
                low, high = float(band.low), float(band.high)
            yield Score(score, name, layer, float(pseudo.mean()), low, high, len(own), len(np.unique(of)))


def _tokens(path: Any, said: Said, words: Sequence[str]) -> None:
    """Per token, means over its rows: C_i of the mixture, its prefix's length, and information per token of that."""
    table: list[tuple[Any, ...]] = []
    for word in dict.fromkeys(words):
        own = np.array([one == word for one in words])
        mixed, length = said.own[own, -1], said.tokens[own]
        gained = (said.nothing[own] - mixed).sum() / length.sum()
        table.append((word, int(own.sum()), length.mean(), mixed.mean(), mixed.sum() / length.sum(), gained))
    table.sort(key=lambda line: -line[-1])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("token", "rows", "prefix_tokens", "contextualization", "loss_per_token", "information_per_token")
        )
        writer.writerows(table)
