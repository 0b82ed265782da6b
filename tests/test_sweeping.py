"""Sweeps of the small LLaVA: what is chosen by validation alone, what stands beside it on test, and its controls."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hooked_mm.conditions import Above
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.store import ActivationStore
from steering import sweeping
from steering.controls import controls_of
from steering.gate import Gate
from steering.grid import Grid
from steering.scoring import rows_of
from steering.setting import Setting
from steering.steered_answers import Answers, SteeredAnswers
from steering.sweep_result import SweepResult
from steering.sweeping import evaluate, examples, sweep
from steering.tasks import AnswerTask, Goal

LAYERS = (2, 3)
YES_NO = ("is there a shape", "is there a colour", "is there a pair")
TASK = AnswerTask(source="yes", target="no", types=YES_NO, goal=Goal(0.8, 0.2))
GRID = Grid(alphas=(1.0, 2.0, 4.0))
SIZE = 48
SHORT = {"max_new_tokens": 4}
"""Answers have one or two words."""


def hook(layer: int) -> str:
    """Behind a block."""
    return f"blocks.{layer}.hook_resid_post"


def made_vectors(model: HookedMM) -> list[SteeringVector]:
    """Yes to no, by means of the activations at the last prompt position, and a control for each."""
    asked = [sample for sample in drawn("train", 5, 150) if sample.columns["question_type"] in YES_NO]
    batch = model.prepare([sample.images for sample in asked], [sample.text for sample in asked])
    _, cache = model.run_with_cache(batch, [hook(layer) for layer in LAYERS])
    yes = torch.tensor([sample.answer == "yes" for sample in asked])
    made = []
    for layer in LAYERS:
        rows = cache[hook(layer)][:, -1]
        vector = SteeringVector(rows[~yes].mean(0) - rows[yes].mean(0), hook(layer), "coarse", "yes to no")
        made += [vector, *controls_of(vector, rows[yes], rows[~yes], lambda a, b: b.mean(0) - a.mean(0))]
    return made


@dataclass
class Seen:
    """What was judged, in order: the split, its settings and controls."""

    calls: list[tuple[str, dict[int, Setting], dict[int, str]]] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Of every sweep in a test."""
    found, real = Seen(), sweeping.judge

    def spy(
        model: Any, data: Any, task: Any, settings: Mapping[int, Setting], path: Any, split: str, **more: Any
    ) -> Any:
        found.calls.append((split, dict(settings), dict(more.get("control_of") or {})))
        return real(model, data, task, settings, path, split, **more)

    monkeypatch.setattr(sweeping, "judge", spy)
    return found


@cache
def drawn(split: Any, seed: int, size: int = SIZE) -> list[Sample]:
    """Questions about scenes, drawn once."""
    data = SceneDataset(size, "question", split, seed)
    return [data[number] for number in range(size)]


def validation() -> SampleDataModule:
    """Questions to choose by."""
    return SampleDataModule(drawn("validation", 1))


def reported() -> SampleDataModule:
    """Questions to report."""
    return SampleDataModule(drawn("test", 2))


@pytest.fixture(scope="module")
def vectors(llava: HookedMM) -> list[SteeringVector]:
    """Two with their controls."""
    return made_vectors(llava)


@pytest.fixture(scope="module")
def done(llava: HookedMM, vectors: list[SteeringVector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep(llava, vectors, TASK, validation(), reported(), folder, grid=GRID, options=SHORT).save(folder / "result")
    return folder


def again(llava: HookedMM, vectors: list[SteeringVector], done: Path, folder: Path, **options: Any) -> SweepResult:
    """The same sweep on what validation has said already."""
    shutil.copytree(done / "validation", folder / "validation")
    return sweep(
        llava,
        vectors,
        TASK,
        validation(),
        options.pop("test", reported()),
        folder,
        grid=GRID,
        resume=True,
        options=SHORT,
        **options,
    )


def test_a_sweep_steers_and_its_controls_do_not(done: Path) -> None:
    """On test: the chosen setting turns most answers, no control with its alpha does; nothing does nothing."""
    result = SweepResult.load(done / "result")
    assert result.splits() == ["validation", "test"]
    rows = {split: {row["setting"]: row for row in result.of(split)} for split in ("validation", "test")}
    (number,) = (one["setting"] for one in rows["validation"].values() if one["chosen"])
    chosen = rows["test"][number]
    assert [one["setting"] for one in rows["test"].values() if one["chosen"]] == [number]
    assert chosen["effect"] > 0.5
    controls = [one for one in rows["test"].values() if one["control"] and one["alpha"] == chosen["alpha"]]
    assert {one["control"] for one in controls} == {"random", "shuffled"}
    assert all(one["effect"] < chosen["effect"] - 0.3 for one in controls)
    assert list(rows["validation"]) == list(range(7))
    for split in rows.values():
        nothing = split[0]
        assert (nothing["kind"], nothing["effect"], nothing["damage"]) == ("none", 0, 0)
        assert nothing["damage_low"] == nothing["damage_high"] == 0
    # The whole front of the validation is judged on test.
    front = {n for n, one in rows["validation"].items() if one["front"]}
    assert front <= rows["test"].keys()
    assert ("test", f"{SIZE} samples") in result.facts


def test_xl_vlms_fault_no_controls(
    llava: HookedMM, vectors: list[SteeringVector], done: Path, tmp_path: Path, seen: Seen
) -> None:
    """Random and shuffled ones as long as the chosen vector, at its place, with own numbers."""
    result = again(llava, vectors, done, tmp_path)
    (_, tried, none), (_, kept, control_of) = seen.calls
    assert none == {}
    (chosen,) = {row["setting"] for row in result.rows if row["chosen"]}
    best = tried[chosen]
    assert best.vector is not None
    assert kept[chosen] is best
    mine = {number: kept[number] for number in control_of}
    assert not set(mine) & set(tried)
    kinds: dict[str, list[float]] = {}
    for number, setting in mine.items():
        assert setting.vector is not None
        assert setting.vector.norm == pytest.approx(best.vector.norm, rel=1e-5)
        assert control_of[number] == (setting.vector.kind, chosen)
        assert (setting.vector.hook, setting.at, setting.operation) == (best.vector.hook, best.at, best.operation)
        assert float(torch.cosine_similarity(setting.vector.values, best.vector.values, dim=0)) < 0.9
        kinds.setdefault(setting.vector.name, []).append(setting.alpha)
    assert len(kinds) == 3
    # The first of each kind at every alpha, the other at the chosen one.
    assert sorted(len(alphas) for alphas in kinds.values()) == [1, 3, 3]
    assert all(best.alpha in alphas and len(set(alphas)) == len(alphas) for alphas in kinds.values())


def test_nothing_of_test_has_a_part_in_the_choice(
    llava: HookedMM, vectors: list[SteeringVector], done: Path, tmp_path: Path, seen: Seen
) -> None:
    """With other test samples, whose references are nonsense, the same is chosen of the same validation."""
    old = SweepResult.load(done / "result")
    garbage = [replace(sample, id=f"g{sample.id}", answer="zxq") for sample in reported().dataset]
    new = again(llava, vectors, done, tmp_path, test=SampleDataModule(list(reversed(garbage))[:30]))
    new.save(tmp_path / "result")
    assert SweepResult.load(tmp_path / "result").of("validation") == old.of("validation")
    assert [call[0] for call in seen.calls] == ["validation", "test"]
    assert [row["setting"] for row in new.of("test")] == [row["setting"] for row in old.of("test")]
    assert all(row["accuracy"] == 0 for row in new.of("test"))


def test_what_is_best_on_test_is_not_chosen_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made-up scores: what is right on validation does nothing on test, and the other way round."""
    asked: list[str] = []

    def made_up(_: Any, __: Any, task: Any, settings: Mapping[int, Setting], ___: Any, split: str, **more: Any) -> Any:
        asked.append(split)
        kinds = [setting.vector.kind for setting in settings.values() if setting.vector is not None]
        good = "coarse" if split == "validation" else "fine"
        effect = torch.tensor([[0.0] * 4, *([float(kind == good)] * 4 for kind in kinds)])
        scores = {"effect": effect, "damage": torch.zeros_like(effect)}
        rows = rows_of(list(settings.values()), list(settings), scores, split, task.goal, more.get("control_of"))
        samples = [{"sample": "s", "sample_number": 0, "prompt": "p", "answer": "a", "question_type": "place"}]
        return sweeping.Judged(rows, Answers(samples, [["a"]] * len(rows)), [0, *settings])

    monkeypatch.setattr(sweeping, "judge", made_up)
    made = [SteeringVector(torch.ones(8), hook(3), kind, kind) for kind in ("fine", "coarse")]
    result = sweep(None, made, TASK, validation(), reported(), tmp_path, grid=Grid(alphas=(1.0,)))  # type: ignore[arg-type]
    assert asked == ["validation", "test"]
    assert [(row["split"], row["kind"], row["effect"]) for row in result.rows if row["chosen"]] == [
        ("validation", "coarse", 1),
        ("test", "coarse", 0),
    ]
    assert {example["setting"] for example in result.examples} == {2}


def test_the_whole_front_goes_on_to_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made-up scores of one kind of vector: what is best of nothing, but beaten by nothing, is reported too."""
    asked: dict[str, set[int]] = {}
    effects, damages = {0.5: 0.4, 1.0: 0.95, 2.0: 1.0, 3.0: 0.9}, {0.5: -0.1, 1.0: 0.01, 2.0: 0.5, 3.0: 0.6}

    def made_up(_: Any, __: Any, task: Any, settings: Mapping[int, Setting], ___: Any, split: str, **more: Any) -> Any:
        asked[split] = set(settings)
        alphas = [setting.alpha for setting in settings.values()]
        scores = {
            name: torch.tensor([[0.0] * 4, *([table[alpha]] * 4 for alpha in alphas)])
            for name, table in (("effect", effects), ("damage", damages))
        }
        rows = rows_of(list(settings.values()), list(settings), scores, split, task.goal, more.get("control_of"))
        samples = [{"sample": "s", "sample_number": 0, "prompt": "p", "answer": "a", "question_type": "place"}]
        return sweeping.Judged(rows, Answers(samples, [["a"]] * len(rows)), [0, *settings])

    monkeypatch.setattr(sweeping, "judge", made_up)
    vector = SteeringVector(torch.ones(8), hook(3), "coarse", "v")
    data = validation(), reported()
    result = sweep(None, [vector], TASK, *data, tmp_path, grid=Grid(alphas=tuple(effects)))  # type: ignore[arg-type]
    assert {row["setting"] for row in result.rows if row["chosen"]} == {2}
    # Of the others the first does less damage, the third has more effect, the fourth is beaten by the third.
    assert asked["test"] & {1, 2, 3, 4} == {1, 2, 3}


def test_a_sweep_that_is_done_is_read(
    llava: HookedMM, vectors: list[SteeringVector], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is asked for nothing, and the result is the same."""

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(SteeredAnswers, "represent", never)
    found = sweep(llava, vectors, TASK, validation(), reported(), done, grid=GRID, resume=True, options=SHORT)
    found.save(done / "again")
    assert SweepResult.load(done / "again") == SweepResult.load(done / "result")


def test_xl_vlms_fault_evaluation_on_the_samples_of_the_vector(
    llava: HookedMM, vectors: list[SteeringVector], tmp_path: Path
) -> None:
    """Samples of the test neither choose a setting nor make a vector; of a part of a store, others may be tested."""
    data = reported()
    with pytest.raises(BadInputError, match=f"{SIZE} samples.*in validation and test"):
        sweep(llava, vectors, TASK, data, reported(), tmp_path / "a", grid=GRID)
    ids = data.ids()
    samples = [{"sample": name, "sample_number": n, "half": n % 2} for n, name in enumerate(["x", *ids[:5]])]
    rows = [{"sample": row["sample"], "position": 0} for row in samples]
    store = ActivationStore.from_arrays(tmp_path / "store", {hook(3): torch.ones(6, 128)}, rows, samples, {})
    for where, count in ((None, 5), ({"half": 0}, 2)):
        own = replace(vectors[0], made_from={"store": str(store.path), "where": where})
        for given, settings in (([own], None), ([], [Setting(own)])):
            with pytest.raises(BadInputError, match=f"{count} samples.*'yes to no' was made"):
                sweep(llava, given, TASK, validation(), data, tmp_path / "a", settings=settings)
            with pytest.raises(BadInputError, match=f"{count} samples.*'yes to no' was made"):
                evaluate(llava, [Setting(own)], TASK, data, tmp_path / "a")
        gate = Gate(Above(torch.ones(128), 0.0, hook(1), "mean", LAST_PROMPT), "g", dict(own.made_from))
        with pytest.raises(BadInputError, match=f"{count} samples.*'g' was made"):
            evaluate(llava, [Setting(vectors[0], gate=gate)], TASK, data, tmp_path / "a")
    gone = replace(vectors[0], made_from={"store": str(tmp_path / "gone")})
    half = SampleDataModule([sample for sample in data.dataset if sample.id not in (ids[1], ids[3])])
    own = replace(vectors[0], made_from={"store": str(store.path), "where": {"half": 0}})
    assert not (tmp_path / "a").exists()
    result = sweep(
        llava, [own, gone], TASK, validation(), half, tmp_path / "a", grid=Grid(alphas=(2.0,)), seeds=1, options=SHORT
    )
    assert result.splits() == ["validation", "test"]


def test_examples_show_what_changed(done: Path) -> None:
    """Of the chosen setting on test: sources, and of the others first those that did not stay as they were."""
    result, answers = SweepResult.load(done / "result"), Answers.of(ActivationStore.open(done / "test"))
    (chosen,) = {row["setting"] for row in result.rows if row["chosen"]}
    after = answers.texts[[row["setting"] for row in result.of("test")].index(chosen)]
    by_id = {sample["sample"]: number for number, sample in enumerate(answers.samples)}
    about = TASK.about(answers)
    shown: dict[str, list[bool]] = {}
    for example in result.examples:
        number = by_id[example["sample"]]
        assert example["before"] == answers.texts[0][number]
        assert example["after"] == after[number]
        assert example["prompt"] == answers.samples[number]["prompt"]
        assert example["reference"] == answers.samples[number]["answer"]
        assert example["about"] == about[number]
        assert example["setting"] == chosen
        shown.setdefault(example["about"], []).append(example["before"] != example["after"])
    for what in ("same type", "other"):
        changed = sum(answers.texts[0][n] != after[n] for n, one in enumerate(about) if one == what)
        assert shown[what] == [place < changed for place in range(6)]
    assert len(shown["source"]) == min(6, about.count("source"))
    assert any(shown["source"])
    judged = sweeping.Judged([], answers, [row["setting"] for row in result.of("test")])
    assert examples(judged, TASK, 999) == []
    assert len(examples(judged, TASK, chosen, count=1)) == 3


def test_settings_may_be_given(llava: HookedMM, vectors: list[SteeringVector], tmp_path: Path, seen: Seen) -> None:
    """Those that do several things at once too; the best of each kind and gate goes on to the test."""
    one, other = vectors[0], replace(vectors[3], kind="fine")
    shut = Gate(Above(torch.ones(128), 1e6, hook(1), "mean", LAST_PROMPT), "shut")
    given = [Setting(one, 1.0, also=(Setting(other, 1.0),)), Setting(other, 2.0), Setting(other, 2.0, gate=shut)]
    small = [SampleDataModule(list(data.dataset)[:32]) for data in (validation(), reported())]
    result = sweep(
        llava,
        [],
        TASK,
        *small,
        tmp_path / "a",
        settings=given,
        seeds=1,
        options={"side_effects": True, "surprise": True, **SHORT},
    )
    assert {row["setting"]: row["best_of"] for row in result.of("test") if row["best_of"]} == {
        1: "coarse",
        2: "fine",
        3: "fine, shut",
    }
    gated = next(row for row in result.of("test") if row["setting"] == 3)
    assert (gated["effect"], gated["damage"], gated["kept"], gated["kl"]) == (0, 0, 1, 0)
    _, _, control_of = seen.calls[1]
    assert sorted(control_of) == list(range(4, 4 + len(control_of)))
    assert not {"kl", "nll"} & result.of("validation")[0].keys()
    assert result.of("test")[0]["nll"] > 0
    with pytest.raises(BadInputError, match="setting 2 has no vector"):
        sweep(llava, [], TASK, *small, tmp_path / "b", settings=[Setting(one), Setting()])


def test_given_settings_are_evaluated_as_a_sweep_would(
    llava: HookedMM, vectors: list[SteeringVector], done: Path, tmp_path: Path, seen: Seen
) -> None:
    """The same rows for the same settings on the same samples, each with its own controls; nothing is chosen."""
    again(llava, vectors, done, tmp_path / "sweep")
    (_, tried, _), (_, kept, control_of) = seen.calls
    old = {row["setting"]: row for row in SweepResult.load(done / "result").of("test")}
    on_test = [number for number in kept if number not in control_of]
    numbers = [on_test[0], next(number for number in tried if number not in on_test)]
    result = evaluate(
        llava,
        [tried[n] for n in numbers],
        TASK,
        reported(),
        tmp_path / "a",
        shuffled=vectors,
        seeds=1,
        facts=[("a", "b")],
        options=SHORT,
    )
    result.save(tmp_path / "result")
    rows = SweepResult.load(tmp_path / "result").of("test")
    assert [row["control"] for row in rows] == ["", "", "", "random", "shuffled", "random", "shuffled"]
    assert not any(row["chosen"] for row in rows)
    assert result.splits() == ["test"]
    for row, number in zip(rows, [0, on_test[0]], strict=False):
        told = row.keys() - {"setting", "front", "chosen"}
        assert {name: row[name] for name in told} == {name: old[number][name] for name in told}
    _, controls, _ = seen.calls[-1]
    for number, of in ((3, 0), (4, 0), (5, 1), (6, 1)):
        one, other = controls[number], tried[numbers[of]]
        assert one.vector is not None
        assert other.vector is not None
        assert (one.vector.hook, one.alpha, one.at) == (other.vector.hook, other.alpha, other.at)
        assert one.vector.norm == pytest.approx(other.vector.norm, rel=1e-5)
    assert {example["setting"] for example in result.examples} <= {1, 2}
    assert result.examples


def test_bad_pictures_do_not_end_a_sweep(llava: HookedMM, vectors: list[SteeringVector], tmp_path: Path) -> None:
    """They are left out, and counted so."""
    bad = Sample("bad", Image.new("RGB", (48, 48)), " ", "yes", {"question_type": YES_NO[0]})
    data = [SampleDataModule([bad, *list(one.dataset)[:32]]) for one in (validation(), reported())]
    data[1].dataset[0] = replace(bad, id="bad too")
    result = sweep(llava, vectors[:1], TASK, *data, tmp_path, grid=Grid(alphas=(2.0,)), seeds=1, options=SHORT)
    assert result.facts == [("validation", "32 samples"), ("test", "32 samples")]
