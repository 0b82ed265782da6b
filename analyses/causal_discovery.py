"""The partial ancestral graph of nodes whose order is known, from decisions on conditional independence.

Ordered iterative causal discovery: Rohekar et al. 2021 (arXiv 2111.04095), with an order as Rohekar et al. 2024
(arXiv 2412.07446) give it. From a complete graph, for sets of size 0, 1, 2, ...: an edge goes if its ends are
independent given some set of that size which is

1. closed within as many steps around the later end (`possible_d_sep`; around either end if neither is later), and
2. made of possible ancestors of the two ends (at size 1, of neighbours that are not later);

then the ends are oriented anew (`pag_orientation`). A node never causes one of an earlier tier, so the set that
separates two nodes lies around the later. It ends when no edge has a set of the next size left. Cut short, at a size or
at a number of tests, the graph says what sets of the sizes done say (ICD is *anytime*), and R8 to R10 are left out.

Sets of one size are all taken from the graph as it was before that size (as in PC-stable, Colombo and Maathuis 2014),
so the result does not depend on the order in which edges are looked at. A test that is refused (None: see
`partial_correlation`) removes nothing, and is counted.

Why not a library: causal-learn, the maintained one, takes tiers, but writes an edge between tiers as `a --> b` where
`a o-> b` is meant, which denies common causes; its FCI wants data of n rows, and its R5, R9 and R10 miss some tails and
make up others. With the order as arrowheads it is the reference in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from analyses.pag_orientation import Pag, oriented
from analyses.possible_d_sep import closed_sets, pds_paths
from hooked_mm.errors import BadInputError

Independent = Callable[[int, int, tuple[int, ...]], bool | None]
"""Whether two nodes are independent given a set; None if that can't be told."""
MOST_CONDITIONS, MOST_TESTS = 4, 50_000


@dataclass(frozen=True)
class Learned:
    """A graph and what it cost.

    Attributes:
        pag: The graph.
        separators: Pair -> the set that separated it.
        tests: How many tests were made, by the size of the set: (sizes,).
        refused: How many of them could not be told.
        complete: Whether the search came to its end; otherwise a limit cut it short.
    """

    pag: Pag
    separators: dict[frozenset[int], frozenset[int]]
    tests: tuple[int, ...]
    refused: int
    complete: bool


@dataclass
class _Search:
    """A run in progress."""

    independent: Independent
    tiers: Sequence[int]
    left: int
    tests: list[int]
    refused: int = 0
    ends: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    above: dict[int, Bool[np.ndarray, "nodes nodes"]] = field(default_factory=dict)

    def around(self, pag: Pag, root: int, size: int) -> list[int]:
        """The ends of PDS paths from a root; found once, as the graph is the same for all sets of a size."""
        if (size, root) not in self.ends:
            self.ends[size, root] = list(pds_paths(pag, root, size))
        return self.ends[size, root]

    def sets(self, pag: Pag, a: int, b: int, size: int) -> Iterator[tuple[int, ...]]:
        """What may separate two nodes, each set once."""
        roots = [max((a, b), key=lambda node: self.tiers[node])] if self.tiers[a] != self.tiers[b] else [b, a]
        # As in the reference: while ends rest on pairs alone, every neighbour that is not later may separate.
        last = max(self.tiers[a], self.tiers[b])
        if size not in self.above:
            self.above[size] = pag.possible_ancestors()
        above = set(np.flatnonzero(self.above[size][:, [a, b]].any(axis=1)).tolist())
        likely = {node for node, tier in enumerate(self.tiers) if (tier <= last if size == 1 else node in above)}
        seen: set[frozenset[int]] = set()
        for root in roots:
            apart = likely - {a, b}
            pool = [node for node in self.around(pag, root, size) if node in apart]
            for members in closed_sets(pag, root, pool, size, size):
                if len(roots) == 1 or frozenset(members) not in seen:
                    seen.add(frozenset(members))
                    yield members

    def separator(self, pag: Pag, a: int, b: int, size: int) -> tuple[frozenset[int] | None, bool]:
        """The first set that separates two nodes, and whether there was any to test.

        Raises:
            _Spent: If no more tests may be made.
        """
        tried = False
        for members in [()] if not size else self.sets(pag, a, b, size):
            tried = True
            if not self.left:
                raise _Spent
            self.left -= 1
            self.tests[size] += 1
            told = self.independent(a, b, members)
            self.refused += told is None
            if told:
                return frozenset(members), True
        return None, tried


class _Spent(Exception):
    """The tests are used up."""


def learn(
    count: int,
    independent: Independent,
    tiers: Sequence[int] | None = None,
    *,
    most_conditions: int | None = MOST_CONDITIONS,
    most_tests: int = MOST_TESTS,
) -> Learned:
    """The partial ancestral graph of nodes 0, 1, ..., count - 1.

    Args:
        count: How many nodes.
        independent: The test, symmetric in its first two arguments.
        tiers: When each node comes: one of a later tier never causes one of an earlier. Unless given, each node is a
            tier of its own, in the order of its number; all the same: no order is known.
        most_conditions: The largest set that is tested; None for no limit.
        most_tests: How many tests are made at most.

    Raises:
        BadInputError: If there is no node, tiers are not one per node, or a limit is negative.
    """
    when = list(range(count)) if tiers is None else [int(tier) for tier in tiers]
    if count < 1 or len(when) != count:
        raise BadInputError(f"{len(when)} tiers for {count} nodes; give one per node, and at least one node")
    if most_tests < 0 or (most_conditions is not None and most_conditions < 0):
        raise BadInputError(f"most_conditions={most_conditions}, most_tests={most_tests}; neither can be negative")
    adjacent = ~np.eye(count, dtype=bool)
    separators: dict[frozenset[int], frozenset[int]] = {}
    search = _Search(independent, when, most_tests, [])
    pag, complete = oriented(adjacent, separators, when, tails=False), False
    last = max(0, count - 2)
    try:
        for size in range(last + 1):
            if most_conditions is not None and size > most_conditions:
                break
            search.tests.append(0)
            tried = False
            for a, b, _ in pag.edges():
                separator, any_set = search.separator(pag, a, b, size)
                tried |= any_set
                if separator is not None:
                    separators[frozenset((a, b))] = separator
                    adjacent[a, b] = adjacent[b, a] = False
            if complete := not tried or size == last:
                break
            pag = oriented(adjacent, separators, when, tails=False)
    except _Spent:
        pass
    return Learned(
        oriented(adjacent, separators, when, tails=complete), separators, tuple(search.tests), search.refused, complete
    )
