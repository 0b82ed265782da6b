"""Answer steering: one answer into another, with what it costs.

    python -m benchmarks.steering_vqa --models llava idefics2 qwen2_vl --output docs/steering_vqa.md
    python -m benchmarks.steering_vqa --vqav2 data/vqav2 --models llava-hf/llava-1.5-7b-hf --dtype bfloat16

On scenes: vectors and gates come from questions of the split `train`, settings are chosen on `validation`, figures are
of `test`. Layers are at most the third from last. Vectors: the difference of means (coarse), a logistic regression's
direction (probe), and differences of k-means concepts (fine) of which each layer's best by `pair_ranking` is kept. A
gate opens where a probe of the last prompt position, or a concept of k-means there, says that the source is about to be
answered.

VQA v2 (`--vqav2`: a folder with the official questions, annotations, train2014 and val2014): vectors and choice on
pictures of train2014, figures on val2014, with the paper's table beside them (2501.03012v2, LLaVA-1.5).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any

import torch

from benchmarks.steering_data import Chosen, vqav2_parts
from concept_dict.kmeans import KMeans
from hooked_mm.data import SampleDataModule
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.reader import ModelSource
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule
from hooked_mm.selectors import LastPrompt
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.store import ActivationStore
from steering.answer_counts import plain, transitions
from steering.controls import is_control
from steering.gate import Gate, learn_concept_gate, learn_gate
from steering.pair_ranking import rank_pairs
from steering.setting import Setting
from steering.steered_answers import Answers, answer
from steering.sweep_report import write_html
from steering.sweep_result import SweepResult
from steering.sweep_tables import controls_of, front_table
from steering.sweeping import sweep
from steering.tasks import AnswerTask
from steering.vectors_of_store import Recipe, vectors_of_store
from steering.vqa_accuracy import VQAAccuracy

ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
AT = ("last_prompt", "last_prompt+generated")
YES_NO = ("is there a shape", "is there a colour", "is there a pair")
SCENES = {
    "red to blue": AnswerTask(source="red", target="blue", types=("colour",)),
    "yes to no": AnswerTask(source="yes", target="no", types=YES_NO),
    "one to three": AnswerTask(source="one", target="three", types=("count",)),
}
VQAV2 = {
    "yes to no": AnswerTask(source="yes", target="no", types=("yes/no",), type_column="answer_type"),
    "1 to 3": AnswerTask(source="1", target="3", types=("number",), type_column="answer_type"),
    "white to black": AnswerTask(source="white", target="black", types=("other",), type_column="answer_type"),
}
PUBLISHED = {
    "none": (90.82, 58.47, 71.10, 0, 0),
    "yes to no": (69.03, 56.82, 68.99, -828, 828),
    "1 to 3": (90.71, 54.52, 71.12, -215, 144),
    "white to black": (90.40, 58.42, 58.36, -98, 441),
}
"""Of 2501.03012v2: accuracy on yes/no, number and other questions; change of source and of target answers."""
TYPES = ("yes/no", "number", "other")
CONCEPTS = 3
"""Of the source's and of the target's answers each, between which fine vectors lead."""
GATE_CONCEPTS = 20


@dataclass(frozen=True)
class Data:
    """What vectors come from, what is chosen by, and what is reported."""

    vectors: SampleDataModule
    validation: SampleDataModule
    test: SampleDataModule


def scenes(task: AnswerTask, sizes: dict[str, tuple[int, int, int, int]]) -> Data:
    """Questions of scenes: per split so many of the source, of the same type, of others, from so many scenes."""
    parts = {
        split: Chosen.of(SceneDataset(count, "questions", split, seed=41), task, *wanted)  # type: ignore[arg-type]
        for split, (count, *wanted) in sizes.items()
    }
    return Data(
        ScenesDataModule(sizes["train"][0], "questions", "train", 41, batch_size=64), parts["validation"], parts["test"]
    )


def extracted(model: HookedMM, data: SampleDataModule, hooks: list[str], folder: Path, tokens: int) -> ActivationStore:
    """Rows of the last prompt position with what the model says, made once."""
    if (folder / "manifest.json").exists() and (found := ActivationStore.open(folder, partial=True)).made_by["hooks"]:
        complete = found.samples.num_rows + found.skipped.num_rows == len(data.ids())
        if complete:
            return ActivationStore.open(folder)
    extractor = Extractor(model, hooks, LastPrompt(), "generated", max_new_tokens=tokens)
    return extract(extractor, data, folder, resume=(folder / "manifest.json").exists())


def fine_vectors(
    model: HookedMM,
    candidates: Sequence[SteeringVector],
    task: AnswerTask,
    data: SampleDataModule,
    folder: Path,
    tokens: int,
) -> list[SteeringVector]:
    """Each layer's best pair of concepts, by how much and how cleanly it moves answers at alpha 2."""
    alphas = (2.0,)
    settings = [Setting(vector, alpha) for vector in candidates for alpha in alphas]
    found = answer(model, data, settings, folder, resume=True, options={"max_new_tokens": tokens})
    same = [place for place, what in enumerate(task.about(found)) if what != "other"]
    texts = [[said[place] for place in same] for said in found.texts]
    after = {number: texts[1 + number] for number in range(len(settings))}
    ranks = {rank.pair: rank.score for rank in rank_pairs(texts[0], after, task.source, task.target)}
    best: dict[str, tuple[float, SteeringVector]] = {}
    for number, setting in enumerate(settings):
        assert setting.vector is not None
        scored = (ranks[number], setting.vector)
        if setting.vector.hook not in best or scored[0] > best[setting.vector.hook][0]:
            best[setting.vector.hook] = scored
    return [vector for _, vector in best.values()]


def with_controls(vectors: Sequence[SteeringVector], chosen: Sequence[SteeringVector]) -> list[SteeringVector]:
    """The chosen ones of these vectors, each with the controls that follow it."""
    found: list[SteeringVector] = []
    wanted = False
    for vector in vectors:
        wanted = any(vector is one for one in chosen) if not is_control(vector) else wanted
        found += [vector] if wanted else []
    return found


def gates_at(store: ActivationStore, hook: str, task: AnswerTask) -> list[Gate]:
    """By a probe and by a concept, of rows before the source is answered against all other rows."""
    table = store.samples.to_pydict()
    place = {sample: number for number, sample in enumerate(table["sample"])}
    numbers = [place[sample] for sample in store.rows.column("sample").to_pylist()]
    says = zip(table["text"], table[task.type_column], strict=True)
    wanted = [kind in task.types and plain(text) == plain(str(task.source)) for text, kind in says]
    inside = torch.tensor([wanted[number] for number in numbers])
    rows = store.activations(hook).float()
    fitted = KMeans(GATE_CONCEPTS, random_state=0).fit(rows)
    return [
        learn_gate(rows[inside], rows[~inside], hook, "gated by a probe"),
        learn_concept_gate(fitted, rows[inside], rows[~inside], hook, "gated by a concept"),
    ]


def run(
    model: HookedMM, name: str, task: AnswerTask, data: Data, folder: Path, tokens: int
) -> tuple[SweepResult, Answers]:
    """One case: vectors, gates, settings, the sweep; the result, and what was said on test."""
    layers = range(model.cfg.n_layers - 2)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    store = extracted(model, data.vectors, hooks, folder.parent / "rows", tokens)
    where = {task.type_column: list(task.types)}
    ends = [plain(str(task.source)), plain(task.target)]
    # As models spell it: "Yes", "yes.".
    spelled = {
        name: [t for t in store.samples.column("text").unique().to_pylist() if plain(t) == name] for name in ends
    }
    sets: dict[str, Any] = {
        "source": {"text": spelled[ends[0]]},
        "target": {"text": spelled[ends[1]]},
        "where": where,
    }
    vectors = vectors_of_store(store, hooks, ["coarse", "probe"], **sets, recipe=Recipe(controls=(0, 1)))
    fine = vectors_of_store(store, hooks, ["fine"], **sets, recipe=Recipe(k=CONCEPTS, controls=(0,)))
    best = fine_vectors(
        model, [vector for vector in fine if not is_control(vector)], task, data.validation, folder / "pairs", tokens
    )
    vectors += with_controls(fine, best)
    settings = [
        Setting(vector, alpha, at, gate=gate)
        for vector in vectors
        if not is_control(vector)
        for gate in ([None, *gates_at(store, vector.hook, task)] if vector.kind == "coarse" else [None])
        for at in AT
        for alpha in ALPHAS
    ]
    facts = [
        ("model", str(model.hf_model.config._name_or_path).rsplit("/", 1)[-1]),
        ("vectors from", f"{len(store)} rows"),
    ]
    options = {"max_new_tokens": tokens, "side_effects": True}
    result = sweep(
        model,
        vectors,
        task,
        data.validation,
        data.test,
        folder,
        settings=settings,
        resume=True,
        options=options,
        facts=facts,
    )
    result.save(folder)
    write_html(result, folder / "report.html")
    return result, Answers.of(ActivationStore.open(folder / "test"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llava", "idefics2", "qwen2_vl", "molmo"])
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--vqav2", type=Path, help="folder of VQA v2 as downloaded; scenes unless given")
    parser.add_argument("--template", help="wraps VQA v2's questions, such as '{text} Answer with one word.'")
    parser.add_argument("--samples", type=int, default=5000, help="of VQA v2, in each part")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/steering_vqa"), help="goes on with what lies there")
    parser.add_argument("--output", type=Path, help="a page in Markdown")
    options = parser.parse_args(argv)
    cases = SCENES if options.vqav2 is None else VQAV2
    pages: list[str] = []
    for name in options.models:
        source = ModelSource(name if options.vqav2 else f"small:{name}", options.dtype)
        model = source.load(options.device)
        for case in options.tasks or cases:
            task = cases[case]
            data = (
                scenes(task, SIZES)
                if options.vqav2 is None
                else Data(*vqav2_parts(options.vqav2, options.samples, options.template))
            )
            folder = options.work / Path(name).name / case.replace(" ", "-")
            result, said = run(model, case, task, data, folder, TOKENS if options.vqav2 is None else 10)
            pages.append(section(Path(name).name, case, result))
            if options.vqav2 is not None:
                pages.append(published(case, task, result, said, "llava-1.5-7b" in name.lower()))
            print(pages[-1], flush=True)
            if options.output:
                options.output.write_text(page(pages, options.vqav2 is None, options.device))


SIZES = {"train": (600, 0, 0, 0), "validation": (800, 100, 60, 240), "test": (2000, 150, 150, 1000)}
TOKENS = 4
"""The longest answer has two words and an end."""


def page(sections: Sequence[str], on_scenes: bool, device: str) -> str:
    """The page as it is kept."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "nnsight"))
    what = "scenes whose truth is known" if on_scenes else "VQA v2"
    made = f"Made by `python -m benchmarks.steering_vqa` on {date.today()}, {versions}, on {device}."
    return "\n\n".join([f"# Answer steering on {what}", made, READING, *sections]) + "\n"


READING = (
    "For every case: the best setting of each kind of vector, as validation chose it, on test samples, with its "
    "controls (mean over random vectors of the same norm, and over vectors of shuffled labels), then the whole Pareto "
    "front. *effect*: share of source answers that become the target. *damage*: how much the accuracy on questions of "
    "other types falls. *other answers of the type*: those that were not the source and changed; and that became the "
    "target. *kept*: share of all samples but the source's whose answer is, to the letter, what it was. 95 % intervals "
    "by bootstrap over samples. Goal: effect at least 90 %, damage at most 2 %."
)


def percent(row: dict[str, Any], name: str, limits: bool = False) -> str:
    """A share as people read it."""
    if row[name] is None or isnan(row[name]):
        return "–"
    text = f"{100 * row[name]:.1f}"
    return f"{text} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]" if limits else text


def section(model: str, case: str, result: SweepResult) -> str:
    """One case: the table of kinds, then the front as the command prints it."""
    test = result.of("test")
    counts = next(row for row in test if row["setting"] == 0)
    lines = [
        f"## {model}: {case}",
        "",
        f"{counts['n_effect']} source answers, {counts['n_damage']} questions of other types; unsteered accuracy on "
        f"these {percent(counts, 'accuracy')} %.",
        "",
        "| vector | layer | at | alpha | effect % | damage % | same type: changed, to target % | kept % | goal | "
        "random: effect, damage % | shuffled: effect, damage % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in test:
        if not row.get("best_of"):
            continue
        shown = []
        for kind in ("random", "shuffled"):
            own = [r for r in controls_of(row, test) if r["control"] == kind]
            shown.append(
                ", ".join(f"{100 * sum(r[n] for r in own) / len(own):.1f}" for n in ("effect", "damage"))
                if own
                else "–"
            )
        mark = "**" if row["chosen"] else ""
        cells = [
            f"{mark}{row['best_of']}{mark}",
            str(row["layer"]),
            row["at"].replace("last_prompt+generated", "all said").replace("last_prompt", "prompt's end"),
            f"{row['alpha']:g}",
            percent(row, "effect", True),
            percent(row, "damage", True),
            f"{percent(row, 'same_type_changed')}, {percent(row, 'same_type_to_target')}",
            percent(row, "kept"),
            "met" if row["goal_met"] else "not met",
            *shown,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "<details><summary>The whole front</summary>",
            "",
            "```",
            front_table(result, "test"),
            "```",
            "",
            "</details>",
        ]
    )


def published(case: str, task: AnswerTask, result: SweepResult, said: Answers, own: bool) -> str:
    """Our table as the paper has it, with the paper's beside it if the model is its `own`."""
    lines = ["| | yes/no | number | other | source answers | target answers |", "|---|---|---|---|---|---|"]
    chosen = [row["setting"] for row in result.of("test")].index(next(iter(settings_chosen(result)), 0))
    for name, texts in (("none", said.texts[0]), (case, said.texts[chosen])):
        metric = VQAAccuracy()
        metric.update(texts, [row["answers"] for row in said.samples], [row["answer_type"] for row in said.samples])
        accuracy = metric.compute()
        moved = transitions(said.texts[0], texts)
        change = {
            one: sum(n for (_, after), n in moved.items() if after == one)
            - sum(n for (before, _), n in moved.items() if before == one)
            for one in (task.source, task.target)
        }
        ours = [f"{100 * accuracy[kind].value:.2f}" if kind in accuracy else "–" for kind in TYPES]
        lines.append(f"| {name}, ours | {' | '.join(ours)} | {change[task.source]:+d} | {change[task.target]:+d} |")
        if not own:
            continue
        paper = PUBLISHED[name]
        lines.append(f"| {name}, paper | {' | '.join(f'{x:.2f}' for x in paper[:3])} | {paper[3]:+d} | {paper[4]:+d} |")
    return "\n".join(lines)


def settings_chosen(result: SweepResult) -> Iterator[int]:
    """The numbers that validation chose."""
    return (row["setting"] for row in result.of("test") if row["chosen"])


if __name__ == "__main__":
    main()
