"""A sweep: many settings judged on validation samples, the chosen one, its front and its controls on test samples.

1. Every setting of a grid answers the validation samples; the unsteered model stands beside them.
2. `scoring.choose` picks one there, and the best of every kind of vector, alone and with each gate. What is reported of
   them comes from test samples, which had no part in the choice.
3. On test: the whole Pareto front of the validation and what was picked, with controls: random vectors of the same norm
   and, where they are given, vectors of shuffled labels; of the chosen setting one of each at every alpha of the grid.

Settings that are given, among which nothing is chosen, are evaluated by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hooked_mm.data import SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.reader import ModelSource
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.store import ActivationStore
from steering.concept_moves import ConceptMoves
from steering.controls import CONTROLS, controls_of
from steering.gate import Gate
from steering.grid import Grid
from steering.row_sets import part_of
from steering.scoring import Row, all_scores, choose, rows_of
from steering.setting import Setting
from steering.steered_answers import Answers, answer
from steering.sweep_result import SweepResult
from steering.tasks import Goal, Task

SHOWN = 6
"""Examples of each kind."""


@dataclass(frozen=True)
class Judged:
    """Settings on one split.

    Attributes:
        rows: See `scoring.rows_of`.
        answers: What was said.
        numbers: Of the settings, the unsteered one's 0 first, in the order of the answers.
    """

    rows: list[Row]
    answers: Answers
    numbers: list[int]


def judge(
    model: HookedMM | ModelSource,
    data: SampleDataModule,
    task: Task,
    settings: Mapping[int, Setting],
    path: Path,
    split: str,
    *,
    control_of: Mapping[int, tuple[str, int]] | None = None,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    **trainer_options: Any,
) -> Judged:
    """Let settings, by their numbers, answer a data set, and score them.

    Args:
        model: The hooked model, or where to load it from.
        data: The samples.
        task: What is scored.
        settings: Number -> setting.
        path: Of the store of answers.
        split: What these samples are called.
        control_of: Number -> which control it is, and of which setting.
        resume: Go on with, or read, what lies at `path`.
        options: Of `SteeredAnswers`.
        seed: Of the bootstrap.
        trainer_options: As in `extract`.
    """
    found = answer(model, data, list(settings.values()), path, resume=resume, options=options, **trainer_options)
    scores = all_scores(task, found)
    rows = rows_of(list(settings.values()), list(settings), scores, split, task.goal, control_of, seed=seed)
    return Judged(rows, found, [0, *settings])


def controls_for(
    chosen: Setting, alphas: Sequence[float], shuffled: Sequence[SteeringVector] = (), seeds: int = 2
) -> list[tuple[Setting, str]]:
    """The chosen setting with other vectors of the same norm, `"random"` or `"shuffled"`: all of them at its own alpha,
    the first of each kind at other alphas too.

    Of a setting that does several things at once, every vector is a random one; there are no shuffled controls.

    Args:
        chosen: What they are controls of.
        alphas: Of the grid; those of the setting's own operation.
        shuffled: Made of the same rows with shuffled labels.
        seeds: Of random vectors.
    """
    if not chosen.parts:
        return []
    first, *rest = chosen.parts
    made = [
        (replace(_random(first, number), also=tuple(_random(part, number) for part in rest)), "random")
        for number in range(seeds)
    ]
    if isinstance(first.vector, ConceptMoves):
        moves = [] if rest else [one for one in first.vector.controls(range(seeds)) if one.kind == "shuffled"]
        return [*made, *((replace(first, vector=other), "shuffled") for other in moves)]
    made += [] if rest else [(replace(first, vector=other), other.kind) for other in shuffled]
    firsts: dict[str, Setting] = {}
    for control, kind in made:
        firsts.setdefault(kind, control)
    amounts = () if first.operation == "project_out" else dict.fromkeys(alphas)
    others = [alpha for alpha in amounts if alpha != first.alpha]
    return [*made, *((replace(one, alpha=alpha), kind) for kind, one in firsts.items() for alpha in others)]


def _random(part: Setting, seed: int) -> Setting:
    """The same with random numbers of the same norm."""
    vector = part.vector
    assert vector is not None
    found = vector.controls([seed]) if isinstance(vector, ConceptMoves) else controls_of(vector, seeds=[seed])
    return replace(part, vector=found[0])


def controls_among(vectors: Sequence[SteeringVector], chosen: SteeringVector | ConceptMoves) -> list[SteeringVector]:
    """Those of saved vectors that were made as controls of one."""

    def owner(other: SteeringVector) -> tuple[str, Any, Any]:
        of = other.made_from.get("control_of") or {}
        return other.hook, of.get("name"), of.get("kind")

    wanted = chosen.hook, chosen.name, chosen.kind
    return [other for other in vectors if other.kind == "shuffled" and owner(other) == wanted]


def sweep(
    model: HookedMM | ModelSource,
    vectors: Sequence[SteeringVector],
    task: Task,
    validation: SampleDataModule,
    test: SampleDataModule,
    folder: str | Path,
    *,
    grid: Grid | None = None,
    gates: Sequence[Gate] = (),
    settings: Sequence[Setting] | None = None,
    seeds: int = 2,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    facts: Sequence[tuple[str, str]] = (),
    **trainer_options: Any,
) -> SweepResult:
    """Try every setting on validation samples, and what it says on test samples; see the module.

    Args:
        model: The hooked model, or where to load it from.
        vectors: To try, and controls of them (kind `"shuffled"`).
        task: What shall change, and what shall not.
        validation: Samples to choose by.
        test: Others to report.
        folder: For the answers; what is there is used again with `resume`.
        grid: What is tried of every vector.
        gates: For the grid.
        settings: To try instead of, or beside, the grid's, which then must be given.
        seeds: Random controls of the chosen setting.
        resume: Go on with a sweep that was cut off.
        options: Of `SteeredAnswers`, on test.
        seed: Of the bootstrap.
        facts: To be shown on top of the result.
        trainer_options: As in `extract`.

    Raises:
        BadInputError: If there is nothing to try, a setting has no vector, or samples of the test are among those of
            the validation, or among those that a vector was made of.
    """
    if both := set(validation.ids()) & set(test.ids()):
        raise BadInputError(
            f"{len(both)} samples, {min(both)!r} among them, are in validation and test; what is chosen by a sample "
            "says nothing on it: give two sets"
        )
    folder = Path(folder)
    real = [vector for vector in vectors if vector.kind not in (*CONTROLS, "gate")]
    grid = grid or (Grid() if settings is None else None)
    tried = [*(grid.settings(real, gates) if grid is not None else []), *(settings or [])]
    _check_unseen(vectors, tried, test)
    numbered = dict(enumerate(tried, 1))
    if idle := [number for number, setting in numbered.items() if not setting.parts]:
        raise BadInputError(f"setting {idle[0]} has no vector; the model as it is stands beside all settings anyway")
    same: dict[str, Any] = {"resume": resume, "seed": seed, **trainer_options}
    plain = {name: value for name, value in (options or {}).items() if name not in ("side_effects", "surprise")}
    first = judge(model, validation, task, numbered, folder / "validation", "validation", options=plain, **same)
    chosen = choose(first.rows, task.goal)
    best = best_of_kinds(first.rows, task.goal)
    kept = {row["setting"]: numbered[row["setting"]] for row in first.rows if row["front"] and row["setting"]}
    kept |= {number: numbered[number] for number in best}
    control_of: dict[int, tuple[str, int]] = {}
    for number in best:
        one = numbered[number]
        first_part = one.parts[0]
        assert first_part.vector is not None
        alike = [other.alpha for other in tried if other.parts[0].operation == first_part.operation]
        shuffled = controls_among(vectors, first_part.vector)
        for setting, kind in controls_for(one, alike if number == chosen else [], shuffled, seeds):
            after = len(tried) + len(control_of) + 1
            kept[after], control_of[after] = setting, (kind, number)
    second = judge(model, test, task, kept, folder / "test", "test", control_of=control_of, options=options, **same)
    rows = [
        {**row, "chosen": row["setting"] == chosen and chosen > 0, "best_of": best.get(row["setting"], "")}
        for row in (*first.rows, *second.rows)
    ]
    counts = [(part, f"{len(one.answers.samples)} samples") for part, one in (("validation", first), ("test", second))]
    return SweepResult(task.describe(), [*facts, *counts], distinct(rows), examples(second, task, chosen))


def _check_unseen(vectors: Sequence[SteeringVector], settings: Sequence[Setting], test: SampleDataModule) -> None:
    """Refuse test samples that had a part in the making of a vector or gate."""
    parts = [part for setting in settings for part in setting.parts]
    acting = (one for part in parts for one in (part.vector, part.second, part.gate))
    used = [*vectors, *(one for one in acting if isinstance(one, SteeringVector | Gate))]
    sources: dict[tuple[str, str], tuple[str, Any]] = {}
    for one in used:
        for about in _origins(one.made_from):
            sources.setdefault((str(about.get("store")), repr(about.get("where"))), (one.name, about.get("where")))
    tested = set(test.ids())
    for (path, _), (name, where) in sources.items():
        # Where there is no store, or none any more, nothing can be told.
        if not (Path(path) / "manifest.json").exists():
            continue
        store = ActivationStore.open(path)
        part = part_of(store, where) if where else store
        if both := tested & set(part.samples.column("sample").to_pylist()):
            raise BadInputError(
                f"{len(both)} samples, {min(both)!r} among them, are in test and in {path!r}, of which {name!r} "
                "was made; test on others"
            )


def _origins(made_from: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a vector comes from, or the parts that it was added up of."""
    parts = [found for part in made_from.get("parts") or () for found in _origins(part.get("made_from") or {})]
    return [made_from, *parts]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows whose vectors are called by their kind too where several kinds share a name, since tables go by names."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        if row["setting"] and not row["control"]:
            kinds.setdefault(row["vector"], set()).add(row["kind"])
    shared = {name for name, own in kinds.items() if len(own) > 1}
    return [
        {**row, "vector": f"{row['vector']} ({row['kind']})"} if row["vector"] in shared and not row["control"] else row
        for row in rows
    ]


def best_of_kinds(rows: Sequence[Row], goal: Goal) -> dict[int, str]:
    """What `choose` picks of each kind of vector, alone and with each gate: number -> `"coarse"`, `"coarse, GATE"`."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row["setting"] and not row["control"]:
            kinds.setdefault(", ".join(filter(None, (row["kind"], row["gate"]))), []).append(row)
    picked = {name: choose(own, goal) for name, own in kinds.items()}
    return {number: name for name, number in picked.items() if number}


def evaluate(
    model: HookedMM | ModelSource,
    settings: Sequence[Setting],
    task: Task,
    data: SampleDataModule,
    folder: str | Path,
    *,
    shuffled: Sequence[SteeringVector] = (),
    seeds: int = 2,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    facts: Sequence[tuple[str, str]] = (),
    **trainer_options: Any,
) -> SweepResult:
    """Say what settings do, each beside its controls of the same alpha; nothing is chosen.

    Args:
        model: The hooked model, or where to load it from.
        settings: To evaluate.
        task: What shall change, and what shall not.
        data: The samples; rows call them `test`.
        folder: For the answers; what is there is used again with `resume`.
        shuffled: Vectors of shuffled labels; those of a setting's vector are its controls.
        seeds: Random controls of each setting.
        resume: Go on with an evaluation that was cut off.
        options: Of `SteeredAnswers`.
        seed: Of the bootstrap.
        facts: To be shown on top of the result.
        trainer_options: As in `extract`.

    Raises:
        BadInputError: If there are no settings, or a vector was made of these samples.
    """
    _check_unseen(shuffled, settings, data)
    numbered = dict(enumerate(settings, 1))
    control_of: dict[int, tuple[str, int]] = {}
    for number, setting in enumerate(settings, 1):
        own = [] if setting.vector is None else controls_among(shuffled, setting.vector)
        for other, kind in controls_for(setting, (setting.alpha,), own, seeds):
            after = len(numbered) + 1
            numbered[after], control_of[after] = other, (kind, number)
    same: dict[str, Any] = {"resume": resume, "seed": seed, "options": options, **trainer_options}
    found = judge(model, data, task, numbered, Path(folder) / "test", "test", control_of=control_of, **same)
    shown = [row["setting"] for row in found.rows if row["front"] and row["setting"]][:SHOWN]
    said = [one for number in shown for one in examples(found, task, number, max(1, SHOWN // len(shown)))]
    return SweepResult(
        task.describe(), [*facts, ("test", f"{len(found.answers.samples)} samples")], distinct(found.rows), said
    )


def examples(judged: Judged, task: Task, number: int, count: int = SHOWN) -> list[dict[str, Any]]:
    """What a setting did to some samples: of the source, and of those others that it changed."""
    if number not in judged.numbers:
        return []
    before, after = judged.answers.texts[0], judged.answers.texts[judged.numbers.index(number)]
    shown: list[dict[str, Any]] = []
    for what in ("source", "same type", "other"):
        own = [place for place, one in enumerate(task.about(judged.answers)) if one == what]
        # Of what should stay, what did not stands in front.
        own.sort(key=lambda place: what != "source" and before[place] == after[place])
        for place in own[:count]:
            sample = judged.answers.samples[place]
            shown.append(
                {
                    "sample": sample["sample"],
                    "picture": sample["sample_number"],
                    "prompt": sample["prompt"],
                    "before": before[place],
                    "after": after[place],
                    "reference": sample["answer"],
                    "setting": number,
                    "about": what,
                }
            )
    return shown
