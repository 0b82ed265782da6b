"""What can be read off representations by a linear probe, layer by layer, beside a control task that is chance.

    hooked-mm analyse probe --store runs/scenes --label facts --fact colour=red --output runs/red
    hooked-mm analyse probe --store runs/scenes --label place --output runs/place

See `linear_probe` for the probe and `row_labels` for labels. Samples that share a picture are never parted; layers are
shared out to processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from analyses.frame import (
    add_layers,
    add_rows,
    by_modality,
    called,
    everywhere,
    finish,
    new_parser,
    opened,
    parsed,
)
from analyses.layers import Layers
from analyses.linear_probe import PENALTIES, Probed, linear_probe
from analyses.occurrences import Occurrences, numbered_words, pictures
from analyses.result import Result, Score, in_order
from analyses.row_labels import WORD, row_labels
from analyses.splits import deal_out
from hooked_mm.errors import unknown
from hooked_mm.intervals import bootstrap
from hooked_mm.processes import Processes

SCORES = {
    "accuracy": "task",
    "control accuracy": "control",
    "selectivity": "selectivity",
    "accuracy with shuffled labels": "shuffled",
    "accuracy of the majority label": "majority",
}
"""Score -> its name in `Probed`."""

IntArray = Int[np.ndarray, " n"]


@dataclass
class _Found:
    """One process's share."""

    scores: list[Score]
    notes: list[str]
    validation: dict[tuple[str, int], float]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse probe`."""
    parser = new_parser("probe", __doc__)
    add_rows(parser)
    add_layers(parser)
    group = parser.add_argument_group("probe")
    group.add_argument("--label", type=str, required=True, help="a column of the samples' table, or `word`")
    group.add_argument("--fact", type=str | None, help="in a column of lists: whether this is among them")
    group.add_argument(
        "--types", type=str | None, help="what has one control label: word, sample, or a column; see `control_types`"
    )
    group.add_argument("--group", type=str | None, help="a column: samples of equal values are never parted")
    group.add_argument("--shares", type=list[float], default=[0.6, 0.2, 0.2], help="training, validation, test")
    group.add_argument("--penalties", type=list[float], default=list(PENALTIES), help="to choose from on validation")
    made = parsed(parser, argv)
    store = opened(made)
    names = ("label", "fact", "types", "group", "shares", "penalties", "modalities", "point", "draws", "seed")
    result = Result("probe", called(made, store), [], {name: made[name] for name in names})
    whole = Layers.of_store(store, made.point)
    found = everywhere(made.trainer, lambda device: _analyse(whole, made, device))
    result.notes = list(dict.fromkeys(note for share in found for note in share.notes))
    result.scores = in_order([one for share in found for one in share.scores], list(SCORES), made.modalities)
    result.notes += _best(result, {key: value for share in found for key, value in share.validation.items()})
    finish(result, made.output)


def _analyse(whole: Layers, made: Any, device: torch.device) -> list[_Found]:
    """The shares of all processes; each takes some of the layers."""
    processes = Processes()
    seen = Occurrences.of(whole, device)
    groups, notes = pictures(whole, seen, made.group)
    parts = deal_out(groups, made.shares, made.seed)
    found = _Found([], [*notes], {})
    wanted = Layers.of_store(whole.store, made.point, made.layers).numbers

    def of_modality(layers: Layers, modality: str) -> None:
        labels = row_labels(layers, made.label, made.fact)
        wished = made.types or (WORD if made.label == WORD else "sample")
        types, told = control_types(layers, wished, numbered_words(layers)[1])
        found.notes.extend(f"{modality}: {note}" for note in told)
        for layer in wanted[processes.rank :: processes.size]:
            probed = linear_probe(
                layers.reader(layer, device),
                labels.numbers,
                types,
                layers.samples,
                parts,
                penalties=made.penalties,
                seed=made.seed,
            )
            found.scores += _scores(probed, made, modality, layer)
            found.validation[modality, layer] = probed.validation["task"]
        found.notes.append(f"{modality}: {_counted(probed.counts, labels.names)}")

    by_modality(whole, made.modalities, of_modality, found.notes)
    return processes.gather(found)


def control_types(layers: Layers, types: str, words: IntArray) -> tuple[IntArray, list[str]]:
    """Per row what has one label in the control task, and what a reader must know of that.

    The control must be as hard as the task. A label of words is compared with random labels of words. A label that all
    rows of a sample share is compared with random labels of samples, which no probe can know on samples held out: that
    the split is by sample is what keeps learning by heart out. (Random labels of words or patch positions are far
    easier: eight tokens of a prompt are told apart without fail.)

    Args:
        layers: The rows.
        types: `word`: the row's token or patch position, and the sample where it has none; `sample`; or a column of
            the samples' table.
        words: Per row the number of its word, or -1.

    Raises:
        BadInputError: If there is no such column.
    """
    samples, table = layers.samples, layers.store.samples
    if types == "sample":
        return samples, []
    if types == WORD:
        found = np.where(words < 0, words.max(initial=0) + 1 + samples, words)
    elif types in table.column_names:
        _, numbers = np.unique([repr(value) for value in table.column(types).to_pylist()], return_inverse=True)
        found = numbers[samples]
    else:
        raise unknown("type", types, [WORD, "sample", *table.column_names])
    single = len(np.unique(found)) < 2
    return found, ["all rows are of one type, so the control task has one label; choose other --types"] * single


def _scores(probed: Probed, made: Any, modality: str, layer: int) -> Iterator[Score]:
    """One of each kind, with its interval over samples."""
    samples = len(np.unique(probed.samples))
    for name, key in SCORES.items():
        value = probed.selectivity if key == "selectivity" else probed.accuracy(key)
        low = high = math.nan
        if made.draws:
            band = bootstrap(probed.pseudo(key), draws=made.draws, seed=made.seed)
            low, high = float(band.low), float(band.high)
        yield Score(name, modality, layer, value, low, high, len(probed.samples), samples)


def _counted(counts: dict[str, int], names: Sequence[str]) -> str:
    """Rows, labels and what was left out, in words."""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    told = (
        f"{counts['train']} rows to fit, {counts['validation']} to choose the penalty, {counts['test']} to score; "
        f"{counts['labels']} labels ({shown}), {counts['types']} control types"
    )
    if counts["without_label"]:
        told += f"; {counts['without_label']} rows without a label left out"
    if counts["test_labels_unknown"]:
        told += f"; {counts['test_labels_unknown']} test rows have a label that no training row has"
    return told


def _best(result: Result, validation: dict[tuple[str, int], float]) -> list[str]:
    """Per modality the layer that is best on the validation rows, so that its score is not the luckiest of many."""
    told = []
    for modality in dict.fromkeys(name for name, _ in validation):
        own = {layer: value for (name, layer), value in sorted(validation.items()) if name == modality}
        layer = max(own, key=lambda place: own[place])
        score = next(one for one in result.of("accuracy", modality) if one.layer == layer)
        told.append(f"{modality}: best on validation at layer {layer}, where the accuracy is {score.value:.3f}")
    return told
