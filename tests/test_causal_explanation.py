"""Nodes, explanations and their verification, on attention and models whose causes are planted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analyses.causal_explanation import Explanation, Nodes, choose_nodes, explain, tiers_of, verify
from hooked_mm.errors import BadInputError


def planted(cause: int, count: int = 10, sink: float = 0.1) -> Tensor:
    """Causal attention in which every token looks at itself, but the last takes most from one token."""
    rows = torch.eye(count, dtype=torch.float64)
    rows[-1] = 0
    rows[-1, cause], rows[-1, -1] = 0.8, 0.2
    rows = (1 - sink) * rows
    rows[:, 0] += sink
    return rows


def every_node(rows: Tensor) -> Nodes:
    """All tokens but the sink, the first half of them of an image."""
    count = len(rows)
    return Nodes(
        tuple(range(1, count)), tuple(place < count // 2 for place in range(1, count)), tuple(rows[-1, 1:].tolist())
    )


class Mixer:
    """A model of one layer: the last token mixes values by its attention and says what is largest; masked tokens are
    cut from the attention, the rest grown to sum to 1."""

    def __init__(self, rows: Tensor, decides: int) -> None:
        self.row, self.runs = rows[-1], 0
        self.values = torch.zeros(len(rows), 2, dtype=torch.float64)
        self.values[:, 0] = 0.1
        self.values[decides] = torch.tensor([0.0, 1.0])

    def says(self, masked: Sequence[int]) -> int:
        self.runs += 1
        row = self.row.clone()
        row[list(masked)] = 0
        return int((row / row.sum() @ self.values).argmax())

    def changes(self, nodes: Nodes) -> object:
        base = self.says([])

        def function(sets: Sequence[tuple[int, ...]]) -> list[bool]:
            return [self.says([nodes.positions[node] for node in one]) != base for one in sets]

        return function


@pytest.mark.parametrize("cause", [2, 4, 7])
def test_one_token_that_decides_is_found_and_verified(cause: int) -> None:
    """The explanation names it, masking it changes the prediction, and nothing else is needed."""
    rows = planted(cause)
    nodes = every_node(rows)
    told = explain(rows[1:], nodes, alpha=0.01)
    assert [nodes.positions[node] for node in told.members] == [cause]
    model = Mixer(rows, decides=cause)
    found = verify(told.members, model.changes(nodes), told.is_closed)  # type: ignore[arg-type]
    assert found.verified
    assert found.status == "smallest"
    assert [nodes.positions[node] for node in found.subset] == [cause]
    assert found.tried == 1


def test_a_wrong_explanation_is_not_verified() -> None:
    """Attention says one token, the model listens to another."""
    rows = planted(4)
    rows[-1, 6] = 0.2
    rows[-1, 9] = 0
    nodes = every_node(rows)
    told = explain(rows[1:], nodes, alpha=1e-5)
    assert [nodes.positions[node] for node in told.members] == [4]
    model = Mixer(rows, decides=6)
    model.values[4] = 0
    found = verify(told.members, model.changes(nodes), told.is_closed)  # type: ignore[arg-type]
    assert not found.verified
    assert (found.status, found.subset) == ("none", ())
    assert model.says([6]) != model.says([])


def test_lvlm_interpret_verification_is_not_left_out() -> None:
    """An explanation by itself claims nothing: what is verified was masked in the model, run by run."""
    rows = planted(4)
    nodes = every_node(rows)
    model = Mixer(rows, decides=4)
    changes = model.changes(nodes)
    model.runs = 0
    found = verify([3], changes)  # type: ignore[arg-type]
    assert model.runs == found.tried == 1


def test_lvlm_interpret_alpha_and_threshold_are_passed_through() -> None:
    """Each setting changes what comes out."""
    rows = planted(4)
    rows[-1] = torch.tensor([0.1, 0, 0, 0, 0.3, 0.02, 0, 0, 0, 0.58])
    nodes = every_node(rows)
    assert explain(rows[1:], nodes, alpha=1e-5).members == [3]
    assert explain(rows[1:], nodes, alpha=1e-12).members == []
    assert explain(rows[1:], nodes, alpha=1e-5, samples=20).members == []
    image, text = torch.arange(10) < 5, torch.arange(10) >= 5
    assert choose_nodes(rows[-1], image, text, 9).positions == (0, 4, 5, 9)
    assert choose_nodes(rows[-1], image, text, 9, threshold=0.05).positions == (0, 4, 9)
    assert choose_nodes(rows[-1], image, text, 9, threshold=0.31).positions == (9,)


def test_nodes_are_the_strongest_image_tokens_the_text_behind_and_the_row() -> None:
    """In their order; below the threshold none, of equal ones the first, never t's own future."""
    attention = torch.tensor([0.3, 0.01, 0.2, 0.2, 0.004, 0.2, 0.006, 0.05, 0.03])
    image = torch.tensor([0, 1, 1, 1, 1, 1, 0, 0, 0]).bool()
    text = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]).bool()
    found = choose_nodes(attention, image, text, 7, most_images=2)
    assert found.positions == (2, 3, 6, 7)
    assert found.image == (True, True, False, False)
    assert found.weights == pytest.approx((0.2, 0.2, 0.006, 0.05))
    # LVLM-Interpret takes as many image tokens as there are tokens of any kind above the threshold, weak ones too.
    assert choose_nodes(attention, image, text, 7).positions == (1, 2, 3, 5, 6, 7)
    assert choose_nodes(attention, image, text, 7, most_images=0).positions == (6, 7)
    with pytest.raises(BadInputError, match="threshold=-1"):
        choose_nodes(attention, image, text, 7, threshold=-1)


def test_tokens_that_see_each_other_have_no_order() -> None:
    """A block of them is one tier; causal attention gives one tier each."""
    sees = torch.ones(6, 6).tril()
    assert tiers_of(sees) == [0, 1, 2, 3, 4, 5]
    sees[1:4, 1:4] = 1
    assert tiers_of(sees) == [0, 1, 1, 1, 2, 3]
    # Through a third one.
    sees = torch.eye(4)
    sees[0, 1] = sees[1, 2] = 1
    assert tiers_of(sees) == [0, 0, 0, 1]
    rows = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    told = explain(rows / rows.sum(1, keepdim=True), Nodes(tuple(range(5)), (True,) * 5, (0.2,) * 5), alpha=0.5)
    assert told.tiers == (0,) * 5


def test_an_explanation_is_the_pds_tree_nearest_first() -> None:
    """By steps from t, then by t's attention; deeper only where asked."""
    raised = torch.randn(14, 14, generator=torch.Generator().manual_seed(4)).mul(2).exp().tril()
    rows = raised / raised.sum(1, keepdim=True)
    nodes = Nodes(tuple(range(14)), (True,) * 13 + (False,), tuple(rows[-1].tolist()))
    told = explain(rows, nodes, alpha=0.01)
    steps = [len(told.paths[node]) - 1 for node in told.members]
    assert steps == sorted(steps)
    assert max(steps) > 1
    first = [node for node in told.members if len(told.paths[node]) == 2]
    assert first == sorted(first, key=lambda node: -nodes.weights[node])
    assert set(first) == set(explain(rows, nodes, alpha=0.01, depth=1).members)
    assert set(first) == {a if b == 13 else b for a, b, _ in told.pag.edges() if 13 in (a, b)}
    assert all(told.paths[node][0] == told.root == 13 for node in told.members)
    with pytest.raises(BadInputError, match="13 rows for 14 nodes"):
        explain(rows[1:], nodes)


def by_trial(members: Sequence[int], needed: set[frozenset[int]]) -> set[frozenset[int]]:
    """All subsets of the smallest size that contain one of the sets needed."""
    for size in range(1, len(members) + 1):
        found = {frozenset(one) for one in combinations(members, size) if any(own <= set(one) for own in needed)}
        if found:
            return found
    return set()


@given(st.integers(0, 100_000), st.integers(1, 7), st.integers(1, 5))
def test_the_smallest_subset_of_all(seed: int, count: int, at_once: int) -> None:
    """Whatever sets change the prediction: with budget for all, the smallest are found, and all of that size."""
    generator = torch.Generator().manual_seed(seed)
    members = torch.randperm(20, generator=generator)[:count].tolist()
    needed = {
        frozenset(torch.tensor(members)[torch.rand(count, generator=generator) < 0.5].tolist()) - {None}
        for _ in range(2)
    } - {frozenset()}
    found = verify(
        members, lambda sets: [any(own <= set(one) for own in needed) for one in sets], budget=1000, at_once=at_once
    )
    expected = by_trial(members, needed)
    assert ({frozenset(found.subset), *map(frozenset, found.others)} if found.verified else set()) == expected
    assert found.status == ("smallest" if expected else "none")


@given(st.integers(0, 100_000), st.integers(5, 40))
def test_budgets_hold_and_what_is_found_without_all_trials_is_irreducible(seed: int, budget: int) -> None:
    """Never more runs than allowed; what is claimed is so."""
    generator = torch.Generator().manual_seed(seed)
    needed = set(torch.randperm(12, generator=generator)[:4].tolist())
    runs: list[int] = []

    def changes(sets: Sequence[tuple[int, ...]]) -> list[bool]:
        runs.append(len(sets))
        return [needed <= set(one) for one in sets]

    found = verify(range(12), changes, budget=budget, at_once=5)
    assert found.tried == sum(runs) <= budget
    if found.verified:
        assert needed <= set(found.subset)
    if found.status == "irreducible":
        assert set(found.subset) == needed
    assert found.status in ("irreducible", "unknown")


def test_a_token_that_is_needed_only_beside_another_is_given_back_with_it() -> None:
    """Token 0 undoes the change unless 7 goes, too: 7 is needed as long as 0 is among them."""

    def changes(sets: Sequence[tuple[int, ...]]) -> list[bool]:
        return [{1, 2, 4, 5, 6} <= set(one) and not (0 in one and 7 not in one) for one in sets]

    found = verify(range(8), changes, budget=60, at_once=4)
    assert (found.status, set(found.subset)) == ("irreducible", {1, 2, 4, 5, 6})
    assert verify(range(8), changes, budget=40, at_once=4).status == "unknown"


def test_a_large_cause_is_found_within_the_default_budget() -> None:
    """Nine of twenty tokens together: no search by size would come so far."""
    needed = set(range(3, 12))
    found = verify(range(20), lambda sets: [needed <= set(one) for one in sets])
    assert found.status == "irreducible"
    assert set(found.subset) == needed
    assert found.size == 1


def test_only_closed_subsets_count() -> None:
    """A token that t reaches only through another is not masked without it."""
    rows = planted(4)
    nodes = every_node(rows)
    told = explain(rows[1:], nodes, alpha=0.01)
    chained = Explanation(nodes, told.tiers, told.learned, {3: (8, 3)})
    assert chained.is_closed((3,))
    assert not chained.is_closed((2,))
    tried: list[tuple[int, ...]] = []

    def never(sets: Sequence[tuple[int, ...]]) -> list[bool]:
        tried.extend(sets)
        return [False] * len(sets)

    found = verify([1, 2], never, lambda one: 1 in one)
    assert tried == [(1,), (1, 2)]
    assert found.status == "none"


def test_nothing_to_mask_and_no_budget() -> None:
    """An empty explanation is not verified; a budget of nothing is refused."""
    assert verify([], lambda sets: [True] * len(sets)).status == "none"
    with pytest.raises(BadInputError, match="budget=0"):
        verify([1], lambda sets: [True], budget=0)
