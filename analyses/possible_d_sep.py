"""Which nodes may be needed to separate a node from others: those at the end of a PDS path (possible d-separation).

A path <x, ..., z> of a partial ancestral graph is a PDS path if every node b between two others a, c of it is a
collider (a *-> b <-* c) or makes a triangle with them (a and c are adjacent). Those within some steps of x hold what
separates x from a node that it does not cause (Colombo et al. 2012, arXiv 1104.5617); as paths from x they are the PDS
tree in which CLEANN looks for what explains x (Rohekar et al. 2023, arXiv 2310.20307). A set is *closed* if each of its
members ends a PDS path from x whose inner nodes are members too (ICD-Sep, Rohekar et al. 2021, arXiv 2111.04095).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

import numpy as np

from analyses.pag_orientation import Pag


def pds_paths(
    pag: Pag, root: int, depth: int | None = None, within: Collection[int] | None = None
) -> dict[int, tuple[int, ...]]:
    """A shortest PDS path from a root to every node that has one, nearest nodes first; the path begins with the root.

    Args:
        pag: The graph.
        root: Where paths begin; none returns there.
        depth: At most so many edges.
        within: Paths may visit only these.
    """
    adjacent, into = pag.adjacent, pag.into
    allowed = np.ones(len(pag), dtype=bool)
    if within is not None:
        allowed[:] = False
        allowed[list(within)] = True
    allowed[root] = False
    found: dict[int, tuple[int, ...]] = {}
    # A step depends on the one before it, so what is visited are edges, not nodes.
    layer = [(root, node) for node in (adjacent[root] & allowed).nonzero()[0].tolist()]
    paths: dict[tuple[int, int], tuple[int, ...]] = {step: step for step in layer}
    steps = 1
    while layer and (depth is None or steps <= depth):
        following = []
        for step in layer:
            before, here = step
            found.setdefault(here, paths[step])
            onward = adjacent[here] & allowed & (adjacent[before] | (into[before, here] & into[:, here]))
            onward[before] = False
            for node in onward.nonzero()[0].tolist():
                if (here, node) not in paths and node not in paths[step]:
                    paths[here, node] = (*paths[step], node)
                    following.append((here, node))
        layer, steps = following, steps + 1
    return found


def is_closed(pag: Pag, root: int, members: Collection[int], depth: int | None = None) -> bool:
    """Whether every member ends a PDS path from the root through members only, of at most so many edges."""
    if pag.adjacent[root, list(members)].all():
        return True
    return len(pds_paths(pag, root, depth, members)) == len(members)


def closed_sets(
    pag: Pag, root: int, pool: Sequence[int], size: int, depth: int | None = None
) -> Iterator[tuple[int, ...]]:
    """The closed sets of so many nodes out of a pool, those of its first nodes first: give the nearest first."""
    for members in combinations(pool, size):
        if is_closed(pag, root, members, depth):
            yield members
