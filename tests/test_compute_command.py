"""`hooked-mm steer compute`: options and YAML make the vectors they describe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.steering_vector import SteeringVector, load_vectors, save_vectors
from hooked_mm.store import ActivationStore
from steering.compute_command import build_parser, main, table
from steering.directions import KINDS, coarse
from steering.steer_command import main as steer
from tests.steering_stores import DEEP, SHALLOW, questions_store


@pytest.fixture(scope="session")
def questions(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Questions about scenes, at the last token of the prompt."""
    return questions_store(llava, tmp_path_factory)


@pytest.fixture
def options(questions: ActivationStore, tmp_path: Path) -> list[str]:
    """What every run needs."""
    return ["--store", str(questions.path), "--output", str(tmp_path / "v")]


PAIR = ["--source", "{answer: yes}", "--target", "{answer: no}"]


def test_several_kinds_at_one_hook(
    options: list[str], questions: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors with controls on disk; a table with their norms, rows and cosines; a second run is refused."""
    chosen = [*options, *PAIR, "--hook", DEEP, "--kind", "[coarse, probe]", "--controls", "[7]"]
    steer(["compute", *chosen])
    printed = capsys.readouterr().out
    found = load_vectors(tmp_path / "v")
    assert [vector.kind for vector in found] == ["coarse", "random", "shuffled", "probe", "random", "shuffled"]
    counts = {answer: questions.samples.column("answer").to_pylist().count(answer) for answer in ("yes", "no")}
    values = questions.activations(DEEP)
    answers = questions.samples.column("answer").to_pylist()
    rows = [values[[n for n, answer in enumerate(answers) if answer == wanted]] for wanted in ("yes", "no")]
    torch.testing.assert_close(found[0].values, coarse(*rows))
    first = printed.splitlines()[1]
    assert first.split("  ")[0] == "0"
    assert "yes -> no" in first
    assert f"{found[0].norm:.4g}" in first
    assert first.endswith(f"{counts['yes']} -> {counts['no']}")
    cosine = torch.nn.functional.cosine_similarity(found[0].values, found[3].values, dim=0)
    (row,) = [line for line in printed.splitlines() if line.startswith("    0")]
    assert row.split()[1:5] == ["1.00", *(row.split()[2:4]), f"{cosine:.2f}"]
    with pytest.raises(BadInputError, match="already holds steering vectors"):
        main(chosen)


def test_all_hooks_and_globs(options: list[str], tmp_path: Path) -> None:
    """All of the store's unless told; unknown ones are refused before anything is written."""
    main([*options, *PAIR, "--controls", "[]"])
    assert [vector.hook for vector in load_vectors(tmp_path / "v")] == [SHALLOW, DEEP]
    options[-1] = str(tmp_path / "w")
    main([*options, *PAIR, "--controls", "[]", "--hook", "blocks.3.*"])
    assert [vector.hook for vector in load_vectors(tmp_path / "w")] == [DEEP]
    options[-1] = str(tmp_path / "x")
    with pytest.raises(UnknownHookError):
        main([*options, *PAIR, "--hook", "blocks.9.*"])
    assert not (tmp_path / "x").exists()


def test_yaml(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file says the same, and what `--print_config` writes is one."""
    with pytest.raises(SystemExit):
        main([*options, "--source", "random", "--target", "{answer: red}", "--k", "2", "--print_config"])
    (tmp_path / "compute.yaml").write_text(capsys.readouterr().out)
    main(["-c", str(tmp_path / "compute.yaml"), "--hook", DEEP, "--kind", "fine", "--controls", "[]"])
    found = load_vectors(tmp_path / "v")
    assert [vector.name for vector in found] == [f"random -> red: {i} -> {j}" for i in range(2) for j in range(2)]
    assert found[0].made_from["target"]["where"] == {"answer": "red"}


def test_dictionaries_and_shifts(
    options: list[str], questions: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Concepts of a folder, and shifts of another, in one run."""
    fitted = KMeans(3).fit(questions.activations(DEEP))
    ConceptDictionary(fitted, DEEP, questions.made_by).save(tmp_path / "d")
    model = questions.made_by["model"]
    save_vectors([SteeringVector(torch.ones(128), DEEP, "shift", "c", model=model)], tmp_path / "shifts")
    more = ["--kind", "[concept, shift]", "--dictionary", str(tmp_path / "d"), "--shifts", str(tmp_path / "shifts")]
    main([*options, *more, "--hook", DEEP, "--concepts", "[1]", "--orthogonal"])
    found = load_vectors(tmp_path / "v")
    assert [vector.kind for vector in found] == ["concept", "random", "shift", "random"]
    assert torch.equal(found[0].values, fitted.components_[1])
    assert abs(found[1].made_from["cosine"]) < 1e-5
    options[-1] = str(tmp_path / "w")
    for wrong in (["--kind", "shift"], [*PAIR, "--shifts", str(tmp_path / "shifts")]):
        with pytest.raises(BadInputError, match="given together"):
            main([*options, *wrong])


def test_many_vectors_print_a_range() -> None:
    """A matrix of a hundred columns helps nobody, and a single vector has nobody to be compared with."""
    vectors = [SteeringVector(torch.eye(20)[n] + 0.1, "h", "fine", str(n)) for n in range(20)]
    told = table(vectors)
    # (2 * .1 + 20 * .01) / (1.1^2 + 19 * .01)
    assert "cosines at h: 0.29 to 0.29 between 20 vectors" in told
    controls = [SteeringVector(torch.eye(20)[n], "h", "random", str(n)) for n in range(14)]
    assert "a single vector with 14 controls" in table([vectors[0], *controls])


def test_single_rows_are_told(
    options: list[str], questions: ActivationStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many vectors lack a shuffled control."""
    ids = questions.samples.column("sample").to_pylist()
    source, target = f"{{sample: [{ids[0]}, {ids[1]}]}}", f"{{sample: [{ids[5]}, {ids[6]}]}}"
    main([*options, "--source", source, "--target", target, "--kind", "fine", "--k", "2", "--hook", DEEP])
    assert "4 vectors from or to a concept of a single row have no shuffled control" in capsys.readouterr().out


def test_every_kind_is_offered(options: list[str]) -> None:
    """And no other."""
    for kind in KINDS:
        assert build_parser().parse_args([*options, "--kind", kind]).kind == kind
    with pytest.raises(SystemExit):
        build_parser().parse_args([*options, "--kind", "coars"])


def test_gates_beside_vectors(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One per hook, and what it lets through is told."""
    main([*options, *PAIR, "--hook", f"[{SHALLOW}, {DEEP}]", "--controls", "[]", "--gate", "{answer: yes}"])
    found = load_vectors(tmp_path / "v")
    assert [(vector.kind, vector.hook) for vector in found[2:]] == [("gate", SHALLOW), ("gate", DEEP)]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gate of yes at")]
    assert len(told) == 2
    assert f"{found[3].made_from['opens'][0]:.1%} of its own" in told[1]
