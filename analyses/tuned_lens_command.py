"""The tuned lens over a store: trained on some samples, scored on others beside the plain logit lens.

    hooked-mm analyse tuned-lens --store runs/scenes --steps 300 --output runs/tuned

From a store no model is loaded but its unembedding. Scores are how far each layer's lens is from what the model says in
the end (KL divergence in bits) and how often both have the same most probable word, means over held-out samples with
bootstrap intervals over these. The translators lie in `lens/` (`TunedLens.load`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from analyses.by_sample import mean_scores
from analyses.frame import add_layers, add_rows, by_modality, called, finish, new_parser, opened, parsed
from analyses.layers import Layers
from analyses.occurrences import Occurrences, pictures
from analyses.result import Result
from analyses.splits import deal_out
from analyses.store_words import add_words, load_words, source_of_words
from analyses.tuned_lens import Optimiser, Readable, TunedLens, divergence, train
from hooked_mm.processes import goes_on_alone

SCORES = ("bits from the model's words", "same most probable word as the model")
LENSES = ("logit lens", "tuned lens")


def compared(
    layers: Layers,
    model: Readable,
    lens: TunedLens,
    rows: Int[np.ndarray, " n"],
    device: torch.device | str = "cpu",
    size: int = 2048,
) -> tuple[dict[tuple[str, str], Float64[Tensor, "samples layers"]], Int[Tensor, " samples"]]:
    """Both lenses against the last layer's words.

    Args:
        layers: The store's layers, the last of them the model's last.
        model: Whose norm and unembedding to use.
        lens: Trained on other rows.
        rows: Which rows.
        device: Where the model is.
        size: Rows at a time.

    Returns:
        (score, lens) -> sums over each sample's rows, and how many these are.
    """
    numbers, count = lens.layers, layers.store.samples.num_rows
    kinds = [(score, name) for score in SCORES for name in LENSES]
    sums = {kind: torch.zeros(count, len(numbers), dtype=torch.float64) for kind in kinds}
    samples = torch.from_numpy(layers.samples)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        owner = samples[torch.from_numpy(part)]
        target = model.to_logits(layers.values(layers.numbers[-1], part).to(device))
        for place, layer in enumerate(numbers):
            resid = layers.values(layer, part).to(device)
            for name, logits in zip(LENSES, (model.to_logits(resid), lens.logits(model, layer, resid)), strict=True):
                far = divergence(target, logits).cpu() / math.log(2)
                same = logits.argmax(-1) == target.argmax(-1)
                for score, values in zip(SCORES, (far, same.cpu()), strict=True):
                    sums[score, name][:, place] += owner.bincount(values.double(), minlength=count)
    return sums, samples[torch.from_numpy(rows)].bincount(minlength=count)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse tuned-lens`."""
    parser = new_parser("tuned-lens", __doc__)
    add_rows(parser)
    add_words(parser)
    add_layers(parser)
    parser.add_argument("--steps", type=int, default=250, help="batches")
    parser.add_argument("--batch", type=int, default=2048, help="rows per batch, over all processes")
    parser.add_argument("--optimiser", type=Optimiser, default="adamw", help="sgd is the paper's")
    parser.add_argument("--rate", type=float | None, help="at first; it falls linearly to zero")
    parser.add_argument("--decay", type=float, default=1e-3, help="weight decay, towards the logit lens")
    parser.add_argument("--group", type=str | None, help="a column: samples of equal values are never parted")
    parser.add_argument("--held_out", type=float, default=0.25, help="share of the samples that scores are of")
    made = parsed(parser, argv)
    store = opened(made)
    layers = Layers.of_store(store, layers=made.layers)
    load = partial(load_words, source_of_words(made, store), store)
    groups, notes = pictures(layers, Occurrences.of(layers, "cpu"), made.group)
    # Nothing is chosen on samples of their own, so that those for choosing train as well.
    share = (1 - made.held_out) / 2
    test = deal_out(groups, (share, share, made.held_out), made.seed)["test"]
    rows = np.arange(len(layers))
    training = rows[~test[layers.samples]]
    options = {name: made[name] for name in ("steps", "optimiser", "rate", "decay", "seed")}
    lens, losses = train(layers, load, training, size=made.batch, trainer=made.trainer, **options)
    if not goes_on_alone():
        return
    settings = {**options, "batch": made.batch, "held_out": made.held_out, "modalities": made.modalities}
    result = Result("tuned-lens", called(made, store), [], settings, notes)
    ends = sum(losses[:10]) / len(losses[:10]), sum(losses[-10:]) / len(losses[-10:])
    result.notes.append(f"loss over all layers, nats: {ends[0]:.3f} in the first ten steps, {ends[1]:.3f} in the last")
    on_gpu = made.trainer.get("accelerator", "cpu") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load(device)
    lens.save(made.output / "lens", {"model": called(made, store), "rows": len(training), **options})

    def one(part: Layers, modality: str) -> None:
        own = np.flatnonzero(test[part.samples])
        sums, counts = compared(part, model, lens.to(device), own, device)
        named = {f"{score}, {kind}": values for (score, kind), values in sums.items()}
        result.scores += mean_scores(named, counts, modality, lens.layers, made.draws, made.seed)

    by_modality(layers, made.modalities, one, result.notes)
    finish(result, made.output)
