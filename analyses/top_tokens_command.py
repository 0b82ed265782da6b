"""Top tokens per layer and modality, counted over a store or a data set; words of a class among them.

    hooked-mm analyse top-tokens --store runs/scenes --word_classes '[colours, shapes]' --output runs/top-tokens

From a store no model is loaded but its unembedding. Writes `tokens.csv` (every listed token), `tokens.md` (a table by
layer and modality), and the shares of word classes over layers as every analysis writes its scores.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from analyses.by_sample import mean_scores
from analyses.frame import add_layers, add_rows, by_modality, called, everywhere, finish, new_parser, opened, parsed
from analyses.layers import Layers
from analyses.logit_lens import Unembeds, read_cells
from analyses.result import Result, Score
from analyses.store_words import add_words, load_words, source_of_words
from analyses.top_tokens import TokenCount, TopTokens, class_tokens, markdown, shares_by_sample
from hooked_mm.processes import Processes
from hooked_mm.store import ActivationStore
from hooked_mm.word_classes import words_of

CONFIDENCE = "probability of the top token"


@dataclass
class Counted:
    """What one pass over the rows of a modality counts.

    Attributes:
        tokens: Per layer.
        rows: (samples,), rows of each sample.
        sums: Score -> (samples, layers), summed over the sample's rows.
    """

    tokens: dict[int, TopTokens]
    rows: Int[Tensor, " samples"]
    sums: dict[str, Float64[Tensor, "samples layers"]]


def count_tokens(
    layers: Layers,
    model: Unembeds,
    top: int = 5,
    classes: Mapping[str, Bool[Tensor, " vocab"]] | None = None,
    processes: Processes | None = None,
    device: torch.device | str = "cpu",
    size: int = 8192,
) -> Counted:
    """Go through the rows once, some at a time.

    Args:
        layers: The rows.
        model: Whose unembedding to use; on `device`.
        top: k.
        classes: Name -> which tokens are of the class.
        processes: Who shares the work; sums are exchanged.
        device: Where the lens is computed.
        size: Rows at a time.
    """
    everyone, numbers, groups = processes or Processes(), layers.numbers, torch.from_numpy(layers.samples)
    count, vocabulary = layers.store.samples.num_rows, int(model.cfg.d_vocab)
    tokens = {layer: TopTokens(vocabulary) for layer in numbers}
    names = {name: f"top token is of {name}" for name in classes or {}}
    sums = {name: torch.zeros(count, len(numbers), dtype=torch.float64) for name in (*names.values(), CONFIDENCE)}
    for rows, values in layers.batches(numbers, size, everyone):
        samples = groups[torch.from_numpy(rows)]
        for place, layer in enumerate(numbers):
            cells = read_cells(model, values[layer].to(device), top)
            tokens[layer].add(cells.ids, cells.probabilities)
            for name, members in (classes or {}).items():
                sums[names[name]][:, place] += shares_by_sample(members[cells.ids[:, 0]], samples, count)[0]
            sums[CONFIDENCE][:, place] += samples.bincount(cells.probabilities[:, 0].double(), minlength=count)
    for one in tokens.values():
        one.counts, one.sums = everyone.sum(one.counts.to(device)).cpu(), everyone.sum(one.sums.to(device)).cpu()
        one.rows = len(layers)
    return Counted(
        tokens,
        groups.bincount(minlength=count),
        {name: everyone.sum(value.to(device)).cpu() for name, value in sums.items()},
    )


def write_tokens(found: Sequence[TokenCount], tokenizer: Any, folder: Path) -> None:
    """`tokens.csv` and `tokens.md`."""
    with open(folder / "tokens.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["word", *asdict(found[0])])
        writer.writerows([tokenizer.decode([one.token]), *asdict(one).values()] for one in found)
    (folder / "tokens.md").write_text(markdown(found, tokenizer), encoding="utf-8")


def analyse(store: ActivationStore, made: Any, device: torch.device) -> Result:
    """The result, with the tables written by the first process."""
    model, layers = load_words(source_of_words(made, store), store, device), Layers.of_store(store, layers=made.layers)
    classes = {name: class_tokens(model.tokenizer, words_of(name), model.cfg.d_vocab) for name in made.word_classes}
    scores: list[Score] = []
    listed: list[TokenCount] = []
    settings = {name: made[name] for name in ("top", "count", "word_classes", "modalities", "draws", "seed")}
    result = Result("top-tokens", called(made, store), scores, settings)

    def one(part: Layers, modality: str) -> None:
        counted = count_tokens(part, model, made.top, classes, Processes(), device)
        for layer, tokens in counted.tokens.items():
            listed.extend(tokens.best(made.count, modality, layer))
        scores.extend(mean_scores(counted.sums, counted.rows, modality, list(counted.tokens), made.draws, made.seed))

    by_modality(layers, made.modalities, one, result.notes)
    if not Processes().rank:
        write_tokens(listed, model.tokenizer, made.output)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse top-tokens`."""
    parser = new_parser("top-tokens", __doc__)
    add_rows(parser)
    add_words(parser)
    add_layers(parser)
    parser.add_argument("--top", type=int, default=5, help="k: how many of a row's most probable tokens count")
    parser.add_argument("--count", type=int, default=10, help="tokens listed per layer and modality")
    parser.add_argument("--word_classes", type=list[str], default=["colours", "shapes"], help="see word_classes.py")
    made = parsed(parser, argv)
    store = opened(made)
    finish(everywhere(made.trainer, lambda device: analyse(store, made, device)), made.output)
