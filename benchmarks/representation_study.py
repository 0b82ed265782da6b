"""The geometry of the small models' representations, layer by layer, trained beside random weights.

    python -m benchmarks.representation_study --picture docs/representations.png --output tables.md

Every position of scenes with their given captions, at every layer, image and text rows apart; the analyses are those of
`hooked-mm analyse`, with their bootstrap bands over scenes. The random weights are those of the same architecture as it
is before training. A layer is told apart where the bands of trained and random weights have no number in common.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from analyses.analyse_command import main as analyse
from analyses.curves import draw_curves
from analyses.layers import STREAM
from analyses.result import RESULT, Result, curves_of, touching
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.selectors import EachOf
from hooked_mm.store import ActivationStore

WEIGHTS = {"trained": None, "random weights": 0}
ANALYSES = ("linearity", "anisotropy", "intrinsic-dimension", "contextualization")
SHOWN = (
    "linearity",
    "main contribution, held out",
    "anisotropy",
    "TwoNN dimension",
    "self-similarity",
    "intra-sentence similarity",
)
"""The scores that are drawn and listed; the work folder has all."""
MODALITIES = ("image", "text")


def store_of(model: str, seed: int | None, size: int, folder: Path) -> ActivationStore:
    """Every position of so many scenes at every layer; read again if it is there."""
    if (folder / "manifest.json").is_file():
        return ActivationStore.open(folder)
    source = ModelSource(f"small:{model}", dtype="float32", random_weights=seed)
    data = ScenesDataModule(size=size, split="test", batch_size=32)
    return extract(Extractor(source, list(STREAM), EachOf(tokens=True), answer="given"), data, folder)


def results_of(model: str, weights: str, size: int, work: Path, draws: int) -> dict[str, Result]:
    """All analyses of one model and its weights, by name."""
    folder = work / model / weights.split()[0]
    store = store_of(model, WEIGHTS[weights], size, folder / "store")
    found = {}
    for name in ANALYSES:
        out = folder / name
        if not (out / RESULT).is_file():
            options = {"store": store.path, "output": out, "name": weights, "draws": draws}
            analyse([name, *(f"--{key}={value}" for key, value in options.items())])
        found[name] = Result.load(out)
    return found


def told_apart(trained: Result, random: Result, score: str, modality: str) -> tuple[int, int]:
    """In how many layers the bands of a score do not touch, and how many layers have one for both."""
    pairs = zip(trained.of(score, modality), random.of(score, modality), strict=True)
    known = [touching(a, b) for a, b in pairs]
    return known.count(False), len(known)


def table(results: dict[str, dict[str, dict[str, Result]]]) -> Iterator[str]:
    """Lines of Markdown: per score, model and modality the trained model's values, the random one's, and the layers."""
    yield "| score | model | rows | trained, first to last layer | random weights | layers told apart |"
    yield "|---|---|---|---|---|---|"
    for score in SHOWN:
        for model, by in results.items():
            (name,) = (name for name in ANALYSES if score in by["trained"][name].kinds())
            trained, random = (by[weights][name] for weights in WEIGHTS)
            for modality in MODALITIES:
                apart, count = told_apart(trained, random, score, modality)
                cells = " | ".join(
                    ", ".join(f"{one.value:.3g}" for one in result.of(score, modality)) for result in (trained, random)
                )
                yield f"| {score} | {model} | {modality} | {cells} | {apart} of {count} |"


def picture(results: dict[str, dict[str, dict[str, Result]]]) -> Figure:
    """A row per score, a column per model."""
    figure = Figure(figsize=(3.1 * len(results), 2.1 * len(SHOWN)), layout="constrained")
    grid = figure.subplots(len(SHOWN), len(results), squeeze=False)
    handles = {}
    for column, (model, by) in enumerate(results.items()):
        for row, score in enumerate(SHOWN):
            axes = grid[row, column]
            curves = [
                curve
                for weights in WEIGHTS
                for result in by[weights].values()
                for curve in curves_of([result], score)
                if curve.modality in MODALITIES
            ]
            handles |= {handle.get_label(): handle for handle in draw_curves(axes, curves)}
            if score.endswith("dimension"):
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.set_title(f"{model}: {score}" if not row else score, fontsize=9, loc="left")
            if row == len(SHOWN) - 1:
                axes.set_xlabel("layer")
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, or go on with what lies in the work folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llava", "idefics2", "qwen2_vl", "molmo"])
    parser.add_argument("--size", type=int, default=100, help="scenes")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--work", type=Path, default=Path("runs/representation_study"))
    parser.add_argument("--picture", type=Path, help="where the curves go")
    parser.add_argument("--output", type=Path, help="a Markdown file to write; printed unless given")
    options = parser.parse_args(argv)
    results = {
        model: {w: results_of(model, w, options.size, options.work, options.draws) for w in WEIGHTS}
        for model in options.models
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    head = (
        f"{date.today()}, {versions}; {options.size} scenes of the split `test`, captions given, {options.draws} draws."
    )
    text = "\n".join([head, "", *table(results)]) + "\n"
    if options.picture is not None:
        picture(results).savefig(options.picture, dpi=80)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
