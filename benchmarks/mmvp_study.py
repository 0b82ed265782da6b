"""MMVP's case study: which answers are driven by the picture and which by the text, and whether relevancy tells.

    python -m benchmarks.mmvp_study --folder MMVP --models llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device cuda \\
        --template llava-choice --grade letters --ask 'question and options' --work runs/mmvp_study
    python -m benchmarks.mmvp_study --output tables.md

Every question is asked with its own picture, with that of its pair's other question, with every image token replaced by
the mean over all pictures, and without a picture where the model takes such a prompt. An answer that the other picture
changes is driven by the image, one that nothing changes by the text (`analyses.driven_answers`). Beside that stand the
relevancy and the attention that the picture gets for each that the question gets.

Without a folder, pairs of scenes are written in MMVP's format: two pictures that differ in one attribute, one question,
two answers. The small models are never wrong about clear ones, so three of four pairs are made coarse, both pictures to
as few pixels: what they differ in is less and less to be seen, as for MMVP's pictures to the tower they were chosen by.
Writes `answers.csv` and a gallery per model, and a table of all.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analyses.driven_answers import (
    Driven,
    Measure,
    decisive_targets,
    driven_by,
    log_odds,
    log_ratio,
    resampled,
    shares_of,
    tells_apart,
)
from analyses.gallery import Entry, write_gallery
from analyses.map_overlay import blended
from analyses.mmvp_protocol import (
    Graded,
    Hooks,
    Question,
    option_scores,
    pair_scores,
    questions_of,
    unchanged,
    with_other_pictures,
)
from analyses.picture_maps import on_pixels, picture_maps
from analyses.relevancy import relevancies
from analyses.token_ablation import Fill, ablated_points, data_means, replace_tokens
from hooked_mm.batch import Batch
from hooked_mm.datasets.mmvp import Mmvp
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import bootstrap
from hooked_mm.prepare import load_image
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.pairs import ATTRIBUTES, scene_pair

MEASURES: tuple[Measure, ...] = ("relevancy", "attention")
WAYS = {
    "own": "its own picture",
    "other": "the pair's other picture",
    "mean tokens": "tokens replaced by the mean of all pictures",
    "no picture": "no picture",
}
KINDS: tuple[Driven, ...] = ("image", "text", "unclear")
COARSE = (1, 4, 8, 16)
"""By how much pairs of scenes are shrunk, in turn, before they are drawn as large as they were."""
SHOWN = 6
"""Questions of each kind in the gallery."""


def coarseness(pair: int) -> int:
    """By how much the pictures of a pair of scenes are shrunk: every attribute is asked at every size."""
    return COARSE[(pair - 1) // len(ATTRIBUTES) % len(COARSE)]


def coarse(image: Image.Image, factor: int) -> Image.Image:
    """The picture shrunk by a factor and drawn as large as it was."""
    small = image.resize((max(1, image.width // factor), max(1, image.height // factor)), Image.Resampling.BOX)
    return image if factor == 1 else small.resize(image.size, Image.Resampling.BICUBIC)


def write_scenes(folder: Path, pairs: int, split: str = "test", seed: int = 0) -> Path:
    """Pairs of scenes in MMVP's format, all attributes in turn; the first picture is the first option's or the other's.

    Args:
        folder: Gets `Questions.csv` and `MMVP Images`.
        pairs: How many.
        split: Of the scenes.
        seed: Of the scenes, and of which option comes first.
    """
    (folder / "MMVP Images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["lndex", "Question", "Options", "Correct Answer"])
        for number in range(pairs):
            attribute = list(ATTRIBUTES)[number % len(ATTRIBUTES)]
            pair = scene_pair(split, number, attribute, seed)
            swapped = bool(rng.integers(2))
            words = pair.answers[::-1] if swapped else pair.answers
            for place, scene in enumerate((pair.one, pair.other)):
                index = 2 * number + 1 + place
                letter = "ab"[place ^ swapped]
                table.writerow([index, pair.question, f"(a) {words[0]} (b) {words[1]}", f"({letter})"])
                shown = coarse(picture(scene), coarseness(number + 1))
                shown.save(folder / "MMVP Images" / f"{index}.jpg", quality=100, subsampling=0)
    return folder


@dataclass
class Study:
    """What one model said, in every way of asking, and where it looked.

    Attributes:
        questions: All that could be asked.
        answers: Way of asking -> graded, in the order of the questions.
        ratio: (measure, `own` or `blank`) -> log ratio per question.
        maps: Relevancy of the positions, per question of the gallery.
        notes: What a reader must know.
    """

    questions: list[Question]
    answers: dict[str, list[Graded]]
    ratio: dict[tuple[Measure, str], Tensor]
    notes: list[str]

    def driven(self) -> list[Driven]:
        """What drives each answer."""
        blank = [self.answers[name] for name in ("mean tokens", "no picture") if name in self.answers]
        return [
            driven_by(own.said, other.said, [way[number].said for way in blank])
            for number, (own, other) in enumerate(zip(self.answers["own"], self.answers["other"], strict=True))
        ]

    def swing(self) -> Tensor:
        """|d|, by how much the answer's odds depend on the picture."""
        own, other = (
            torch.tensor([log_odds(one.scores) for one in self.answers[name]], dtype=torch.float64)
            for name in ("own", "other")
        )
        return (own - other).abs()


def in_batches(
    questions: Sequence[Question], options: argparse.Namespace
) -> Iterator[tuple[list[int], list[Question]]]:
    """Questions, some at a time, with their numbers."""
    for start in range(0, len(questions), options.batch_size):
        part = list(questions[start : start + options.batch_size])
        yield list(range(start, start + len(part))), part


def prompts(
    model: HookedMM, questions: Sequence[Question], options: argparse.Namespace, letters: Sequence[str]
) -> Batch:
    """The questions with the answers of these letters."""
    said = [
        f"({letter})" if options.grade == "letters" else question.options[letter]
        for question, letter in zip(questions, letters, strict=True)
    ]
    asked = [question.prompt(options.ask) for question in questions]
    return model.prepare([question.images for question in questions], asked, answers=said)


def blank_hooks(model: HookedMM, questions: Sequence[Question], options: argparse.Namespace) -> Hooks:
    """Every image token becomes the mean over all pictures."""
    batches = (
        prompts(model, part, options, [question.answer for question in part])
        for _, part in in_batches(questions, options)
    )
    fill = Fill("data", data_means(model, batches))
    return lambda samples, batch: replace_tokens(ablated_points(model, batch), None, fill)


def looked(
    model: HookedMM,
    questions: Sequence[Question],
    graded: Sequence[Graded],
    hooks: Hooks,
    options: argparse.Namespace,
    measure: Measure,
) -> Tensor:
    """The log ratio of picture to question for what was said."""
    parts = []
    for numbers, part in in_batches(questions, options):
        said = [graded[number].said or question.answer for number, question in zip(numbers, part, strict=True)]
        others = [next(x for x in question.options if x != one) for question, one in zip(part, said, strict=True)]
        batch, instead = prompts(model, part, options, said), prompts(model, part, options, others)
        with model.hooks(hooks((), batch)):
            parts.append(shares_of(model, batch, decisive_targets(batch, instead), measure))
    return log_ratio(torch.cat(parts))


def studied(model: HookedMM, questions: Sequence[Question], options: argparse.Namespace) -> Study:
    """Ask a model in every way."""
    ask: dict[str, Any] = {"grade": options.grade, "ask": options.ask, "batch_size": options.batch_size}
    own, skipped = option_scores(model, questions, **ask)
    known = {one.question.index for one in own}
    kept = [q for q in questions if {q.index, q.index + 1 if q.index % 2 else q.index - 1} <= known]
    own = [one for one in own if one.question.index in {question.index for question in kept}]
    notes = [f"left out: {reason}" for reason in skipped]
    hooks = blank_hooks(model, kept, options)
    ways: dict[str, tuple[list[Question], Hooks]] = {
        "other": (with_other_pictures(kept), unchanged),
        "mean tokens": (kept, hooks),
        "no picture": ([replace(question, images=None) for question in kept], unchanged),
    }
    answers = {"own": own}
    for name, (asked, under) in ways.items():
        try:
            found, lost = option_scores(model, asked, hooks=under, **ask)
        except (BadInputError, UnsupportedModelError) as error:
            found, lost = [], [str(error)]
        if len(found) == len(kept):
            answers[name] = found
        else:
            notes.append(f"not asked with {name}: {lost[0] if lost else 'no answer'}")
    ratio: dict[tuple[Measure, str], Tensor] = {}
    for measure in MEASURES:
        try:
            ratio[measure, "own"] = looked(model, kept, own, unchanged, options, measure)
            ratio[measure, "blank"] = looked(model, kept, answers["mean tokens"], hooks, options, measure)
        except (BadInputError, UnsupportedModelError) as error:
            notes.append(f"no {measure}: {error}")
    return Study(kept, answers, ratio, notes)


def cell(value: float, low: float, high: float, form: str = ".2f") -> str:
    """A number with its interval."""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if np.isfinite(value) else "-"


def of_kind(study: Study, kind: Driven, values: Tensor, draws: int) -> str:
    """The mean over the answers of a kind with its interval over questions."""
    known = values[torch.tensor([one == kind for one in study.driven()])]
    if bool(known.isnan().all()):
        return "-"
    value, low, high = map(float, bootstrap(known, draws=draws))
    return cell(value, low, high)


def of_scenes(study: Study) -> Iterator[tuple[str, str]]:
    """Of scenes: AUROCs among questions of one kind; what is right and what drives it, at each size of the pictures."""
    driven, graded = study.driven(), study.answers["own"]
    clear = [number for number, kind in enumerate(driven) if kind != "unclear"]
    for (measure, where), ratio in study.ratio.items():
        if where == "own":
            found = []
            for place in range(len(ATTRIBUTES)):
                own = [number for number in clear if (study.questions[number].pair - 1) % len(ATTRIBUTES) == place]
                found.append(tells_apart(ratio[own], torch.tensor([driven[number] == "image" for number in own])))
            known = [f"{name} {value:.2f}" for name, value in zip(ATTRIBUTES, found, strict=True) if value == value]
            yield f"{measure}: the same AUROC by what differs", ", ".join(known) or "-"
    for factor in COARSE:
        own = [number for number, one in enumerate(study.questions) if coarseness(one.pair) == factor]
        if own:
            count = sum(driven[number] == "image" for number in own)
            told = pair_scores([graded[number] for number in own]).told()
            yield f"pictures shrunk by {factor}", f"{told} right; {count} answers driven by image"


def rows_of(study: Study, draws: int) -> Iterator[tuple[str, str]]:
    """What the table says of a model."""
    driven, pair = study.driven(), [question.pair for question in study.questions]
    for name, graded in study.answers.items():
        yield f"right, {WAYS[name]}", pair_scores(graded).told()
    right = torch.tensor([one.right for one in study.answers["own"]]).double()
    for kind in KINDS:
        yield f"driven by {kind}", f"{driven.count(kind)} of {len(driven)}"
    for kind in KINDS:
        yield f"right, where driven by {kind}", of_kind(study, kind, right, draws)
    image = torch.tensor([kind == "image" for kind in driven])
    either = [number for number, kind in enumerate(driven) if kind != "unclear"]
    for measure in MEASURES:
        if (measure, "own") not in study.ratio:
            continue
        own, blank = study.ratio[measure, "own"], study.ratio.get((measure, "blank"))
        for kind in KINDS:
            yield f"{measure}, log ratio, driven by {kind}", of_kind(study, kind, own, draws)
        found = resampled("auroc", own[either], image[either], [pair[number] for number in either], draws)
        yield f"{measure}: AUROC of the ratio, driven by image against by text", cell(*found)
        found = resampled("spearman", own, study.swing(), pair, draws)
        yield f"{measure}: rank correlation of the ratio with the swing", cell(*found)
        if blank is not None:
            both = torch.cat([own, blank])
            truth = torch.cat([torch.ones(len(own)), torch.zeros(len(blank))]).bool()
            found = resampled("auroc", both, truth, [*pair, *pair], draws)
            yield f"{measure}: AUROC of the ratio for a picture against mean tokens", cell(*found)


def write_answers(path: Path, study: Study) -> None:
    """One row per question."""
    names = [f"{measure} {where}" for measure, where in study.ratio]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        head = ["index", "pair", "question", "options", "answer", *study.answers, "driven by", "swing", *names]
        table.writerow(head)
        for number, (question, driven, swing) in enumerate(
            zip(study.questions, study.driven(), study.swing().tolist(), strict=True)
        ):
            said = [graded[number].said or "" for graded in study.answers.values()]
            values = [float(ratio[number]) for ratio in study.ratio.values()]
            fixed = [question.index, question.pair, question.text, question.offered, question.answer]
            table.writerow([*fixed, *said, driven, swing, *values])


def write_pictures(path: Path, model: HookedMM, study: Study, name: str, options: argparse.Namespace) -> None:
    """A gallery of questions of every kind: the picture, where the answer's relevancy lies on it, the other picture."""
    driven, swing = study.driven(), study.swing()
    entries = []
    for kind in KINDS:
        chosen = [number for number, own in enumerate(driven) if own == kind]
        chosen.sort(key=lambda number: float(swing[number]), reverse=kind == "image")
        for number in chosen[:SHOWN]:
            question, said = study.questions[number], study.answers["own"][number].said
            shown = load_image(question.images)  # type: ignore[arg-type]
            pictures = [("its picture", shown)]
            if said is not None and ("relevancy", "own") in study.ratio:
                other = next(letter for letter in question.options if letter != said)
                batch, instead = (prompts(model, [question], options, [letter]) for letter in (said, other))
                found = relevancies(model, batch, decisive_targets(batch, instead))
                values = found.positions[0] if found.keys is None else found.keys[0]
                try:
                    maps = picture_maps(model, batch, 0, values, [shown])
                    pictures.append(("relevancy", blended(shown, on_pixels(maps, 0, shown.size))))
                except BadInputError as error:
                    pictures.append((f"no map: {error.reason}", shown))
            pictures.append(("the pair's other picture", load_image(study.answers["other"][number].question.images)))  # type: ignore[arg-type]
            facts: list[tuple[str, Any]] = [("right", question.answer)]
            facts += [(f"said, {way}", graded[number].said or "-") for way, graded in study.answers.items()]
            facts += [("swing", float(swing[number]))]
            facts += [(f"{m}, log ratio, {where}", float(value[number])) for (m, where), value in study.ratio.items()]
            title = f"{question.index}: driven by {kind}"
            entries.append(Entry(title, facts, pictures, f"{question.text} {question.offered}"))
    write_gallery(path, f"MMVP's case study: {name}", entries, study.notes)


def table(results: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    """Lines of Markdown: a row per score, a column per model."""
    names = list(dict.fromkeys(name for rows in results.values() for name, _ in rows))
    yield f"| | {' | '.join(results)} |"
    yield f"|---|{'---|' * len(results)}"
    for name in names:
        yield f"| {name} | {' | '.join(dict(rows).get(name, '-') for rows in results.values())} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="the benchmark; pairs of scenes in its format unless given")
    parser.add_argument("--pairs", type=int, default=240, help="of scenes")
    parser.add_argument("--models", nargs="+", default=["small:llava", "small:idefics2"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--template", help="what wraps the prompt, as of the data module")
    parser.add_argument("--grade", choices=["letters", "options"], default="options")
    parser.add_argument("--ask", choices=["question and options", "question"], default="question")
    parser.add_argument("--fix_labels", action="store_true")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--draws", type=int, default=300, help="of the bootstrap")
    parser.add_argument("--work", type=Path, default=Path("runs/mmvp_study"))
    parser.add_argument("--output", type=Path, help="a Markdown file to write; printed unless given")
    options = parser.parse_args(argv)
    folder = options.folder or write_scenes(options.work / "scenes", options.pairs)
    questions = questions_of(Mmvp(folder, template=options.template), fix_labels=options.fix_labels)
    results, notes = {}, []
    for name in options.models:
        model = ModelSource(name, dtype=options.dtype).load(torch.device(options.device))
        study = studied(model, questions, options)
        out = options.work / name.replace("/", "_").replace(":", "_")
        out.mkdir(parents=True, exist_ok=True)
        write_answers(out / "answers.csv", study)
        write_pictures(out / "gallery.html", model, study, name, options)
        results[name] = [*rows_of(study, options.draws), *(() if options.folder else of_scenes(study))]
        notes += [f"{name}: {note}" for note in study.notes]
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    what = "MMVP" if options.folder else f"{options.pairs} pairs of scenes in MMVP's format, not MMVP"
    head = f"{date.today()}, {versions}; {what}; graded by {options.grade}, asked the {options.ask}."
    text = "\n".join([head, "", *table(results), "", *(f"- {note}" for note in notes)]).rstrip() + "\n"
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
