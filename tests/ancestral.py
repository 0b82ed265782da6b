"""Causal truth to learn graphs from, written apart from the learner: random DAGs with latent causes, and every small
maximal ancestral graph (Richardson and Spirtes 2002) with the independences it implies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product

import numpy as np

Edges = list[tuple[int, int]]
CIRCLE, ARROW, TAIL = 1, 2, 3


@dataclass(frozen=True)
class Dag:
    """Nodes 0 .. observed - 1 in causal order, latent ones behind them in number, anywhere in order."""

    observed: int
    edges: Edges

    @cached_property
    def _parents(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for a, b in self.edges:
            found.setdefault(b, []).append(a)
        return found

    def parents(self, node: int) -> list[int]:
        return self._parents.get(node, [])

    def separated(self, x: int, y: int, given: Sequence[int]) -> bool:
        """d-separation: no path in the moral graph of the ancestors (Lauritzen et al. 1990)."""
        kept, queue = {x, y, *given}, [x, y, *given]
        while queue:
            fresh = set(self.parents(queue.pop())) - kept
            kept |= fresh
            queue += fresh
        joined: dict[int, set[int]] = {node: set() for node in kept}
        for node in kept:
            family = {node, *self.parents(node)}
            for member in family:
                joined[member] |= family
        seen, queue, stop = {x}, [x], set(given)
        while queue:
            fresh = joined[queue.pop()] - seen - stop
            seen |= fresh
            queue += fresh
        return y not in seen


def random_dag(seed: int) -> Dag:
    """Four to eight observed nodes, up to four latent ones."""
    rng = np.random.default_rng(seed)
    observed, latent, share = int(rng.integers(4, 9)), int(rng.integers(0, 5)), float(rng.uniform(0.15, 0.5))
    ahead = iter(range(observed))
    order = [next(ahead) if node < observed else int(node) for node in rng.permutation(observed + latent)]
    return Dag(observed, [(a, b) for a, b in combinations(order, 2) if rng.random() < share])


Model = tuple[tuple[tuple[int, int], frozenset[tuple[int, ...]]], ...]


def model_of(into: np.ndarray, adjacent: np.ndarray) -> Model | None:
    """Per pair the sets that m-separate it; None if the graph is not ancestral and maximal."""
    count = len(into)
    reach = np.eye(count, dtype=bool) | (into & ~into.T)
    for _ in range(count):
        reach = reach @ reach
    for a, b in combinations(range(count), 2):
        both, forth, back = into[a, b] and into[b, a], reach[a, b], reach[b, a]
        if adjacent[a, b] and ((both and (forth or back)) or (forth and back)):
            return None
    found = []
    for a, b in combinations(range(count), 2):
        others = [node for node in range(count) if node not in (a, b)]
        sets = [given for size in range(count - 1) for given in combinations(others, size)]
        separating = frozenset(given for given in sets if _separated(into, adjacent, reach, a, b, given))
        if not adjacent[a, b] and not separating:
            return None
        found.append(((a, b), separating))
    return tuple(found)


def _separated(
    into: np.ndarray, adjacent: np.ndarray, reach: np.ndarray, x: int, y: int, given: tuple[int, ...]
) -> bool:
    opened = reach[:, list(given)].any(axis=1)
    seen: set[tuple[int, int]] = set()
    steps = [(x, int(node)) for node in adjacent[x].nonzero()[0]]
    while steps:
        before, here = step = steps.pop()
        if here == y:
            return False
        if step in seen:
            continue
        seen.add(step)
        for after in adjacent[here].nonzero()[0].tolist():
            collider = into[before, here] and into[after, here]
            if opened[here] if collider else here not in given:
                steps.append((here, after))
    return True


def classes(tiers: Sequence[int]) -> dict[Model, np.ndarray]:
    """Every independence model of a maximal ancestral graph whose order these tiers are -> the marks that all graphs
    with this model share, circles where they differ."""
    count, found = len(tiers), dict[Model, list[np.ndarray]]()
    pairs = list(combinations(range(count), 2))
    kinds = [[(0, 0, 0), (1, 1, 0), (1, 1, 1), *([(1, 0, 1)] if tiers[a] == tiers[b] else [])] for a, b in pairs]
    for choice in product(*kinds):
        into, adjacent = np.zeros((2, count, count), dtype=bool)
        for (a, b), (joined, forth, back) in zip(pairs, choice, strict=True):
            adjacent[a, b] = adjacent[b, a] = joined
            into[a, b], into[b, a] = forth, back
        model = model_of(into, adjacent)
        if model is not None:
            found.setdefault(model, []).append(np.where(into, ARROW, TAIL) * adjacent)
    shared = {}
    for model, marks in found.items():
        every = np.stack(marks)
        shared[model] = np.where((every == every[0]).all(axis=0), every[0], CIRCLE) * (every[0] > 0)
    return shared


def oracle(model: Model) -> Callable[[int, int, Sequence[int]], bool]:
    """Decisions of a model."""
    sets = dict(model)
    return lambda a, b, given: tuple(sorted(given)) in sets[min(a, b), max(a, b)]
