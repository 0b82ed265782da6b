"""PDS paths and closed sets, against every simple path of small graphs."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyses.pag_orientation import Pag
from analyses.possible_d_sep import closed_sets, is_closed, pds_paths


def random_pag(seed: int, count: int = 6) -> Pag:
    """Any marks on any edges."""
    rng = np.random.default_rng(seed)
    joined = np.triu(rng.random((count, count)) < rng.uniform(0.3, 0.9), 1)
    return Pag(np.where(joined | joined.T, rng.integers(1, 4, (count, count)), 0).astype(np.int8))


def is_pds(pag: Pag, path: tuple[int, ...]) -> bool:
    """By the definition."""
    if not all(pag.marks[a, b] for a, b in pairwise(path)):
        return False
    return all(
        pag.marks[a, c] or (pag.marks[a, b] == 2 and pag.marks[c, b] == 2)
        for a, b, c in zip(path, path[1:], path[2:], strict=False)
    )


def all_pds(pag: Pag, root: int, nodes: tuple[int, ...], depth: int) -> list[tuple[int, ...]]:
    """Every PDS path from the root through these nodes."""
    paths = [(root, *inner) for size in range(1, depth + 1) for inner in permutations(nodes, size)]
    return [path for path in paths if is_pds(pag, path)]


@given(st.integers(0, 100_000), st.integers(1, 5))
def test_shortest_paths_of_the_definition(seed: int, depth: int) -> None:
    """To the same nodes, as long as they must be, each of them one."""
    pag = random_pag(seed)
    others = tuple(range(1, 6))
    shortest: dict[int, int] = {}
    for path in all_pds(pag, 0, others, depth):
        shortest.setdefault(path[-1], len(path))
    found = pds_paths(pag, 0, depth)
    # A shortest path to an edge may visit a node twice where a longer one does not; such are rare, and never too short.
    assert set(found) <= set(shortest)
    for node, path in found.items():
        assert is_pds(pag, path)
        assert path[0] == 0
        assert path[-1] == node
        assert len(path) == shortest[node]
    assert [len(path) for path in found.values()] == sorted(len(path) for path in found.values())


@given(st.integers(0, 100_000), st.integers(1, 4))
def test_closed_sets_of_the_definition(seed: int, size: int) -> None:
    """Each member at the end of a PDS path through members."""
    pag = random_pag(seed)
    pool = tuple(range(1, 6))
    expected = [
        members
        for members in combinations(pool, size)
        if {path[-1] for path in all_pds(pag, 0, members, size)} == set(members)
    ]
    assert list(closed_sets(pag, 0, pool, size, size)) == expected


def test_a_chain_is_no_pds_path_but_colliders_and_triangles_are() -> None:
    """0 - 1 - 2 by hand."""
    marks = np.zeros((3, 3), dtype=np.int8)
    marks[0, 1] = marks[1, 0] = marks[1, 2] = marks[2, 1] = 1
    assert set(pds_paths(Pag(marks.copy()), 0)) == {1}
    marks[0, 1] = marks[2, 1] = 2
    assert pds_paths(Pag(marks.copy()), 0) == {1: (0, 1), 2: (0, 1, 2)}
    assert set(pds_paths(Pag(marks.copy()), 0, depth=1)) == {1}
    assert not is_closed(Pag(marks.copy()), 0, (2,))
    assert is_closed(Pag(marks.copy()), 0, (1, 2))
    marks[0, 1] = marks[2, 1] = marks[0, 2] = marks[2, 0] = 1
    assert pds_paths(Pag(marks), 0)[2] == (0, 2)


@pytest.mark.parametrize("within", [(), (1,), (2, 3)])
def test_paths_keep_within_what_is_allowed(within: tuple[int, ...]) -> None:
    """Nothing else is visited."""
    pag = Pag(np.ones((5, 5), dtype=np.int8) - np.eye(5, dtype=np.int8))
    assert set(pds_paths(pag, 0, within=within)) == set(within)
