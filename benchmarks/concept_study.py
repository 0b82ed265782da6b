"""Which decomposition finds what the small models know: every method, scored against the scenes' truth.

    python -m benchmarks.concept_study --models llava idefics2 qwen2_vl --output docs/concept_study.md

Per model, captions in the style `full` (attributes follow the noun) are given; rows are taken after every layer, at
four positions. Each method's settings (position, layer, and all that it has itself) are chosen by the AUROC of facts on
scenes of the split `validation`, at one number of concepts, one setting at a time; then it is fitted with five seeds
for every number of concepts, and scored on scenes of `test` that had no part in any choice. Which concept stands for a
fact, and the thresholds of F1, are chosen on the scenes that it was fitted to. A sample's activation is the largest of
its rows'.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import METHODS, ConceptDictionary
from concept_dict.evaluation import evaluate
from concept_dict.evidence import Evidence, Samples
from concept_dict.grounding import top_words
from concept_dict.metrics import auroc, by_attribute, fact_table, match_concepts, poles, pool_samples
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.scenes.world import all_facts
from hooked_mm.selectors import LastPrompt, MeanOver, TokenOfInterest
from hooked_mm.store import ActivationStore

WORDS = tuple(word for name in DESCRIBED for word in WORD_CLASSES[name])
POSITIONS = {
    "image mean": MeanOver(modality="image"),
    "last prompt": LastPrompt(),
    "answer mean": MeanOver(role="answer"),
    "predicts": TokenOfInterest(WORDS, where="predicts"),
}
"""Where rows are taken; `predicts`: each position from which an attribute word of the caption is predicted."""

OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SemiNMF": {"whiten": (0.0, 0.5, 1.0), "center": (True, False), "init": ("kmeans", "svd")},
    "NonNegativeDictionary": {
        "alpha": (0.01, 0.001, 0.003, 0.03, 0.1),
        "whiten": (0.0, 0.5, 1.0),
        "center": (True, False),
        "init": ("kmeans", "svd"),
    },
    "KMeans": {
        "activation": ("cosine", "one_hot", "inverse_distance"),
        "whiten": (0.0, 0.5, 1.0),
        "center": (True, False),
    },
    "PCA": {"center": (True, False)},
    "TopNorm": {"whiten": (0.0, 0.5, 1.0), "center": (True, False)},
    "TopKSAE": {"active": (8, 2, 4, 16), "whiten": (0.0, 0.5, 1.0), "center": (True, False)},
}
"""What each method may choose; it begins with the first of each."""

FIXED: dict[str, dict[str, Any]] = {"NonNegativeDictionary": {"tol": 1e-4, "max_iter": 100}}
"""What is not chosen: with the usual `tol` the objective ends 1 to 3 % lower, and AUROC goes either way."""

FACTS = [fact for fact in all_facts() if not fact.startswith("count=")]
"""Captions do not count."""
GOAL = ("colour", "size", "position", "place")
SIZES = {"train": 1000, "validation": 400, "test": 500}
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
COLUMNS = {
    "facts": "facts/auroc",
    "random": "facts/auroc_random",
    "shuffled": "facts/auroc_shuffled",
    "concepts": "concepts/auroc",
    "F1": "f1/f1",
    "F1 shuffled": "f1/f1_shuffled",
    "named": "naming/share",
    "error": "reconstruction/relative_error",
    "active": "reconstruction/sparsity",
    "overlap of words": "overlap_words/words",
    "of samples": "overlap_samples/samples",
    "stability": "stability/cosine",
}
"""Columns of the table, and the scores of `evaluate` in them."""


@dataclass(frozen=True)
class Setting:
    """Where rows are taken, and the method's own options."""

    position: str
    layer: int
    options: Mapping[str, Any]

    def __str__(self) -> str:
        own = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.position}, layer {self.layer}" + (f", {own}" if own else "")


class Scenes:
    """The rows of one model at all positions and layers, per split."""

    def __init__(self, model: HookedMM, folder: Path, seed: int) -> None:
        extractor = Extractor(model, "blocks.*.hook_resid_post", POSITIONS, answer="given")
        self.model, self.layers = model, model.cfg.n_layers
        self.stores: dict[str, ActivationStore] = {}
        for split, size in SIZES.items():
            data = ScenesDataModule(size, "caption", split, seed, "full", batch_size=64)  # type: ignore[arg-type]
            self.stores[split] = extract(extractor, data, folder / split)

    def samples(self, split: str, setting: Setting) -> Samples:
        """Rows with the facts that captions say."""
        part = self.stores[split].where(selector=setting.position)
        found = Samples.of(part, hook(setting))
        facts = [[fact for fact in own if fact in FACTS] for own in found.facts or ()]
        return replace(found, facts=facts, captions=None, images=None)

    def words(self, split: str, position: str) -> list[str | None]:
        """Per row the word that is predicted there; None at other positions."""
        return self.stores[split].where(selector=position).rows.column("word").to_pylist()


def hook(setting: Setting) -> str:
    """The residual stream behind the layer."""
    return f"blocks.{setting.layer}.hook_resid_post"


def pooled(transform: Callable[[torch.Tensor], torch.Tensor], samples: Samples) -> np.ndarray:
    """Per sample and concept the largest activation; both ends of signed ones."""
    active = transform(samples.rows)
    return pool_samples(poles(active) if bool((active < 0).any()) else active, samples.sample, samples.count)


def truth(samples: Samples) -> np.ndarray:
    """Which facts hold for which sample."""
    return fact_table(samples.facts or (), FACTS)


def score(fitted: Decomposition, train: Samples, held_out: Samples) -> dict[str, float]:
    """Mean AUROC per attribute of facts by the concept that is best for each on the training scenes."""
    sides = [value for part in (train, held_out) for value in (pooled(fitted.transform, part), truth(part))]
    return by_attribute(FACTS, match_concepts(*sides, shuffles=1).held_out)


def fit(method: str, k: int, seed: int, options: Mapping[str, Any], rows: torch.Tensor) -> Decomposition:
    """A method fitted; the seed counts where it has one."""
    made = METHODS[method](k, **FIXED.get(method, {}), **options)
    return (made.set_params(random_state=seed) if "random_state" in made.get_params() else made).fit(rows)


Tried = list[tuple[Setting, float]]


def choose(method: str, scenes: Scenes, k: int) -> tuple[Setting, Tried]:
    """The best setting on the validation scenes, one choice at a time, and all that were tried."""
    tried: Tried = []

    def best(settings: Sequence[Setting]) -> Setting:
        known = {str(setting): value for setting, value in tried}
        for setting in settings:
            if str(setting) not in known:
                train, held_out = (scenes.samples(split, setting) for split in ("train", "validation"))
                found = score(fit(method, k, 0, setting.options, train.rows), train, held_out)
                known[str(setting)] = float(np.mean([found[name] for name in GOAL]))
                tried.append((setting, known[str(setting)]))
        return max(settings, key=lambda setting: known[str(setting)])

    begin = {name: values[0] for name, values in OPTIONS[method].items()}
    # Whitening is tried everywhere: it matters most where rows are means.
    powers = [{"whiten": power} for power in (0.0, 0.5)] if "whiten" in begin else [{}]
    everywhere = product(POSITIONS, range(scenes.layers), powers)
    chosen = best([Setting(at, layer, {**begin, **power}) for at, layer, power in everywhere])
    for name, values in OPTIONS[method].items():
        chosen = best([replace(chosen, options={**chosen.options, name: value}) for value in values])
    return best([replace(chosen, layer=layer) for layer in range(scenes.layers)]), tried


def ceiling(scenes: Scenes, position: str) -> dict[str, float]:
    """Test AUROC per attribute of linear probes in the place of concepts, layer and penalty chosen on validation.

    A probe is a ridge regression per fact on standardised rows; at `predicts`, on which word each row predicts. Like
    concepts, probes give a sample their largest value over its rows.
    """
    values = [fact.partition("=")[2] for fact in FACTS]
    tried: list[tuple[float, dict[str, float]]] = []
    for layer in range(scenes.layers):
        train, validation, test = (scenes.samples(split, Setting(position, layer, {})) for split in SIZES)
        said = scenes.words("train", position)
        named = [[word == value for value in values] for word in said]
        target = truth(train)[train.sample] if said[0] is None else np.array(named)
        scaler = StandardScaler().fit(train.rows.numpy())
        inputs = scaler.transform(train.rows.numpy())
        for penalty in PENALTIES:
            probe = Ridge(alpha=penalty).fit(inputs, np.where(target, 1, -1).astype(np.float32))

            def read(part: Samples, probe: Ridge = probe, scaler: StandardScaler = scaler) -> np.ndarray:
                found = torch.as_tensor(probe.predict(scaler.transform(part.rows.numpy())))
                return auroc(pool_samples(found, part.sample, part.count), truth(part)).diagonal()

            means = by_attribute(FACTS, read(validation))
            tried.append((float(np.mean([means[name] for name in GOAL])), by_attribute(FACTS, read(test))))
    return max(tried, key=lambda found: found[0])[1]


def measure(method: str, k: int, setting: Setting, scenes: Scenes, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Per score, its value on the test scenes for each seed."""
    train, held_out = (scenes.samples(split, setting) for split in ("train", "test"))
    fits = [fit(method, k, seed, setting.options, train.rows) for seed in seeds]
    found: dict[str, list[float]] = {}
    for fitted in fits:
        dictionary = ConceptDictionary(fitted, hook(setting))
        words = top_words(scenes.model, dictionary.concepts, 5)
        words += top_words(scenes.model, -dictionary.concepts, 5) if dictionary.signed else []
        runs = [run.components_ for run in fits] if len({id(run) for run in fits}) > 1 else None
        evidence = Evidence(
            held_out, fitted=train, words=[[word.text for word in own] for own in words], runs=runs, vocabulary=WORDS
        )
        for name, value in evaluate(dictionary, evidence).items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(float(value))
        if getattr(fitted, "activation", "one_hot") != "one_hot":
            # Cosines and distances do not add up to rows; centres do.
            fitted.set_params(activation="one_hot")
            own = evaluate(ConceptDictionary(fitted, hook(setting)), evidence, ["reconstruction"])
            found["reconstruction/relative_error"][-1] = float(own["reconstruction/relative_error"])
    return found


def cell(values: Sequence[float]) -> str:
    """Mean over seeds, with half the range where they differ."""
    middle, half = float(np.mean(values)), (max(values) - min(values)) / 2
    return f"{middle:.3f}" + (f" ±{half:.3f}" if half > 5e-4 else "")


def study(name: str, ks: Sequence[int], seeds: Sequence[int], chosen_at: int) -> Iterator[str]:
    """The section of one model, line by line."""
    with TemporaryDirectory() as folder:
        scenes = Scenes(HookedMM.small(name, dtype="float32"), Path(folder), seed=1)
        yield from ["", f"## The small {name}", "", "Chosen on validation:", ""]
        settings, trials = {}, {}
        for method in tqdm(METHODS, desc=f"{name}: settings"):
            settings[method], trials[method] = choose(method, scenes, chosen_at)
            yield f"- {method}: {settings[method]} (validation {max(value for _, value in trials[method]):.3f})"
        yield from ["", "| method | k | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
        parts: dict[tuple[str, int], dict[str, list[float]]] = {}
        for k, method in tqdm(list(product(ks, METHODS)), desc=f"{name}: test"):
            if method == "PCA" and k > scenes.model.cfg.d_model:
                continue
            own = seeds if "random_state" in METHODS[method]().get_params() else seeds[:1]
            found = parts[method, k] = measure(method, k, settings[method], scenes, own)
            row = [cell(found[key]) if key in found else "" for key in COLUMNS.values()]
            yield f"| {method} | {k} | " + " | ".join(row) + " |"
        probes = {position: ceiling(scenes, position) for position in POSITIONS}
        yield from ["", "AUROC of facts by attribute, as a share of the linear probes' at the same position:", ""]
        yield "| method | k | " + " | ".join(probes["predicts"]) + " |"
        yield "|---|---|" + "---|" * len(probes["predicts"])
        for (method, k), found in parts.items():
            ceilings = probes[settings[method].position]
            shares = [
                f"{np.mean(found[f'facts/auroc/{part}']):.3f} ({np.mean(found[f'facts/auroc/{part}']) / top:.3f})"
                for part, top in ceilings.items()
            ]
            yield f"| {method} | {k} | " + " | ".join(shares) + " |"
        for position, ceilings in probes.items():
            yield f"| linear probes, {position} | | " + " | ".join(f"{top:.3f}" for top in ceilings.values()) + " |"
        yield from ["", "The best layer of each position on validation, rows as they are / whitened by half:", ""]
        yield "| method | " + " | ".join(POSITIONS) + " |\n|---|" + "---|" * len(POSITIONS)
        for method, tried in trials.items():
            cells = []
            for position in POSITIONS:
                best: dict[float, float] = {}
                for setting, value in tried:
                    power = setting.options.get("whiten", 0.0)
                    if setting.position == position:
                        best[power] = max(value, best.get(power, 0.0))
                cells.append(" / ".join(f"{best[power]:.3f}" for power in (0.0, 0.5) if power in best))
            yield f"| {method} | " + " | ".join(cells) + " |"


def main() -> None:
    """Write the tables, model by model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llava", "idefics2", "qwen2_vl", "molmo"])
    parser.add_argument("--k", nargs="+", type=int, default=[20, 50, 100])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--chosen_at", type=int, default=50, help="number of concepts at which settings are chosen")
    parser.add_argument("--output", type=Path, help="a Markdown file to append to; printed unless given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = f"{date.today()}, torch {version('torch')}; {options.seeds} seeds, scenes: {SIZES}, {len(FACTS)} facts"
    sections = (study(name, options.k, range(options.seeds), options.chosen_at) for name in options.models)
    for line in chain([head], chain.from_iterable(sections)):
        print(line, flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
