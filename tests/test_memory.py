"""Memory is given back: what only a circle of references held, and the pages that it lay in."""

from __future__ import annotations

import sys
import weakref

import psutil
import pytest

from hooked_mm.explorer.memory import give_back


class Ring:
    """Something that refers to itself, as a page and its events do."""

    def __init__(self, size: int) -> None:
        self.own, self.pieces = self, [bytes([n % 256]) * 1000 for n in range(size)]


def test_what_refers_to_itself_alone_is_freed() -> None:
    """At once, not when the collector next comes by."""
    ring = Ring(1)
    gone = weakref.ref(ring)
    del ring
    give_back()
    assert gone() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere freed pages stay reserved")
def test_pages_go_back_to_the_machine() -> None:
    """A hundred megabytes in small pieces, with one piece kept at their end, so that the heap can't just shrink."""
    resident = psutil.Process().memory_info
    ring = Ring(100_000)
    kept = bytes(1000)
    held = resident().rss
    del ring
    assert give_back()
    assert held - resident().rss > 60e6
    assert len(kept) == 1000
