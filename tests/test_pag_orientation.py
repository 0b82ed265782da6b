"""The rules one by one on graphs drawn by hand; what they find together is in `test_causal_discovery`."""

from __future__ import annotations

import re

import numpy as np
import pytest

from analyses.pag_orientation import RULES, Mark, Pag, discriminating, oriented, uncovered, unoriented
from hooked_mm.errors import BadInputError

ENDS = {"o": Mark.CIRCLE, "<": Mark.ARROW, ">": Mark.ARROW, "-": Mark.TAIL}


def drawn(text: str, count: int = 6) -> Pag:
    """A graph from `0 o-> 1, 1 <-> 2`."""
    marks = np.zeros((count, count), dtype=np.int8)
    for part in filter(None, text.split(", ")):
        a, left, right, b = re.fullmatch(r"(\d) (.)-(.) (\d)", part).groups()  # type: ignore[union-attr]
        marks[int(b), int(a)], marks[int(a), int(b)] = ENDS[left], ENDS[right]
    return Pag(marks)


Separated = dict[tuple[int, int], set[int]]


@pytest.mark.parametrize(
    ("rule", "before", "separators", "after"),
    [
        ("R0", "0 o-o 1, 1 o-o 2", {(0, 2): set()}, "0 o-> 1, 1 <-o 2"),
        ("R0", "0 o-o 1, 1 o-o 2", {(0, 2): {1}}, None),
        ("R0", "0 o-o 1, 1 o-o 2, 0 o-o 2", {}, None),
        ("R0", "0 o-> 1, 1 o-> 2", {(0, 2): set()}, "0 o-> 1, 1 <-> 2"),
        ("R1", "0 o-> 1, 1 o-o 2", {}, "0 o-> 1, 1 --> 2"),
        ("R1", "0 <-> 1, 1 o-> 2", {}, "0 <-> 1, 1 --> 2"),
        ("R1", "0 o-o 1, 1 o-> 2", {}, None),
        ("R1", "0 o-> 1, 1 o-o 2, 0 o-o 2", {}, None),
        ("R2", "0 --> 1, 1 o-> 2, 0 o-o 2", {}, "0 --> 1, 0 o-> 2, 1 o-> 2"),
        ("R2", "0 o-> 1, 1 --> 2, 0 --o 2", {}, "0 o-> 1, 0 --> 2, 1 --> 2"),
        ("R2", "0 o-> 1, 1 o-> 2, 0 o-o 2", {}, None),
        ("R3", "0 o-> 1, 1 <-o 2, 0 o-o 3, 2 o-o 3, 1 o-o 3", {}, "0 o-> 1, 0 o-o 3, 1 <-o 2, 1 <-o 3, 2 o-o 3"),
        ("R3", "0 o-> 1, 1 <-o 2, 0 o-o 3, 2 o-o 3, 1 o-o 3, 0 o-o 2", {}, None),
        ("R3", "0 o-> 1, 1 <-o 2, 0 o-> 3, 2 o-o 3, 1 o-o 3", {}, None),
        (
            "R4",
            "0 o-> 1, 1 <-> 2, 1 --> 3, 2 o-> 3",
            {(0, 3): {1, 2}},
            "0 o-> 1, 1 <-> 2, 1 --> 3, 2 --> 3",
        ),
        (
            "R4",
            "0 o-> 1, 1 <-o 2, 1 --> 3, 2 o-o 3",
            {(0, 3): {1}},
            "0 o-> 1, 1 <-> 2, 1 --> 3, 2 <-> 3",
        ),
        ("R4", "0 o-> 1, 1 <-> 2, 1 o-> 3, 2 o-> 3", {(0, 3): {1}}, None),
        ("R4", "0 o-> 1, 1 <-> 2, 1 --> 3, 2 o-> 3, 0 o-> 3", {}, None),
        (  # a longer path: 4 between
            "R4",
            "0 o-> 4, 1 <-> 4, 1 <-> 2, 1 --> 3, 3 <-- 4, 2 o-> 3",
            {(0, 3): {1, 4}},
            "0 o-> 4, 1 <-> 2, 1 --> 3, 1 <-> 4, 2 <-> 3, 3 <-- 4",
        ),
        (  # 4 is a parent of 3, but no collider
            "R4",
            "0 o-> 4, 4 --> 1, 1 <-> 2, 1 --> 3, 4 --> 3, 2 o-> 3",
            {(0, 3): {1, 4}},
            None,
        ),
        ("R8", "0 --> 1, 1 --> 2, 0 o-> 2", {}, "0 --> 1, 0 --> 2, 1 --> 2"),
        ("R8", "0 --o 1, 1 --> 2, 0 o-> 2", {}, "0 --o 1, 0 --> 2, 1 --> 2"),
        ("R8", "0 o-> 1, 1 --> 2, 0 o-> 2", {}, None),
        ("R9", "0 o-> 3, 0 o-o 1, 1 o-o 2, 2 --> 3", {}, "0 o-o 1, 0 --> 3, 1 o-o 2, 2 --> 3"),
        ("R9", "0 o-> 3, 0 o-o 1, 1 o-o 2, 2 o-> 3, 0 o-o 2", {}, None),
        ("R9", "0 o-> 3, 0 o-o 1, 1 <-o 2, 2 --> 3", {}, None),
        (  # 1 is adjacent to 4, wherever the path leads
            "R9",
            "0 o-> 4, 0 o-o 1, 1 o-o 2, 2 o-o 3, 3 --> 4, 1 --> 4",
            {},
            None,
        ),
        ("R10", "0 o-> 3, 1 --> 3, 2 --> 3, 0 o-o 1, 0 o-o 2", {}, "0 o-o 1, 0 o-o 2, 0 --> 3, 1 --> 3, 2 --> 3"),
        (  # the first nodes, 4 and 5, lead on to 1 and 2
            "R10",
            "0 o-> 3, 1 --> 3, 2 --> 3, 0 o-o 4, 0 o-o 5, 1 o-o 4, 2 o-o 5",
            {},
            "0 --> 3, 0 o-o 4, 0 o-o 5, 1 --> 3, 1 o-o 4, 2 --> 3, 2 o-o 5",
        ),
        ("R10", "0 o-> 3, 1 --> 3, 2 --> 3, 0 o-o 1, 0 o-o 2, 1 o-o 2", {}, None),
        ("R10", "0 o-> 3, 1 --> 3, 2 --> 3, 0 o-o 4, 1 o-o 4, 2 o-o 4", {}, None),
    ],
)
def test_rules(rule: str, before: str, separators: Separated, after: str | None) -> None:
    """Each by itself; None: it has nothing to say."""
    pag = drawn(before)
    sets = {frozenset(pair): frozenset(own) for pair, own in separators.items()}
    assert RULES[rule](pag, sets) == (after is not None)
    np.testing.assert_array_equal(pag.marks, drawn(after or before).marks)
    assert not RULES[rule](pag, sets)


def test_an_order_is_an_arrowhead_at_the_later() -> None:
    """Circles otherwise; nodes of one tier have circles at both ends."""
    pag = unoriented(drawn("0 o-o 1, 1 o-o 2, 0 o-o 2").adjacent, [0, 0, 1, 1, 1, 1])
    assert pag.edges() == [(0, 1, "o-o"), (0, 2, "o->"), (1, 2, "o->")]


def test_what_is_known_is_never_written_over() -> None:
    """Decisions that contradict each other: 1 is no collider between 0 and 2, yet two arrowheads meet there."""
    marks = drawn("0 o-o 1, 1 o-o 2, 2 o-o 3, 1 o-o 3")
    sets = {frozenset((0, 2)): frozenset({1}), frozenset((0, 3)): frozenset()}
    found = oriented(marks.adjacent, sets, [0, 3, 1, 2, 4, 5])
    assert all(found.marks[a, 1] == Mark.ARROW for a in (0, 2, 3))


def test_tails_can_be_left_open() -> None:
    """R8 to R10 hold only once all sets were looked at."""
    skeleton = drawn("0 o-o 1, 1 o-o 2, 2 o-o 3, 0 o-o 3").adjacent
    sets = {frozenset((0, 2)): frozenset({1}), frozenset((1, 3)): frozenset({0, 2})}
    order = [0, 1, 2, 3, 4, 5]
    assert oriented(skeleton, sets, order).sign(0, 3) == "-->"
    assert oriented(skeleton, sets, order, tails=False).sign(0, 3) == "o->"


def test_how_a_graph_is_read() -> None:
    """Edges as text from either side, what may be above what, and paths."""
    pag = drawn("0 --> 1, 1 <-> 2, 2 o-o 3")
    assert pag.edges() == [(0, 1, "-->"), (1, 2, "<->"), (2, 3, "o-o")]
    assert pag.sign(1, 0) == "<--"
    above = pag.possible_ancestors()
    assert above[0, 1]
    assert above[3, 2]
    assert not above[1, 2]
    assert not above[0, 2]
    assert uncovered(drawn("0 o-o 1, 1 o-> 2, 2 o-o 3"), [0, 1], 3)
    assert not uncovered(drawn("0 o-o 1, 1 <-o 2, 2 o-o 3"), [0, 1], 3)
    assert discriminating(drawn("0 o-> 1, 1 <-o 2, 1 --> 3, 2 o-o 3"), 2, 3) == (0, 1)
    assert len(pag) == 6


def test_half_an_edge_is_refused() -> None:
    """Every edge has two ends."""
    marks = np.zeros((3, 3), dtype=np.int8)
    marks[0, 1] = 1
    with pytest.raises(BadInputError, match="both ends"):
        Pag(marks)
    with pytest.raises(BadInputError, match="square"):
        Pag(marks[:2])


def test_where_no_path_leads_on_is_told_in_time() -> None:
    """Twenty pairs of nodes, each joined to both of the next pair: a million paths, none of which arrives."""
    adjacent = np.zeros((41, 41), dtype=bool)
    for node in range(38):
        following = 2 * (node // 2) + 2
        adjacent[node, following : following + 2] = adjacent[following : following + 2, node] = True
    graph = unoriented(adjacent, [0] * 41)
    assert not uncovered(graph, [0, 2], 40)
    assert uncovered(graph, [0, 2], 39)
