"""What fine-tuning changed in the small models: is it a translation per concept, and what does that translation do?

    python -m benchmarks.shift_study --models llava idefics2 qwen2_vl --output docs/shift_study.md

Recovery: captions are given, rows are taken at every word that tells an attribute (from the position that predicts it)
and at the last token of the prompt, after every block. Per model, the block is chosen on scenes of the split
`validation`; figures are of `test`, whose scenes are dealt into those that the original's dictionary is learnt from,
those that shifts are computed from, and those that everything is measured on; five times (seeds).

Steering: both models read what the fine-tuned one says. The original is then steered on scenes of another seed: by one
vector at the last token of the prompt, or at every token by the shift of the concept that it activates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from torch.nn.functional import normalize
from tqdm import tqdm

from concept_dict.decomposition import Decomposition
from concept_dict.gains import Comparison, compare, counted
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.recovery import FORMS, SCORES, Concepts
from concept_dict.shift import main_concept, movements, shift_vectors
from concept_dict.shift_run import SHARES, deal, decoder, spelled
from concept_dict.shift_steering import ShiftConcepts
from concept_dict.shift_study import Settings, ShiftStudy, study
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add, Intervention
from hooked_mm.pair_extraction import extract_pair
from hooked_mm.paired_rows import PairedRows, pair_rows
from hooked_mm.positions import as_rule
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.captions import CAPTION_PROMPT, WORDINGS
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.scenes.world import Scene, scene
from hooked_mm.selectors import EachOf, LastPrompt, TokenOfInterest
from hooked_mm.small.adapter_scores import captions, style_of
from hooked_mm.small.changes import CHANGES, Change
from hooked_mm.store import ActivationStore

HOOKS = "blocks.*.hook_resid_post"
WORDS = tuple(word for name in DESCRIBED for word in WORD_CLASSES[name])
POSITIONS = {"words": TokenOfInterest(WORDS), "last prompt": LastPrompt()}
SIZES = {"validation": 1000, "test": 2000}
METHODS: dict[str, Decomposition] = {
    "KMeans, k = 20": KMeans(20),
    "KMeans, k = 20, not centred": KMeans(20, center=False),
    "KMeans, k = 10": KMeans(10),
    "KMeans, k = 50": KMeans(50),
    "NonNegativeDictionary, k = 20": NonNegativeDictionary(20, tol=1e-4, max_iter=100),
}
"""The first one chooses the block, and its tables are shown in full; the paper's concepts are not centred."""
GOAL = ("cosine", "words")
NEW_SCENES = 77
"""Seed of the scenes that steering is scored on."""


@dataclass(frozen=True)
class Rows:
    """Rows of one model and its fine-tuned sibling in pairs, at one position rule."""

    original: ActivationStore
    tuned: ActivationStore
    pairs: PairedRows

    def study(self, method: Decomposition, layer: int, seed: int, model: HookedMM) -> ShiftStudy:
        """The study of one block's output."""
        hook = f"blocks.{layer}.hook_resid_post"
        parts = deal(self.original, self.tuned, self.pairs, hook, SHARES, seed).parts
        # Adapters leave the unembedding as it is.
        words = spelled(decoder(model))
        method = clone(method).set_params(random_state=seed)
        return study(
            method,
            parts["shift"],
            parts["measure"],
            learn=parts["learn"],
            words=(words, words),
            settings=Settings(seed=seed),
        )


def rows_of(name: str, split: str, folder: Path, seed: int) -> dict[tuple[str, str], Rows]:
    """(adapter, position) -> rows of a split."""
    data = ScenesDataModule(SIZES[split], "caption", split, seed, batch_size=64)  # type: ignore[arg-type]
    stores = {}
    for adapter in (None, *CHANGES):
        extractor = Extractor(HookedMM.small(name, adapter=adapter), HOOKS, POSITIONS, answer="given")
        stores[adapter] = extract(extractor, data, folder / f"{name}-{split}-{adapter}")
    found = {}
    for adapter in CHANGES:
        for position in POSITIONS:
            pair = [stores[which].where(selector=position) for which in (None, adapter)]
            found[adapter, position] = Rows(*pair, pair_rows(*pair))
    return found


def best_layer(rows: Mapping[tuple[str, str], Rows], position: str, model: HookedMM) -> int:
    """The block where the shift per concept most often beats the global one for sure, on validation scenes."""
    method = next(iter(METHODS.values()))
    worth = {}
    for layer in range(model.cfg.n_layers):
        found = [rows[adapter, position].study(method, layer, 0, model) for adapter in CHANGES]
        gains = [compare(one.recovery, score) for one in found for score in GOAL]
        worth[layer] = (sum(gain.low > 0 for gain in gains), float(np.nansum([gain.mean for gain in gains])))
    return max(worth, key=lambda layer: worth[layer])


def cell(found: Sequence[Comparison]) -> str:
    """The first seed's gain, interval, shares of concepts that gain and that lose; seeds that are surely above zero."""
    first = found[0]
    sure = sum(one.low > 0 for one in found)
    shares = f"{first.improved:.0%} gain, {first.worse:.0%} lose"
    return f"{first.mean:+.3f} [{first.low:.3f}, {first.high:.3f}], {shares}; {sure} of {len(found)}"


def recovery_tables(name: str, folder: Path, seeds: int, methods: Sequence[str] = tuple(METHODS)) -> Iterator[str]:
    """Of one model: a table of forms per adapter, then what the shift gains over the global one in every set-up."""
    model = HookedMM.small(name)
    validation, test = (rows_of(name, split, folder, seed) for split, seed in (("validation", 0), ("test", 0)))
    columns = ("position, block", "adapter", "concepts by", "cosine", "words", "concepts that count")
    overview = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for position in POSITIONS:
        layer = best_layer(validation, position, model)
        for adapter in tqdm(CHANGES, desc=f"{name}, {position}"):
            for label in methods if position == "words" else methods[:1]:
                method = METHODS[label]
                found = [test[adapter, position].study(method, layer, seed, model) for seed in range(seeds)]
                gains = {score: [compare(one.recovery, score) for one in found] for score in GOAL}
                overview.append(
                    f"| {position}, {layer} | {adapter} | {label} | "
                    + " | ".join(cell(gains[score]) for score in GOAL)
                    + f" | {gains['cosine'][0].concepts} |"
                )
                if position == "words" and label == next(iter(METHODS)):
                    yield f"\n**{name}, {adapter}** (block {layer}, {label}, means over {seeds} seeds)\n"
                    yield from form_table(found)
    yield f"\n**{name}: gain of the shift per concept over one global shift**\n"
    yield from overview


def form_table(found: Sequence[ShiftStudy]) -> Iterator[str]:
    """Forms by scores, means over concepts with enough rows and over seeds; what the first seed says of concepts."""
    yield "| form | " + " | ".join(SCORES) + " |"
    yield "|---|" + "---|" * len(SCORES)
    for form in FORMS:
        cells = []
        for score in SCORES:
            values = [
                np.nanmean(one.recovery.scores[form][score][counted(one.recovery)])
                for one in found
                if score in one.recovery.scores[form]
            ]
            cells.append(f"{np.mean(values):.3f}" if values else "")
        yield f"| {form} | " + " | ".join(cells) + " |"
    first = found[0]
    of = first.correlations["consistency with gain in cosine"]
    fates = ", ".join(f"{first.fates.count(fate)} {fate}" for fate in ("kept", "specialised", "new"))
    yield (
        f"\nConsistency with gain in cosine: r = {of.pearson:.2f} [{of.low:.2f}, {of.high:.2f}]. Fates: {fates}; "
        f"{len(first.fates.lost)} lost."
    )


def said(model: HookedMM, items: Sequence[Scene], change: Change, intervention: Intervention | None) -> str:
    """How many captions are in the fine-tuned style, and how many are exactly what the fine-tuned model should say."""
    with model.hooks([intervention] if intervention is not None else []):
        texts = captions(model, items, CAPTION_PROMPT)
    style = {change.style} if change.style else set(WORDINGS)
    followed = sum(style_of(text) in style for text in texts) / len(texts)
    right = sum(text in change.right(item) for text, item in zip(texts, items, strict=True)) / len(texts)
    return f"{followed:.2f}, {right:.2f}"


def steering_table(name: str, folder: Path, scenes: int, k: int = 50) -> Iterator[str]:
    """Of one model: what it says when shifts are put into it, beside controls."""
    model, rng = HookedMM.small(name), torch.Generator().manual_seed(0)
    yield f"\n**{name}** (style followed, exactly right, of {scenes} new scenes)\n"
    columns = (
        "nothing",
        "one concept's",
        "random, as long",
        "each its concept's",
        "each another's",
        "the adapter itself",
    )
    yield "| adapter | block | " + " | ".join(columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    selectors = {"last prompt": LastPrompt(), "answer": EachOf(role="answer")}
    for adapter, change in CHANGES.items():
        items = [item for item in (scene("test", n, NEW_SCENES) for n in range(4 * scenes)) if change.touches(item)]
        items = items[:scenes]
        sources = ModelSource(f"small:{name}"), ModelSource(f"small:{name}", adapter=adapter)
        data = ScenesDataModule(800, split="test", seed=1, batch_size=64)
        path = folder / f"{name}-{adapter}-steering"
        pair = extract_pair(*sources, data, HOOKS, selectors, path, answer="generated", texts="tuned")
        ends = [said(model, items, change, None), said(HookedMM.small(name, adapter=adapter), items, change, None)]
        for layer in range(model.cfg.n_layers):
            hook = f"blocks.{layer}.hook_resid_post"
            one = _prompt_vector(*(store.where(selector="last prompt") for store in pair), hook)
            other = normalize(torch.randn(one.shape, generator=rng), dim=0) * one.norm()
            own = _by_concept(*pair, hook, k)
            wrong = ShiftConcepts(hook, own.fitted, own.vectors.roll(1, 0), at=own.at)
            steered = [Add(hook, one, at="last_prompt"), Add(hook, other, at="last_prompt"), own, wrong]
            cells = [ends[0], *(said(model, items, change, each) for each in steered), ends[1]]
            yield f"| {adapter} | {layer} | " + " | ".join(cells) + " |"


def _prompt_vector(original: ActivationStore, tuned: ActivationStore, hook: str) -> torch.Tensor:
    """The shift vector of the largest of ten concepts at the last token of the prompt."""
    rows = [store.activations(hook) for store in (original, tuned)]
    placed = Concepts.of(KMeans(10).fit(rows[0]), rows[0])
    shifts = shift_vectors(movements(*rows), placed.main, 10)
    return shifts.vectors[int(shifts.counts.argmax())]


def _by_concept(original: ActivationStore, tuned: ActivationStore, hook: str, k: int) -> ShiftConcepts:
    """The shift of every concept, over the last token of the prompt and all tokens of the answer."""
    rows = [store.activations(hook) for store in (original, tuned)]
    fitted = KMeans(k).fit(rows[0])
    shifts = shift_vectors(movements(*rows), main_concept(fitted.transform(rows[0])), k)
    return ShiftConcepts(hook, fitted, shifts.vectors, at=as_rule("last_prompt") | as_rule("generated"))


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llava", "idefics2", "qwen2_vl", "molmo"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--scenes", type=int, default=100, help="new scenes that steering is scored on")
    parser.add_argument("--only", choices=("recovery", "steering"))
    parser.add_argument("--output", type=Path, help="a page to write; printed unless given")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines: list[Any] = []
    with TemporaryDirectory() as folder:
        for part in ("recovery", "steering") if options.only is None else (options.only,):
            lines.append(f"\n## {part.capitalize()}")
            for name in options.models:
                made = (
                    recovery_tables(name, Path(folder), options.seeds, options.methods)
                    if part == "recovery"
                    else steering_table(name, Path(folder), options.scenes)
                )
                for line in made:
                    lines.append(line)
                    print(line, flush=True)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "scikit-learn"))
    if options.output is not None:
        head = f"# Shifts of the small models\n\n`python -m benchmarks.shift_study`, {date.today()}, CPU, {versions}.\n"
        options.output.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
