"""Vectors of a store are the formulas on the rows that conditions name, and know where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from hooked_mm.errors import BadInputError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.steering_vector import SteeringVector, load_vectors, save_vectors
from hooked_mm.store import ActivationStore
from steering.controls import is_control
from steering.directions import coarse, principal, probe
from steering.gate import Gate, learn_gate
from steering.vectors_of_store import Recipe, aligned, gates_of_store, kept_shifts, vectors_of_store
from tests.steering_stores import DEEP, SHALLOW, questions_store

YES, NO = {"answer": True}, {"answer": False}


@pytest.fixture(scope="session")
def questions(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Questions about scenes, at the last token of the prompt."""
    return questions_store(llava, tmp_path_factory)


def rows(store: ActivationStore, hook: str, **columns: str) -> torch.Tensor:
    """Rows of samples by reading the table in a loop."""
    table = store.samples.to_pylist()
    kept = [n for n, sample in enumerate(table) if all(sample[name] == value for name, value in columns.items())]
    assert store.rows.column("sample").to_pylist() == [sample["sample"] for sample in table]
    return store.activations(hook)[kept]


def test_by_hand_at_every_hook(questions: ActivationStore) -> None:
    """Hook by hook, kind by kind, the formulas on the rows of the two answers; controls follow their vectors."""
    found = vectors_of_store(questions, questions.hooks, ["coarse", "probe"], YES, NO, recipe=Recipe(controls=(1, 2)))
    order = [(SHALLOW, "coarse"), (SHALLOW, "probe"), (DEEP, "coarse"), (DEEP, "probe")]
    kinds = ["random", "shuffled", "random", "shuffled"]
    assert [(v.hook, v.kind) for v in found] == [pair for h, k in order for pair in ((h, k), *((h, c) for c in kinds))]
    for number, (hook, kind) in enumerate(order):
        source, target = (rows(questions, hook, answer=answer) for answer in ("yes", "no"))
        made = {"coarse": coarse, "probe": probe}[kind](source, target)
        torch.testing.assert_close(found[5 * number].values, made)
        for control in found[5 * number + 1 : 5 * number + 5]:
            assert is_control(control)
            assert control.norm == pytest.approx(float(made.norm()), rel=1e-5)
            assert control.made_from["control_of"]["kind"] == kind


def test_provenance(questions: ActivationStore, llava: HookedMM, tmp_path: Path) -> None:
    """Model, positions, conditions, counts, seed and versions come back from disk; the model accepts the vector."""
    where = {"question_type": ["colour", "shape"]}
    (made,) = vectors_of_store(
        questions, [DEEP], ["coarse"], "random", {"answer": "red"}, where, Recipe(controls=(), seed=4)
    )
    found = SteeringVector.load(made.save(tmp_path))
    about = found.made_from
    assert (found.name, found.kind, found.hook) == ("random -> red", "coarse", DEEP)
    assert found.positions == {"LastPrompt": {"selector": "LastPrompt"}}
    assert (found.model, found.revision, found.adapter) == (questions.made_by["model"], None, None)
    count = len(rows(questions, DEEP, answer="red", question_type="colour"))
    assert about["target"] == {"where": {"answer": "red"}, "rows": count, "samples": count}
    assert about["source"] == {"where": "random", "rows": count, "samples": count}
    assert about["where"] == where
    assert about["seed"] == 4
    assert about["data"]["task"] == "question"
    assert set(about["versions"]) == {"hooked-mm", "torch", "scikit-learn"}
    assert about["store_versions"]["transformers"]
    assert about["rows_norm"] > 1
    assert found.intervention(model=llava).point == DEEP


def test_random_and_all_sources_include_the_target(questions: ActivationStore) -> None:
    """All rows are the mean of everything; how many rows are in both sets is told."""
    (made,) = vectors_of_store(questions, [DEEP], ["coarse"], "all", NO, recipe=Recipe(controls=()))
    mean = questions.activations(DEEP).double().mean(0)
    target = rows(questions, DEEP, answer="no")
    torch.testing.assert_close(made.values, (target.double().mean(0) - mean).float())
    assert made.made_from["in_both"] == len(target)


def test_fine_vectors_move_between_clusters(questions: ActivationStore) -> None:
    """All k * k pairs of centroids; together, weighted by their rows, they are the coarse vector."""
    recipe = Recipe(k=3, seed=2)
    found = vectors_of_store(questions, [DEEP], ["fine"], YES, NO, recipe=recipe)
    true = [vector for vector in found if not is_control(vector)]
    assert [vector.made_from["pair"] for vector in true] == [[i, j] for i in range(3) for j in range(3)]
    source, target = (rows(questions, DEEP, answer=answer) for answer in ("yes", "no"))
    one, other = (KMeans(3, random_state=2).fit(part).cluster_centers_ for part in (source, target))
    for vector in true:
        i, j = vector.made_from["pair"]
        torch.testing.assert_close(vector.values, other[j] - one[i], rtol=1e-3, atol=1e-3)
    counts = [vector.made_from["pair_rows"] for vector in true]
    assert sum(count for count, _ in counts[::3]) == len(source)
    assert sum(count for _, count in counts[:3]) == len(target)
    shuffled = [vector for vector in found if vector.kind == "shuffled"]
    assert len(shuffled) == sum(min(pair) > 1 for pair in counts)
    # The pairs' mean, by how many rows they are between, is the coarse vector.
    weights = torch.tensor([float(a * b) for a, b in counts])
    mean = (weights[:, None] * torch.stack([vector.values for vector in true])).sum(0) / weights.sum()
    torch.testing.assert_close(mean, coarse(source, target), rtol=1e-3, atol=1e-3)


def test_fine_within_one_set(questions: ActivationStore) -> None:
    """Without a target, pairs are of two different concepts of the source."""
    colours = {"question_type": "colour"}
    found = vectors_of_store(questions, [DEEP], ["fine"], colours, recipe=Recipe(k=3, controls=()))
    assert [vector.made_from["pair"] for vector in found] == [[i, j] for i in range(3) for j in range(3) if i != j]
    assert found[0].name == "colour: 0 -> 1"
    torch.testing.assert_close(found[0].values, -found[2].values)


def test_a_single_row_has_no_shuffled_control(questions: ActivationStore) -> None:
    """It is told, not left out in silence."""
    ids = questions.samples.column("sample").to_pylist()
    found = vectors_of_store(questions, [DEEP], ["fine"], {"sample": ids[:2]}, {"sample": ids[5:9]}, recipe=Recipe(k=2))
    assert {vector.kind for vector in found} == {"fine", "random"}
    assert all(vector.made_from["no_shuffled"] for vector in found)


def test_a_dictionary_at_hand(questions: ActivationStore) -> None:
    """Its concepts, and the means of either set's rows that belong to them; of its own hook and model alone."""
    fitted = NonNegativeDictionary(4, random_state=0).fit(questions.activations(DEEP))
    dictionary = ConceptDictionary(fitted, DEEP, questions.made_by)
    recipe = Recipe(dictionary=dictionary, concepts=[2, 0], controls=(0,))
    found = vectors_of_store(questions, [DEEP], ["concept", "fine"], YES, NO, recipe=recipe)
    concepts = [vector for vector in found if vector.kind == "concept"]
    assert [vector.name for vector in concepts] == ["concept 2", "concept 0"]
    assert torch.equal(concepts[0].values, fitted.components_[2])
    assert found[1].kind == "random"
    source, target = (rows(questions, DEEP, answer=answer) for answer in ("yes", "no"))
    for vector in (vector for vector in found if vector.kind == "fine"):
        i, j = vector.made_from["pair"]
        own, to = (part[fitted.transform(part).argmax(1) == n] for part, n in ((source, i), (target, j)))
        torch.testing.assert_close(vector.values, coarse(own, to))
    with pytest.raises(BadInputError, match="give its own hook alone"):
        vectors_of_store(questions, questions.hooks, ["fine"], YES, NO, recipe=recipe)
    foreign = Recipe(dictionary=ConceptDictionary(fitted, DEEP, {"model": "x/other"}))
    with pytest.raises(BadInputError, match="the dictionary is of the model 'x/other'"):
        vectors_of_store(questions, [DEEP], ["fine"], YES, NO, recipe=foreign)


def test_principal_of_pairs(tmp_path: Path) -> None:
    """Pairs by a column find a direction that differences of any two rows hide."""
    rng = np.random.default_rng(0)
    base, d = 30 * rng.standard_normal((40, 6)), np.eye(6)[0]
    values = np.concatenate([base, base + d + 0.05 * rng.standard_normal((40, 6))])
    samples = [{"sample": f"s{n}", "sample_number": n, "picture": n % 40, "styled": n >= 40} for n in range(80)]
    table: list[dict[str, Any]] = [{"sample": f"s{n}", "selector": "last"} for n in range(80)]
    store = ActivationStore.from_arrays(
        tmp_path / "s", {"h": torch.as_tensor(values, dtype=torch.float32)}, table, samples, {}
    )
    found = {}
    for by in ("picture", None):
        recipe = Recipe(pair_by=by, controls=(0,))
        vectors = vectors_of_store(store, ["h"], ["principal"], {"styled": False}, {"styled": True}, recipe=recipe)
        assert [vector.kind for vector in vectors] == ["principal", "random", "shuffled"]
        assert vectors[0].made_from["pairs"] == 40
        found[by] = vectors[0].values.double().numpy()
    by_hand = principal(torch.as_tensor(values[40:] - values[:40]))
    np.testing.assert_allclose(found["picture"], by_hand.numpy(), atol=1e-3)
    assert found["picture"] @ d / np.linalg.norm(found["picture"]) > 0.99
    assert abs(found[None] @ d) / np.linalg.norm(found[None]) < 0.9
    torch.testing.assert_close(
        aligned(torch.zeros(3, 6), torch.as_tensor(values[:2])), principal(torch.as_tensor(values[:2]))
    )


def test_kept_shifts(questions: ActivationStore, tmp_path: Path) -> None:
    """What `hooked-mm shift` kept passes as it is, with random controls; another model's is refused."""
    model = questions.made_by["model"]
    kept = [
        SteeringVector(torch.randn(128), DEEP, "shift", f"c{n}", model=model, made_from={"rows": n}) for n in (3, 4)
    ]
    save_vectors(kept, tmp_path / "study" / "vectors")
    for folder in (tmp_path / "study", tmp_path / "study" / "vectors"):
        found = kept_shifts(folder, questions)
        assert [vector.kind for vector in found] == ["shift", "random"] * 2
        assert torch.equal(found[2].values, kept[1].values)
        assert found[2].made_from == {"rows": 4}
    save_vectors([SteeringVector(torch.ones(2), "h", "shift", model="x/other")], tmp_path / "other")
    with pytest.raises(BadInputError, match="of the model 'x/other'"):
        kept_shifts(tmp_path / "other", questions)
    assert len(kept_shifts(tmp_path / "other", recipe=Recipe(controls=()))) == 1
    save_vectors([SteeringVector(torch.ones(2), "h", "coarse")], tmp_path / "coarse")
    assert load_vectors(tmp_path / "coarse")
    with pytest.raises(BadInputError, match="no shift vectors"):
        kept_shifts(tmp_path / "coarse")


def test_refusals(questions: ActivationStore) -> None:
    """Kinds that there are not, targets that are missing, hooks that the store does not hold."""
    with pytest.raises(BadInputError, match="'coarse' leads from source to target"):
        vectors_of_store(questions, [DEEP], ["coarse"], YES)
    with pytest.raises(BadInputError, match="no kind of vectors of rows 'coars'; nearest: coarse"):
        vectors_of_store(questions, [DEEP], ["coars"], YES, NO)
    with pytest.raises(BadInputError, match="no kinds"):
        vectors_of_store(questions, [DEEP], [], YES, NO)
    with pytest.raises(UnknownHookError, match="does not hold"):
        vectors_of_store(questions, ["blocks.1.hook_resid_post"], ["coarse"], YES, NO)
    with pytest.raises(BadInputError, match="k=0"):
        vectors_of_store(questions, [DEEP], ["fine"], YES, NO, recipe=Recipe(k=0))
    with pytest.raises(BadInputError, match="no row meets"):
        vectors_of_store(questions, [DEEP], ["coarse"], YES, NO, {"question_type": "colour"})


def test_gates_of_a_store_know_their_rows(questions: ActivationStore) -> None:
    """Per hook one that opens for the rows named and no others; as `learn_gate` on rows chosen by a loop."""
    inside = {"answer": True, "question_type": ["is there a shape", "is there a pair", "is there a colour"]}
    found = gates_of_store(questions, [SHALLOW, DEEP], inside, leak=0.02)
    table = questions.samples.to_pylist()
    opens = torch.tensor([sample["answer"] == "yes" for sample in table])
    for vector, hook in zip(found, (SHALLOW, DEEP), strict=True):
        gate = Gate.of_vector(vector)
        values = questions.activations(hook)
        expected = learn_gate(values[opens], values[~opens], hook, "g", leak=0.02)
        torch.testing.assert_close(gate.condition.direction, expected.condition.direction)
        assert gate.condition.threshold == pytest.approx(expected.condition.threshold)
        assert vector.model == questions.made_by["model"]
        assert vector.name == "gate of yes, ['is there a shape', 'is there a pair', 'is there a colour']"
    with pytest.raises(BadInputError, match="no row meets"):
        gates_of_store(questions, [DEEP], {"answer": "maybe"})


def test_gates_of_other_positions_are_refused(tmp_path: Path) -> None:
    """They would be asked at a position that they were not learnt at."""
    samples = [{"sample": str(number), "answer": "yes" if number % 2 else "no"} for number in range(8)]
    rows = [
        {"sample": str(n), "position": 1, "modality": "text", "role": "answer", "word": None, "selector": "MeanOver"}
        for n in range(8)
    ]
    made_by = {"model": "m", "selectors": {"MeanOver": {"selector": "MeanOver"}}}
    store = ActivationStore.from_arrays(tmp_path / "s", {DEEP: torch.randn(8, 4)}, rows, samples, made_by)
    with pytest.raises(BadInputError, match="last prompt position"):
        gates_of_store(store, [DEEP], {"answer": "yes"})
