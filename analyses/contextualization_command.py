"""How contextual representations are: self-similarity, intra-sentence similarity, explained variance; less baselines.

    hooked-mm analyse contextualization --store runs/scenes --output runs/contextualization

Over layers, for all, text and image tokens: see `contextualization` for the formulas. `words.csv` and `sentences.csv`
have a line per word and sentence. Layers are shared out to processes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analyses.contextualization import Contextualization, Plan, measure, plan
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
from analyses.occurrences import Occurrences
from analyses.result import Result, Score, in_order
from hooked_mm.intervals import bootstrap
from hooked_mm.processes import Processes

SCORES = {
    "self-similarity": "self_similarity",
    "intra-sentence similarity": "intra_similarity",
    "explained variance": "explained",
    "self-similarity, raw": "raw_self_similarity",
    "intra-sentence similarity, raw": "raw_intra_similarity",
    "explained variance, raw": "raw_explained",
    "cosine of random tokens": "baseline_cosine",
    "explained variance of random tokens": "baseline_explained",
}
"""Score -> attribute of `Contextualization`."""

PLANNED = ("least", "most", "baseline", "repeats", "seed")


@dataclass
class _Found:
    """One process's share: scores, and lines of the two tables."""

    scores: list[Score]
    words: list[dict[str, Any]]
    sentences: list[dict[str, Any]]
    notes: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse contextualization`."""
    parser = new_parser("contextualization", __doc__)
    add_rows(parser)
    add_layers(parser)
    group = parser.add_argument_group("contextualization")
    group.add_argument("--least", type=int, default=5, help="contexts that a word needs")
    group.add_argument("--most", type=int, default=500, help="occurrences of a word at most; of more so many are drawn")
    group.add_argument("--baseline", type=int, default=1000, help="random tokens, each of another sample")
    group.add_argument("--repeats", type=int, default=5, help="draws that a baseline is the mean of")
    made = parsed(parser, argv)
    store = opened(made)
    settings = {name: made[name] for name in (*PLANNED, "modalities", "point", "draws")}
    result = Result("contextualization", called(made, store), [], settings)
    whole = Layers.of_store(store, made.point)
    found = everywhere(made.trainer, lambda device: _analyse(whole, made, device))
    result.notes = list(dict.fromkeys(note for share in found for note in share.notes))
    result.scores = in_order([one for share in found for one in share.scores], list(SCORES), made.modalities)
    if not Processes().rank:
        _table(made.output / "words.csv", [line for share in found for line in share.words], made.modalities)
        _table(made.output / "sentences.csv", [line for share in found for line in share.sentences], made.modalities)
    finish(result, made.output)


def _analyse(whole: Layers, made: Any, device: torch.device) -> list[_Found]:
    """The shares of all processes; each takes some of the layers."""
    processes, found = Processes(), _Found([], [], [], [])
    wanted = Layers.of_store(whole.store, made.point, made.layers).numbers

    def of_modality(layers: Layers, modality: str) -> None:
        seen = Occurrences.of(layers, device)
        chosen = plan(seen.words, seen.samples, seen.firsts, **{name: made[name] for name in PLANNED})
        found.notes.extend(f"{modality}: {note}" for note in (*seen.notes, *_counted(chosen)))
        for layer in wanted[processes.rank :: processes.size]:
            measured = measure(layers.reader(layer, device), chosen)
            if measured.zeros:
                found.notes.append(f"{modality}, layer {layer}: {measured.zeros} rows of norm zero left out")
            place: dict[str, Any] = {"modality": modality, "layer": layer}
            found.scores += _scores(measured, chosen, made, **place)
            found.words += [{**place, **line} for line in _words(measured, chosen, seen.names)]
            found.sentences += [{**place, **line} for line in _sentences(measured, chosen, layers)]

    by_modality(whole, made.modalities, of_modality, found.notes)
    return processes.gather(found)


def _counted(chosen: Plan) -> list[str]:
    """What of the rows counts and what was left out, in words."""
    counts = chosen.counts
    told = [
        f"{counts['words']} words and {counts['sentences'] - counts['sentences_of_one_token']} sentences; baseline of "
        f"{counts['baseline']} tokens, each of another sentence"
    ]
    left = {
        "repeated_contexts": "rows repeat a context and count once",
        "words_too_rare": "words have too few contexts",
        "rows_without_word": "rows have no token; they count in their sentences only",
        "occurrences_above_most": "occurrences of frequent words were not drawn",
        "sentences_of_one_token": "sentences of one token have no intra-sentence similarity",
    }
    return told + [f"{counts[name]} {text}" for name, text in left.items() if counts[name]]


def _scores(measured: Contextualization, chosen: Plan, made: Any, modality: str, layer: int) -> Iterator[Score]:
    """One of each kind, with its interval over sentences."""
    kept = int((chosen.sentence >= 0).sum())
    counts = {"rows": kept, "samples": chosen.counts["sentences"], "left_out": len(chosen.sentence) - kept}
    for name, attribute in SCORES.items():
        estimate = getattr(measured, attribute)
        low = high = math.nan
        if made.draws and math.isfinite(estimate.value):
            band = bootstrap(estimate.pseudo(), draws=made.draws, seed=made.seed)
            low, high = float(band.low), float(band.high)
        yield Score(name, modality, layer, estimate.value, low, high, **counts)


def _words(measured: Contextualization, chosen: Plan, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for place, word in enumerate(measured.words):
        yield {
            "word": names[word],
            "contexts": len(chosen.words[word]),
            "self_similarity": float(measured.self_similarity.each[place]),
            "explained": float(measured.explained.each[place]),
            "raw_self_similarity": float(measured.raw_self_similarity.each[place]),
            "raw_explained": float(measured.raw_explained.each[place]),
        }


def _sentences(measured: Contextualization, chosen: Plan, layers: Layers) -> Iterator[dict[str, Any]]:
    ids = layers.store.samples.column("sample").to_pylist()
    for place, sentence in enumerate(measured.sentences):
        yield {
            "sample": ids[sentence],
            "tokens": len(chosen.sentences[sentence]),
            "intra_similarity": float(measured.intra_similarity.each[place]),
            "raw_intra_similarity": float(measured.raw_intra_similarity.each[place]),
        }


def _table(path: Path, told: Sequence[dict[str, Any]], modalities: Sequence[str]) -> None:
    """Lines as CSV by modality and layer, whichever process wrote them; what is not known is empty."""
    lines = sorted(told, key=lambda line: (modalities.index(line["modality"]), line["layer"]))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else [])
        writer.writeheader()
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()} for line in lines
        )
