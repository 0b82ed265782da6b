"""How faithful attribution methods are on the small models: all methods in one table, beside controls.

    python -m benchmarks.attribution_study --picture docs/attribution.png --output tables.md

Questions about the colour of one object of a scene, whose mask is known, by `hooked-mm analyse faithfulness`; the same
methods on random weights of the same architecture say what of a map comes from the picture and the architecture alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from analyses.attribution_methods import METHODS, attribution
from analyses.faithfulness_command import CONTROLS, MEASURES, cases, drawn
from analyses.faithfulness_command import Found as Judged
from analyses.faithfulness_command import main as faithfulness
from analyses.map_overlay import blended
from analyses.map_pictures import outlined
from analyses.result import RESULT, Result
from hooked_mm.drawing import enlarge, grid, titled
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.pairs import scene_pair

MODELS = ("llava", "idefics2", "qwen2_vl", "molmo")
SIDE = 150


def result_of(model: str, size: int, steps: int, work: Path, *, random: bool = False) -> Result:
    """The command's result for one model; made again unless it is there."""
    out = work / model / ("random" if random else "trained")
    if not (out / RESULT).is_file():
        options = {"model.id": f"small:{model}", "model.dtype": "float32", "size": size, "steps": steps, "output": out}
        if random:
            # What the right answer would be is explained; covering pictures says nothing of such a model.
            options |= {"model.random_weights": 0, "only_right": "false", "steps": 0}
        faithfulness([f"--{name}={value}" for name, value in options.items()])
    return Result.load(out)


def table(results: Mapping[str, tuple[Result, Result]]) -> Iterator[str]:
    """Markdown: a row per method, the best in the mean first; pixel AUROC per model, all else as means over the models.

    Args:
        results: Model -> the result of the trained one, and of random weights.
    """
    by = {model: tuple({one.score: one for one in made.scores} for made in pair) for model, pair in results.items()}
    first = next(iter(by.values()))[0]
    names = [name.removeprefix("pixel AUROC, ") for name in first if name.startswith("pixel AUROC, ")]

    def mean(measure: str, name: str, which: int = 0) -> float:
        found = [pair[which].get(f"{measure}, {name}") for pair in by.values()]
        values = [one.value for one in found if one is not None]
        return sum(values) / len(values) if values else float("nan")

    rest = [measure for measure in MEASURES if measure != "pixel AUROC"]
    yield f"| | {' | '.join(f'AUROC, {model}' for model in by)} | {' | '.join(rest)} | AUROC, random weights |"
    yield f"|---|{'---|' * (len(by) + len(rest) + 1)}"
    for name in sorted(names, key=lambda name: -mean("pixel AUROC", name)):
        own = [pair[0].get(f"pixel AUROC, {name}") for pair in by.values()]
        cells = ["" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in own]
        cells += [f"{mean(measure, name):.3f}" for measure in rest]
        cells.append("" if name in CONTROLS else f"{mean('pixel AUROC', name, 1):.3f}")
        yield f"| {f'*{name}*' if name in CONTROLS else name} | {' | '.join(cells)} |"


def sheet(models: Sequence[str], methods: Sequence[str], numbers: Sequence[int]) -> Image.Image:
    """Rows: models; columns: the picture with the asked object outlined, and every method's map, for some questions."""
    rows: list[Image.Image] = []
    for name in models:
        model = ModelSource(f"small:{name}", dtype="float32").load("cpu")
        for number in numbers:
            ((asked, one),) = cases(model, [scene_pair("test", number, "colour")], 1, Judged(), only_right=False)
            item = asked[0]
            rows.append(titled(outlined(item.image, item.mask, SIDE), f"{name}: {item.title}", SIDE))
            for method in methods:
                (pixels,) = drawn(attribution(method, one), asked)
                rows.append(titled(enlarge(blended(item.image, pixels), SIDE), method, SIDE))
    return grid(rows, len(methods) + 1, side=SIDE + 26, gap=4)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, or go on with what lies in the work folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--size", type=int, default=100, help="questions")
    parser.add_argument("--steps", type=int, default=10, help="of deletion and insertion")
    parser.add_argument("--work", type=Path, default=Path("runs/attribution_study"))
    parser.add_argument("--picture", type=Path, help="where the sheet of maps goes")
    parser.add_argument("--output", type=Path, help="a Markdown file to write; printed unless given")
    options = parser.parse_args(argv)
    head = f"{date.today()}, " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [f"{head}; {options.size} questions of the split `test`, {options.steps} steps."]
    results = {
        model: (
            result_of(model, options.size, options.steps, options.work),
            result_of(model, options.size, options.steps, options.work, random=True),
        )
        for model in options.models
    }
    lines += ["", *table(results), ""]
    lines += [f"{model}: {note}." for model, (trained, _) in results.items() for note in trained.notes]
    text = "\n".join(lines) + "\n"
    if options.picture is not None:
        shown = [name for name in METHODS if "signed" not in name and "last" not in name]
        sheet(options.models, shown, [2]).save(options.picture, optimize=True)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
