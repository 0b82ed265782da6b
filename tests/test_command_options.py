"""What the commands that steer share: names are matched and told apart, results kept with or without pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.reader import ModelSource
from hooked_mm.steering_vector import SteeringVector
from steering.command_options import Given, check_output, check_owner, first_alone, keep, matching, told_apart
from steering.controls import controls_of
from steering.sweeping import controls_among
from tests.sweeps import made_up

NAMES = ["red -> blue", "yes -> no", "1 -> 3", "all [1]"]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ("*", NAMES),
        ("yes -> no", ["yes -> no"]),
        (["1 ->*", "red*", "1 -> 3"], ["1 -> 3", "red -> blue"]),
        # A name is itself before it is a glob.
        ("all [1]", ["all [1]"]),
        ([], []),
    ],
)
def test_names_and_globs(globs: str | list[str], expected: list[str]) -> None:
    """In the order asked for, each once."""
    assert matching(globs, [*NAMES, "1 -> 3"], "vector") == expected


def test_a_name_that_is_not_there() -> None:
    """The nearest is offered, and what there is."""
    with pytest.raises(BadInputError, match=r"no vector 'yes -> on'; nearest: yes -> no.*there are: red -> blue"):
        matching(["red*", "yes -> on"], NAMES, "vector")


def test_kinds_of_one_name_are_told_apart() -> None:
    """With their controls, which remain theirs; a name of one kind stays as it is."""
    made = [
        SteeringVector(torch.randn(4, generator=torch.Generator().manual_seed(n)), "h", kind, name)
        for n, (kind, name) in enumerate([("coarse", "a"), ("probe", "a"), ("coarse", "b"), ("coarse", "")])
    ]
    # As of shuffled labels, by which `controls_among` goes.
    controls = [replace(control, kind="shuffled") for vector in made for control in controls_of(vector)]
    found = told_apart(Given(made, controls, []))
    assert [vector.name for vector in found.vectors] == ["a (coarse)", "a (probe)", "b", ""]
    assert [control.name for control in found.controls] == [
        *("random for a (coarse), seed 0", "random for a (probe), seed 0", "random for b, seed 0"),
        "random for , seed 0",
    ]
    for vectors, theirs in ((made, controls), (found.vectors, found.controls)):
        for vector, control in zip(vectors, theirs, strict=True):
            assert controls_among(theirs, vector) == [control]
    alone = Given(made[:1], controls, [])
    assert told_apart(alone).vectors[0].name == "a"


def test_owners_are_compared_by_their_last_part() -> None:
    """A folder lies elsewhere on every machine; what is not known is not compared."""
    values = torch.ones(3)
    for owner in ("/a/b/llava", "llava", None):
        check_owner([SteeringVector(values, "h", model=owner)], ModelSource("small:llava"))
    with pytest.raises(BadInputError, match="'x' is one of the model 'hub/other', the model is to be 'small:llava'"):
        check_owner([SteeringVector(values, "h", name="x", model="hub/other")], ModelSource("small:llava"))


def test_folders(tmp_path: Path) -> None:
    """New and empty ones, and with `resume` any; nothing in a file's place."""
    assert check_output(tmp_path / "a" / "b", False).is_dir()
    check_output(tmp_path / "a" / "b", False)
    with pytest.raises(BadInputError, match="already holds b; pass --resume"):
        check_output(tmp_path / "a", False)
    check_output(tmp_path / "a", True)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="can't be made"):
        check_output(tmp_path / "file", False)


def test_processes_that_never_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started from outside to find all answers there, the first alone goes on."""
    assert first_alone()
    monkeypatch.setenv("RANK", "1")
    assert not first_alone()


def test_samples_without_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are shown without; tables stand there even where a picture's file is gone."""
    result = made_up()
    result = replace(result, examples=[{**one, "picture": 0} for one in result.examples])
    keep(result, tmp_path / "a", SampleDataModule([Sample("s", None, "what ?")]))
    assert 'alt="sample' not in (tmp_path / "a" / "report.html").read_text()
    with pytest.raises(BadInputError, match="does not exist"):
        keep(result, tmp_path / "b", SampleDataModule([Sample("s", "nowhere.png", "what ?")]))
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["front.csv", "settings.csv", "sweep.json"]
    assert capsys.readouterr().out.count("Pareto front") == 2
