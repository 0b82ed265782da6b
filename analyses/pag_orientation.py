"""Partial ancestral graphs, and the rules that tell which of their ends are arrowheads and which are tails.

An end of an edge is a *tail* where that node causes the other (is its ancestor), an *arrowhead* where it does not, and
a *circle* where it is not known. `a -> b`: a causes b; `a <-> b`: neither causes the other, so something that is not
observed causes both; `a o-> b`: one of these. * stands for any end, a path is uncovered if no two nodes two steps apart
are adjacent, and potentially directed if none of its edges has an arrowhead at its start or a tail at its end. With
S(a, b) the set that separated a and b, the rules of Zhang 2008 ("On the completeness of orientation rules for causal
discovery in the presence of latent confounders and selection bias"):

    R0   a *-* b *-* c, a and c not adjacent, b not in S(a, c)                       a *-> b <-* c
    R1   a *-> b o-* c, a and c not adjacent                                         b -> c
    R2   a -> b *-> c or a *-> b -> c, and a *-o c                                   a *-> c
    R3   a *-> b <-* c, a *-o d o-* c, a and c not adjacent, d *-o b                 d *-> b
    R4   a discriminating path <e, ..., a, b, c> for b, b o-* c: b in S(e, c)?       b -> c, or else a <-> b <-> c
    R8   a -> b -> c or a -o b -> c, and a o-> c                                     a -> c
    R9   a o-> c, an uncovered potentially directed path <a, b, ..., c>,
         b and c not adjacent                                                        a -> c
    R10  a o-> c, b -> c <- d, uncovered potentially directed paths from a to b
         and to d, whose first nodes differ and are not adjacent                     a -> c

R5 to R7 are about selection bias, which attention does not have. What is known beforehand, arrowheads at the later of
two nodes, is written before R0; with such knowledge the rules find all that can be found (Andrews, Spirtes and Cooper
2020). A rule writes only over circles: on data whose decisions contradict each other the earlier rule stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Int8

from hooked_mm.errors import BadInputError


class Mark(IntEnum):
    """What stands at an end of an edge; NONE: no edge."""

    NONE = 0
    CIRCLE = 1
    ARROW = 2
    TAIL = 3


SIGNS = {Mark.CIRCLE: "oo", Mark.ARROW: "<>", Mark.TAIL: "--"}
"""How an end is written at an edge's left and right."""
Separators = Mapping[frozenset[int], frozenset[int]]
"""A pair that is not adjacent -> the set that separated it."""


@dataclass(frozen=True)
class Pag:
    """A mixed graph.

    Attributes:
        marks: (n, n), `marks[a, b]` is what stands at b's end of the edge between a and b.
    """

    marks: Int8[np.ndarray, "n n"]

    def __post_init__(self) -> None:
        marks = self.marks
        if marks.ndim != 2 or marks.shape[0] != marks.shape[1] or ((marks > 0) != (marks > 0).T).any():
            raise BadInputError(f"marks of shape {marks.shape}; give a square array with both ends of every edge")

    def __len__(self) -> int:
        return len(self.marks)

    @property
    def adjacent(self) -> Bool[np.ndarray, "n n"]:
        """Which nodes an edge joins."""
        return self.marks > 0

    @property
    def into(self) -> Bool[np.ndarray, "n n"]:
        """`into[a, b]`: a *-> b."""
        return self.marks == Mark.ARROW

    @property
    def directed(self) -> Bool[np.ndarray, "n n"]:
        """`directed[a, b]`: a -> b."""
        return (self.marks == Mark.ARROW) & (self.marks.T == Mark.TAIL)

    @property
    def possibly_directed(self) -> Bool[np.ndarray, "n n"]:
        """`possibly_directed[a, b]`: the edge may be a -> b."""
        return self.adjacent & (self.marks.T != Mark.ARROW) & (self.marks != Mark.TAIL)

    def edges(self) -> list[tuple[int, int, str]]:
        """(a, b, sign) with a < b: `-->`, `<->`, `o->`, ..."""
        pairs = zip(*np.nonzero(np.triu(self.adjacent)), strict=True)
        return [(int(a), int(b), self.sign(int(a), int(b))) for a, b in pairs]

    def sign(self, a: int, b: int) -> str:
        """The edge between two nodes, read from a to b."""
        return f"{SIGNS[Mark(self.marks[b, a])][0]}-{SIGNS[Mark(self.marks[a, b])][1]}"

    def possible_ancestors(self) -> Bool[np.ndarray, "n n"]:
        """`[a, b]`: a is b, or a path of possibly directed edges leads from a to b."""
        found = self.possibly_directed | np.eye(len(self), dtype=bool)
        for _ in range(len(self).bit_length()):
            found = found @ found
        return found


def unoriented(adjacent: Bool[np.ndarray, "n n"], tiers: Sequence[int]) -> Pag:
    """Circles everywhere, but an arrowhead at the later of two nodes of different tiers: it does not cause the earlier.

    Args:
        adjacent: Which nodes an edge joins.
        tiers: When each node comes; of nodes of one tier nothing is known.
    """
    when = np.asarray(tiers)
    marks = np.where(when[:, None] < when[None, :], Mark.ARROW, Mark.CIRCLE) * adjacent
    return Pag(marks.astype(np.int8))


def oriented(
    adjacent: Bool[np.ndarray, "n n"], separators: Separators, tiers: Sequence[int], tails: bool = True
) -> Pag:
    """The graph of a skeleton with every end that follows from the rules.

    Args:
        adjacent: The skeleton.
        separators: The set that separated each pair that is not adjacent.
        tiers: When each node comes (`unoriented`).
        tails: R8 to R10 too; the others alone hold at any size of conditioning sets.
    """
    pag = unoriented(adjacent, tiers)
    RULES["R0"](pag, separators)
    for names in (("R1", "R2", "R3", "R4"), ("R8", "R9", "R10") if tails else ()):
        # Each of them, even if one before it has already written something.
        while sum(RULES[name](pag, separators) for name in names):
            pass
    return pag


def _write(pag: Pag, a: int, b: int, mark: Mark) -> bool:
    """Put a mark at b's end of the edge with a if there is a circle; whether it was."""
    if pag.marks[a, b] != Mark.CIRCLE:
        return False
    pag.marks[a, b] = mark
    return True


def _write_all(pag: Pag, where: Bool[np.ndarray, "n n"], mark: Mark) -> bool:
    return sum(_write(pag, a, b, mark) for a, b in _pairs(where)) > 0


def _out_of(pag: Pag, a: int, b: int) -> bool:
    """a -> b."""
    return _write(pag, b, a, Mark.TAIL) | _write(pag, a, b, Mark.ARROW)


def _pairs(where: Bool[np.ndarray, "n n"]) -> Iterator[tuple[int, int]]:
    for a, b in zip(*np.nonzero(where), strict=True):
        yield int(a), int(b)


def _apart(pag: Pag) -> Bool[np.ndarray, "n n"]:
    """Different nodes that are not adjacent."""
    return ~pag.adjacent & ~np.eye(len(pag), dtype=bool)


def _rule0(pag: Pag, separators: Separators) -> bool:
    changed = False
    for a, c in _pairs(np.triu(_apart(pag))):
        separator = separators.get(frozenset((a, c)), frozenset())
        for b in np.flatnonzero(pag.adjacent[a] & pag.adjacent[c]).tolist():
            if b not in separator:
                changed |= _write(pag, a, b, Mark.ARROW) | _write(pag, c, b, Mark.ARROW)
    return changed


def _rule1(pag: Pag, _: Separators) -> bool:
    found = (pag.into.T @ _apart(pag)) & (pag.marks.T == Mark.CIRCLE)
    # What an earlier one of the list has written may have taken the circle.
    return sum(_out_of(pag, b, c) for b, c in _pairs(found) if pag.marks[c, b] == Mark.CIRCLE) > 0


def _rule2(pag: Pag, _: Separators) -> bool:
    found = (pag.directed @ pag.into | pag.into @ pag.directed) & (pag.marks == Mark.CIRCLE)
    return _write_all(pag, found, Mark.ARROW)


def _rule3(pag: Pag, _: Separators) -> bool:
    apart, changed = _apart(pag), False
    for d, b in _pairs(pag.marks == Mark.CIRCLE):
        ends = np.flatnonzero(pag.into[:, b] & (pag.marks[:, d] == Mark.CIRCLE))
        if apart[np.ix_(ends, ends)].any():
            changed |= _write(pag, d, b, Mark.ARROW)
    return changed


def _rule4(pag: Pag, separators: Separators) -> bool:
    changed = False
    for c, b in _pairs(pag.marks == Mark.CIRCLE):
        if pag.marks[c, b] == Mark.CIRCLE and (found := discriminating(pag, b, c)) is not None:
            start, a = found
            if b in separators.get(frozenset((start, c)), frozenset()):
                changed |= _out_of(pag, b, c)
            elif pag.marks[a, b] != Mark.TAIL:
                changed |= sum(_write(pag, *ends, Mark.ARROW) for ends in ((a, b), (c, b), (b, c))) > 0
    return changed


def discriminating(pag: Pag, b: int, c: int) -> tuple[int, int] | None:
    """(e, a) of a shortest discriminating path <e, ..., a, b, c> for b: e and c are not adjacent, and every node
    between e and b is a collider on the path and a parent of c."""
    into, parents = pag.into, pag.directed[:, c]
    for a in np.flatnonzero(into[b] & parents).tolist():
        if a == b:
            continue
        seen, queue = {a, b, c}, [a]
        for inner in queue:
            for node in np.flatnonzero(into[:, inner]).tolist():
                if node in seen:
                    continue
                if not pag.adjacent[node, c]:
                    return node, a
                if parents[node] and into[inner, node]:
                    seen.add(node)
                    queue.append(node)
    return None


def _half_known(pag: Pag) -> Bool[np.ndarray, "n n"]:
    """`[a, c]`: a o-> c."""
    return pag.into & (pag.marks.T == Mark.CIRCLE)


def _rule8(pag: Pag, _: Separators) -> bool:
    out = pag.directed | ((pag.marks == Mark.CIRCLE) & (pag.marks.T == Mark.TAIL))
    return _write_all(pag, ((out @ pag.directed) & _half_known(pag)).T, Mark.TAIL)


def _rule9(pag: Pag, _: Separators) -> bool:
    changed = False
    for a, c in _pairs(_half_known(pag)):
        starts = np.flatnonzero(pag.possibly_directed[a] & ~pag.adjacent[c]).tolist()
        if any(b != c and uncovered(pag, [a, b], c) for b in starts):
            changed |= _write(pag, c, a, Mark.TAIL)
    return changed


def _rule10(pag: Pag, _: Separators) -> bool:
    changed, apart = False, _apart(pag)
    for a, c in _pairs(_half_known(pag)):
        starts = [m for m in np.flatnonzero(pag.possibly_directed[a]).tolist() if m != c]
        ends = [b for b in np.flatnonzero(pag.directed[:, c]).tolist() if b != a]
        # For each first node, the parents of c that an uncovered path leads to.
        reached = {m: {b for b in ends if uncovered(pag, [a, m], b)} for m in starts}
        if any(
            apart[m, w] and any(b != d for b in reached[m] for d in reached[w])
            for place, m in enumerate(starts)
            for w in starts[:place]
        ):
            changed |= _write(pag, c, a, Mark.TAIL)
    return changed


def uncovered(pag: Pag, path: Sequence[int], end: int) -> bool:
    """Whether a path that begins so goes on to `end`, uncovered and potentially directed.

    Walks, which may come to a node twice, are looked for first: where there is none there is no path, and walks need no
    more steps than there are edges, where paths may be beyond number.
    """
    possible, apart = pag.possibly_directed, ~pag.adjacent

    def onward(before: int, node: int) -> list[int]:
        found: list[int] = np.flatnonzero(possible[node] & apart[before]).tolist()
        return found

    def goes_on(so_far: Sequence[int]) -> bool:
        steps = (node for node in onward(so_far[-2], so_far[-1]) if node not in so_far)
        return so_far[-1] == end or any(goes_on([*so_far, node]) for node in steps)

    reached = {(path[-2], path[-1])}
    waiting = list(reached)
    while waiting:
        before, node = waiting.pop()
        if node == end:
            return goes_on(path)
        steps = {(node, after) for after in onward(before, node)} - reached
        reached |= steps
        waiting += steps
    return False


RULES: dict[str, Callable[[Pag, Separators], bool]] = {
    "R0": _rule0,
    "R1": _rule1,
    "R2": _rule2,
    "R3": _rule3,
    "R4": _rule4,
    "R8": _rule8,
    "R9": _rule9,
    "R10": _rule10,
}
"""Name -> the rule, which writes into a graph and tells whether it wrote anything."""
