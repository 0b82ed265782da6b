"""Caption steering: a style under a prompt that asks for none, with what it costs.

    python -m benchmarks.steering_captions --models llava idefics2 qwen2_vl --output docs/steering_captions.md
    python -m benchmarks.steering_captions --coco data/coco --vqav2 data/vqav2 --models llava-hf/llava-1.5-7b-hf

The default prompt is answered with captions of everything; they shall tell the place only, or the colours only.
Vectors: the difference between the last prompt positions of prompts that ask for the style and of the default prompt,
over the same pictures (`coarse`; from a k-means concept of these to one of those, `fine`), and, on scenes, from the
fine-tuned sibling that captions so by itself, a vector for every concept (`moves`). A gate opens for prompts that ask
for a caption. Damage: what accuracy on questions loses. Also: captions that are exactly right in the style (on
scenes), caption scores, and counts of style words.

COCO takes the official annotations, train2017 and val2017 (`--coco`); the damage is seen in VQA v2 (`--vqav2`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.steering_data import Pictures, coco_pictures, scene_pictures
from benchmarks.steering_vqa import percent, with_controls
from concept_dict.kmeans import KMeans
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.pair_extraction import extract_pair
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.selectors import EachOf, LastPrompt
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.store import ActivationStore
from steering.caption_scores import caption_scores
from steering.concept_moves import ConceptMoves
from steering.controls import is_control
from steering.gate import learn_gate
from steering.setting import Setting
from steering.steered_answers import Answers
from steering.style_counts import style_counts
from steering.sweep_report import write_html
from steering.sweep_result import SweepResult
from steering.sweep_tables import controls_of, front_table
from steering.sweeping import sweep
from steering.tasks import StyleTask
from steering.vectors_of_store import Recipe, vectors_of_store

SHAPES_AND_SIZES = ("circle", "square", "triangle", "star", "cross", "ring", "big", "small")
TASKS = {
    "place": StyleTask(wanted="places", unwanted=("colours", SHAPES_AND_SIZES)),
    "colours": StyleTask(wanted="colours", unwanted=("places", SHAPES_AND_SIZES)),
}
"""By the style's name, which is that of the prompt that asks for it and of the fine-tuned sibling."""
ALPHAS = (1.0, 1.5, 2.0)
MOVE_ALPHAS = (1.0,)
TOKENS = 48
CONCEPTS = 50
SIZES = {"train": (400, 400), "validation": (40, 80), "test": (100, 1000)}
"""Captions and questions of each split of the scenes."""


def prompted(model: HookedMM, pictures: Pictures, hooks: Sequence[str], folder: Path) -> ActivationStore:
    """The last prompt position of the same pictures under prompts that ask for styles, for none, and of questions."""
    if (folder / "manifest.json").exists():
        return ActivationStore.open(folder)
    asked = [(style, text, sample) for style, text in pictures.prompts.items() for sample in pictures.train]
    samples = [_named(sample, style, text) for style, text, sample in asked]
    samples += [_named(sample, "question", sample.text) for sample in pictures.questions]
    return extract(Extractor(model, list(hooks), LastPrompt(), "none"), SampleDataModule(samples, 64), folder)


def _named(sample: Sample, style: str, text: str) -> Sample:
    return Sample(f"{style}-{sample.id}", sample.images, text, None, {"style": style, "picture": sample.id})


def moves(name: str, style: str, hooks: Sequence[str], folder: Path) -> list[ConceptMoves]:
    """Per layer, the shift of every concept from the model to its sibling that captions in the style: over the last
    token of the prompt and all tokens of what the sibling says."""
    data = ScenesDataModule(SIZES["train"][0], "caption", "train", 45, batch_size=64)
    sources = ModelSource(f"small:{name}"), ModelSource(f"small:{name}", adapter=style)
    selectors = {"last prompt": LastPrompt(), "answer": EachOf(role="answer")}
    pair = extract_pair(
        *sources, data, list(hooks), selectors, folder, answer="generated", texts="tuned", resume=folder.exists()
    )
    found = []
    for hook in hooks:
        own, sibling = (store.activations(hook).float() for store in pair)
        fitted = KMeans(CONCEPTS, random_state=0).fit(own)
        found.append(ConceptMoves.of_pairs(own, sibling, fitted, hook, f"shift to {style}"))
    return found


def settings_of(
    store: ActivationStore, style: str, hooks: Sequence[str], shifts: Sequence[ConceptMoves]
) -> tuple[list[SteeringVector], list[Setting]]:
    """Vectors with their controls, and what is tried of them."""
    sets: dict[str, Any] = {"source": {"style": "any"}, "target": {"style": style}}
    vectors = vectors_of_store(store, hooks, ["coarse"], **sets, recipe=Recipe(controls=(0, 1)))
    fine = vectors_of_store(store, hooks, ["fine"], **sets, recipe=Recipe(k=2, controls=(0,)))
    # The pair of the largest clusters of each layer.
    best: dict[str, SteeringVector] = {}
    for vector in (one for one in fine if not is_control(one)):
        rows = sum(vector.made_from["pair_rows"])
        if vector.hook not in best or rows > sum(best[vector.hook].made_from["pair_rows"]):
            best[vector.hook] = vector
    vectors += with_controls(fine, list(best.values()))
    settings: list[Setting] = []
    captions, others = (store.where(style=what) for what in ("any", "question"))
    for hook in hooks:
        gate = learn_gate(captions.activations(hook), others.activations(hook), hook, "gated")
        own = [vector for vector in vectors if vector.hook == hook and not is_control(vector)]
        settings += [Setting(vector, alpha, gate=g) for vector in own for g in (None, gate) for alpha in ALPHAS]
        own_moves = [one for one in shifts if one.hook == hook]
        settings += [Setting(one, alpha, gate=g) for one in own_moves for g in (None, gate) for alpha in MOVE_ALPHAS]
    return vectors, settings


@dataclass(frozen=True)
class Style:
    """How captions of one setting are: exactly right in the style, scores, words."""

    setting: str
    exact: float
    scores: dict[str, float]
    counts: dict[str, float]


def told(said: Answers, result: SweepResult) -> list[Style]:
    """Of the unsteered model and the best of each kind."""
    captions = [place for place, sample in enumerate(said.samples) if sample["question_type"] == "caption"]
    references = [said.samples[place]["references"] for place in captions]
    found = []
    for place, row in enumerate(result.of("test")):
        if row["setting"] and not row.get("best_of"):
            continue
        texts = [said.texts[place][number] for number in captions]
        exact = sum(text in right for text, right in zip(texts, references, strict=True)) / len(texts)
        counts = {name: count.captions / count.of for name, count in style_counts(texts).items()}
        found.append(Style(row.get("best_of") or "unsteered", exact, caption_scores(texts, references), counts))
    return found


def run(model: HookedMM, name: str, style: str, pictures: Pictures, folder: Path) -> tuple[SweepResult, Answers]:
    """One case."""
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers - 2)]
    store = prompted(model, pictures, hooks, folder.parent / "rows")
    shifts = moves(name, style, hooks, folder.parent / f"shift-{style}") if pictures.siblings else []
    vectors, settings = settings_of(store, style, hooks, shifts)
    options = {"max_new_tokens": TOKENS, "side_effects": True}
    facts = [("model", name), ("prompt", pictures.prompts["any"]), ("vectors from", pictures.prompts[style])]
    data = {"validation": pictures.validation[style], "test": pictures.test[style]}
    same: dict[str, Any] = {"settings": settings, "resume": True, "options": options, "facts": facts, "seeds": 1}
    result = sweep(model, vectors, TASKS[style], folder=folder, **data, **same)
    result.save(folder)
    write_html(result, folder / "report.html")
    return result, Answers.of(ActivationStore.open(folder / "test"))


def section(name: str, style: str, result: SweepResult, styles: Sequence[Style]) -> str:
    """One case as a page shows it."""
    rows = result.of("test")
    test = {row.get("best_of") or "unsteered": row for row in rows if row["best_of"] or not row["setting"]}
    lines = [
        f"## {name}: {style} only",
        "",
        f"{test['unsteered']['n_effect']} captions, {test['unsteered']['n_damage']} questions; unsteered accuracy on "
        f"these {percent(test['unsteered'], 'accuracy')} %.",
        "",
        "| vector | layer | alpha | in style % | exactly right % | damage % | goal | words % | CIDEr | BLEU-4 "
        "| ROUGE-L | controls % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in styles:
        row = test[one.setting]
        mark = "**" if row["chosen"] else ""
        cells = [
            f"{mark}{one.setting}{mark}",
            "–" if row["layer"] is None else str(row["layer"]),
            f"{row['alpha']:g}",
            percent(row, "effect", True),
            f"{100 * one.exact:.1f}",
            percent(row, "damage", True),
            "met" if row["goal_met"] else "not met",
            ", ".join(f"{100 * one.counts[kind]:.0f}" for kind in ("place", "colour", "sentiment")),
            *(f"{one.scores[score]:.2f}" for score in ("CIDEr", "BLEU-4", "ROUGE-L")),
            controls(row, rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    front = ["<details><summary>The whole front</summary>", "", "```", front_table(result, "test"), "```", ""]
    return "\n".join([*lines, "", *front, "</details>"])


def controls(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The effect of a setting's controls, random and shuffled."""
    shown = []
    for kind in ("random", "shuffled"):
        found = [100 * r["effect"] for r in controls_of(row, rows) if r["control"] == kind] if row["setting"] else []
        shown.append(f"{sum(found) / len(found):.1f}" if found else "–")
    return ", ".join(shown)


READING = """For every case the unsteered model and, of each kind of vector alone and gated, the best setting as
validation chose it, on test pictures. *in style*: captions with words of the style and none of others.
*exactly right*: the caption of the style, word for word. *damage*: how much accuracy on questions falls.
*words*: captions with words of places, colours and sentiments. CIDEr, BLEU-4 and ROUGE-L are against the
right caption of the style (on COCO, its own). *controls*: in style with random vectors of the same norm,
and with those of shuffled labels (of a vector for every concept: with the vectors dealt to other
concepts). 95 % intervals by bootstrap over samples. Goal: in style at least 90 %, damage at most 2 %."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["llava", "idefics2", "qwen2_vl", "molmo"])
    add("--styles", nargs="+", default=list(TASKS))
    add("--coco", type=Path, help="folder of COCO as downloaded; scenes unless given")
    add("--vqav2", type=Path, help="folder of VQA v2 as downloaded, for questions about COCO")
    add("--samples", type=int, default=1000, help="of COCO, captions and questions each, in each part")
    add("--dtype", default="auto")
    add("--device", default="cpu")
    add("--work", type=Path, default=Path("runs/steering_captions"), help="goes on with what lies there")
    add("--output", type=Path, help="a page in Markdown")
    options = parser.parse_args(argv)
    if (options.coco is None) != (options.vqav2 is None):
        parser.error("--coco and --vqav2 belong together: captions to steer, and questions to see what that costs")
    scenes = options.coco is None
    pictures = scene_pictures(SIZES) if scenes else coco_pictures(options.coco, options.vqav2, options.samples)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "nnsight"))
    made = f"Made by `python -m benchmarks.steering_captions` on {date.today()}, {versions}, on {options.device}."
    pages = [f"# Caption steering on {'scenes whose truth is known' if scenes else 'COCO'}", made, READING]
    for full in options.models:
        name = Path(full).name
        model = ModelSource(f"small:{full}" if scenes else full, options.dtype).load(options.device)
        for style in options.styles:
            result, said = run(model, name, style, pictures, options.work / name / style)
            pages.append(section(name, style, result, told(said, result)))
            print(pages[-1], flush=True)
            if options.output:
                options.output.write_text("\n\n".join(pages) + "\n")


if __name__ == "__main__":
    main()
