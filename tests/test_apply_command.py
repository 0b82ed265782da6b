"""`hooked-mm steer apply`: answers before and after are those of raw hooks, to data and to prompts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.steering_vector import SteeringVector, load_vectors, save_vectors
from steering.apply_command import Prompts, main, repeated
from steering.steer_command import main as steer
from tests.steered_by_hand import gate_at_the_middle, opens, said, saved_vectors
from tests.steering_stores import DEEP, SHALLOW, questions_store

MODEL = ["--model.id", "small:llava"]
DATA = ["--data", "ScenesDataModule", "--data.size", "3", "--data.task", "questions"]


@pytest.fixture(scope="module")
def vectors(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector with controls at one hook, and another at an earlier one."""
    folder = tmp_path_factory.mktemp("vectors") / "v"
    store = questions_store(llava, tmp_path_factory)
    found = saved_vectors(store, folder)
    places = store.where(question_type="place").activations(SHALLOW)
    early = SteeringVector(places.mean(dim=0), SHALLOW, "coarse", "places", model=found[0].model)
    save_vectors([*found, early], folder)
    return folder


def table(file: Path) -> list[dict[str, str]]:
    """A CSV file as the csv module reads it."""
    with file.open(newline="") as text:
        return [*csv.DictReader(text)]


@pytest.mark.usefixtures("loaded")
def test_several_vectors_at_once(
    llava: HookedMM, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each at its own hook with its own alpha, token for token; a few are printed; nothing is written twice."""
    data, out = SceneDataset(3, "questions"), tmp_path / "out"
    samples = [data[n] for n in range(len(data))]
    chosen = ["--vectors", str(vectors), "--names", "[red -> blue, places]", "--alpha", "[3, 0.5]", "--shown", "2"]
    steer(["apply", *MODEL, *DATA, *chosen, "--output", str(out)])
    printed, rows = capsys.readouterr().out, table(out / "answers.csv")
    found = {vector.name: vector for vector in load_vectors(vectors)}
    added = [(DEEP, 3 * found["red -> blue"].values), (SHALLOW, 0.5 * found["places"].values)]
    before, after = said(llava, samples), said(llava, samples, added)
    assert 0 < sum(row["changed"] == "True" for row in rows) < len(rows)
    assert rows == [
        {
            "sample": sample.id,
            "prompt": sample.text,
            "reference": sample.answer,
            "before": old,
            "after": new,
            "changed": str(old != new),
        }
        for sample, old, new in zip(samples, before, after, strict=True)
    ]
    assert f"red -> blue (coarse) at {DEEP}, alpha 3, last_prompt+generated, add" in printed
    assert f"places (coarse) at {SHALLOW}, alpha 0.5" in printed
    assert printed.count("before: ") == 2
    assert f"  before: {before[1]}\n  after:  {after[1]}\n" in printed
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    assert f"{changed} of {len(rows)} answers changed" in printed
    with pytest.raises(BadInputError, match=r"already holds answers, answers\.csv; pass --resume"):
        main([*MODEL, *DATA, *chosen, "--output", str(out)])
    (out / "answers.csv").unlink()
    main([*MODEL, *DATA, *chosen, "--output", str(out), "--resume"])
    assert table(out / "answers.csv") == rows


@pytest.mark.usefixtures("loaded")
def test_a_gate(llava: HookedMM, vectors: Path, tmp_path: Path) -> None:
    """Samples that it does not open for keep their answers; two gates are one too many, unless one is chosen."""
    data = SceneDataset(3, "questions")
    samples = [data[n] for n in range(len(data))]
    vector = load_vectors(vectors)[0]
    half = gate_at_the_middle(llava, samples, vector)
    gate = half.save(tmp_path / "gate")
    options = [*MODEL, *DATA, "--names", "red -> blue", "--alpha", "3", "--gated", "true"]
    main([*options, "--vectors", f"[{vectors}, {gate}]", "--output", str(tmp_path / "out")])
    before, after = said(llava, samples), said(llava, samples, [(DEEP, 3 * vector.values)])
    expected = [
        new if there else old for old, new, there in zip(before, after, opens(llava, samples, half), strict=True)
    ]
    assert [row["after"] for row in table(tmp_path / "out" / "answers.csv")] == expected
    assert before != expected != after
    about = {"threshold": 1e6}
    never = SteeringVector(vector.values, DEEP, "gate", "never", made_from=about).save(tmp_path / "never")
    three = ["--vectors", f"[{vectors}, {gate}, {never}]"]
    with pytest.raises(BadInputError, match=r"the gates \['half', 'never'\] could all be meant"):
        main([*options, *three, "--output", str(tmp_path / "two")])
    main([*options, *three, "--gates", "never", "--output", str(tmp_path / "two")])
    assert not any(row["changed"] == "True" for row in table(tmp_path / "two" / "answers.csv"))


@pytest.mark.usefixtures("loaded")
def test_prompts_and_pictures(
    llava: HookedMM, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One picture for several prompts; a file written by `--print_config` says the same."""
    scene = SceneDataset(3)[1]
    scene.images.save(tmp_path / "scene.png")  # type: ignore[union-attr]
    prompts = ["what place is this ?", "how many objects are there ?"]
    asked = [option for prompt in prompts for option in ("--prompt", prompt)]
    assert repeated(["--image", "x", *asked, "--image=y", "--image+=z"]) == [
        *("--image", "x", "--prompt", prompts[0], "--prompt+", prompts[1], "--image+=y", "--image+=z")
    ]
    options = ["--vectors", str(vectors), "--names", "places", "--alpha", "5", "--image", str(tmp_path / "scene.png")]
    with pytest.raises(SystemExit):
        main(
            [
                *MODEL,
                *options,
                *asked[:2],
                f"--prompt={prompts[1]}",
                "--output",
                str(tmp_path / "out"),
                "--print_config",
            ]
        )
    (tmp_path / "apply.yaml").write_text(capsys.readouterr().out)
    main(["-c", str(tmp_path / "apply.yaml")])
    batch = llava.prepare([scene.images] * 2, prompts)
    rows = table(tmp_path / "out" / "answers.csv")
    assert [row["before"] for row in rows] == llava.generate(batch, 20).text
    assert [(row["sample"], row["prompt"], row["reference"]) for row in rows] == [
        *(("0", prompts[0], ""), ("1", prompts[1], ""))
    ]
    assert rows[0]["before"] == scene.columns["place"]
    assert rows[0]["changed"] == "True"


def test_prompts_are_paired_with_pictures() -> None:
    """As many of each, or one for all, or none."""
    for prompts, images, expected in [
        (["a", "b"], ["x", "y"], [("a", "x"), ("b", "y")]),
        (["a"], ["x", "y"], [("a", "x"), ("a", "y")]),
        (["a", "b"], ["x"], [("a", "x"), ("b", "x")]),
        (["a", "b"], [], [("a", None), ("b", None)]),
    ]:
        data = Prompts(prompts, images)
        assert [(one.text, one.images) for one in data.dataset] == expected  # type: ignore[attr-defined]
        assert data.ids() == ["0", "1"]
    for prompts, images in [(["a", "b"], ["x", "y", "z"]), ([], ["x"])]:
        with pytest.raises(BadInputError, match="as many of each, or one for all"):
            Prompts(prompts, images)


def test_refusals(vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded, and nothing is written."""
    monkeypatch.setattr(HookedMM, "small", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    mine, one, out = ["--vectors", str(vectors)], ["--names", "places"], ["--output", str(tmp_path / "out")]
    refused: list[tuple[list[str], str]] = [
        ([*mine, *one, *out], "what is asked"),
        ([*mine, *one, *out, *DATA, "--prompt", "a"], "what is asked"),
        ([*mine, *one, *out, *DATA, "--image", "a"], "--image is given beside --data"),
        ([*mine, *one, *out, "--prompt", "a", "--image", "nowhere.png"], "'nowhere.png' does not exist"),
        ([*mine, *out, *DATA], r"2 vectors \(red -> blue, places\), which would all act"),
        ([*mine, "--names", "*", "--hooks", "*.2.*", *out, *DATA, "--alpha", "[1, 2]"], "2 alphas for 1 vectors"),
        ([*mine, *one, *out, *DATA, "--operation", "project_out", "--alpha", "2"], "which has no amount"),
        ([*mine, *one, *out, *DATA, "--operation", "ad"], "nearest: add"),
        ([*mine, *one, *out, *DATA, "--gated", "true"], "there is no gate"),
        ([*mine, *one, *DATA, "--output", str(tmp_path / "full")], "already holds notes"),
        ([*mine, *one, *DATA, *out, "--model.id", "hub/other"], "'places' is one of the model .*'hub/other'"),
    ]
    for options, reason in refused:
        with pytest.raises(BadInputError, match=reason):
            main([*MODEL, *options])
    assert not (tmp_path / "out").exists()
