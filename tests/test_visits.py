"""Visits: each for themselves, however many come and go."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import Conversation, ModelName
from hooked_mm.explorer.visits import MOST, Side, Visit, Visits
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM
from tests.explored import ask

LLAVA, OTHER = ModelName("small", "llava"), ModelName("small", "qwen2_vl")


@pytest.fixture(scope="module")
def asked(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """A question about two pictures; the small LLaVA's grid is 8 x 8."""
    return ask(llava, "what shape is it ?", images[0], images[1])


def used(visit: Visit, mark: str) -> None:
    """Change everything that a visit has."""
    visit.sides[0].conversation = Conversation().say(mark)
    visit.sides.append(Side(OTHER))
    visit.tray.append(Image.new("RGB", (1, 1)))
    visit.sent[0] = Image.new("RGB", (2, 2))
    visit.seen[mark] = ()
    visit.other = visit.drawn = Image.new("RGB", (3, 3))
    visit.number, visit.work = 5, Work()


def untouched(visit: Visit) -> bool:
    """Whether a visit is as a new one."""
    return visit == Visit([Side(LLAVA)])


def test_a_visit_is_found_again_by_its_key_alone() -> None:
    """The same object for the same page; what one does no other sees, nor who comes later."""
    visits = Visits([LLAVA])
    first, second = visits.of("a"), visits.of("b")
    used(first, "mine")
    assert visits.of("a") is first
    assert visits.of("b") is second
    assert untouched(second)
    assert untouched(visits.of("c"))
    assert len(visits) == 3


@pytest.mark.parametrize("key", [None, ""])
def test_nobody_shares_a_visit_without_a_key(key: str | None) -> None:
    """Callers without a session are refused, and closing none closes none."""
    visits = Visits([LLAVA])
    with pytest.raises(BadInputError, match="open the page in a browser"):
        visits.of(key)
    visits.of("a")
    visits.close(key)
    assert len(visits) == 1


def test_the_visit_that_was_idle_for_longest_is_closed_first() -> None:
    """Beyond the most that are kept; its work is ended, the others' goes on."""
    visits = Visits([LLAVA], most=2)
    first, second = visits.of("a"), visits.of("b")
    first.work, second.work = Work(), Work()
    assert visits.of("a") is first
    visits.of("c")
    assert second.work.stopped
    assert not first.work.stopped
    assert visits.of("a") is first
    assert untouched(visits.of("b"))
    assert len(visits) == 2


def test_a_closed_visit_ends_its_work_and_is_forgotten() -> None:
    """A page that was closed; closed twice, or never opened, it is no error. At the end all are."""
    visits = Visits([LLAVA])
    opened = [visits.of(key) for key in "abc"]
    for visit in opened:
        visit.work = Work()
    visits.close("b")
    visits.close("b")
    visits.close("never")
    assert [visit.work is not None and visit.work.stopped for visit in opened] == [False, True, False]
    assert untouched(visits.of("b"))
    visits.close_all()
    assert len(visits) == 0
    assert all(visit.work is not None and visit.work.stopped for visit in opened)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["of", "of", "of", "use", "close"]), st.sampled_from("abcdef")), max_size=40),
    st.integers(1, 4),
)
def test_whoever_comes_and_goes_sees_only_their_own(steps: list[tuple[str, str]], most: int) -> None:
    """Against a plain list of who came last: the same are open, each with what it alone did."""
    visits, recent, done = Visits([LLAVA], most=most), [], {}  # type: Visits, list[str], dict[str, Visit]
    for step, key in steps:
        if step == "close":
            visits.close(key)
            recent, _ = [one for one in recent if one != key], done.pop(key, None)
            continue
        visit = visits.of(key)
        recent = [one for one in recent if one != key] + [key]
        for gone in recent[:-most]:
            done.pop(gone, None)
        recent = recent[-most:]
        assert untouched(visit) if key not in done else visit is done[key]
        if step == "use":
            used(visit, key)
            done[key] = visit
        assert len(visits) == len(recent) <= most


def test_many_threads_at_once_share_nothing() -> None:
    """Each page asks for its visit again and again while others come, go and are put out."""
    visits, wrong, most = Visits([LLAVA], most=20), [], [0]

    def page(number: int) -> None:
        key = f"page {number}"
        mine = visits.of(key)
        mine.seen[key] = ()
        for turn in range(300):
            if visits.of(key) is not mine or list(mine.seen) != [key]:
                wrong.append(key)
            if turn % 7 == 0:
                other = visits.of(f"{key} {turn}")
                if other.seen:
                    wrong.append(key)
                visits.close(f"{key} {turn}")
            most[0] = max(most[0], len(visits))

    threads = [threading.Thread(target=page, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 8 <= most[0] <= 20
    assert MOST >= 8


def test_beginning_anew_forgets_all_and_ends_what_is_done() -> None:
    """Nothing of the old conversation is left, and what was found of it comes too late."""
    visit = Visit([Side(LLAVA)])
    used(visit, "old")
    work = visit.work
    visit.clear([OTHER])
    assert work is not None
    assert work.stopped
    assert visit.number == 6
    assert visit == Visit([Side(OTHER)], number=6, work=work)


def test_comparing_no_more_keeps_the_first_side_only() -> None:
    """The second side is forgotten; an answer that is on its way would bring it back, so it ends."""
    visit = Visit([Side(LLAVA)])
    used(visit, "old")
    first, sent, work = visit.sides[0], visit.sent[0], visit.work
    visit.sent[1] = Image.new("RGB", (4, 4))
    visit.compare_no_more()
    assert visit.sides == [first]
    assert visit.sent == [sent, None]
    assert (visit.seen, visit.number) == ({}, 6)
    assert work is not None
    assert work.stopped


def test_patches_are_chosen_and_no_longer(asked: Asked) -> None:
    """In the order of the clicks; a second click takes it back; the points are their middles."""
    side = Side(LLAVA, asked=asked)
    for cell in ((1, 0, 0), (0, 7, 7), (0, 3, 2), (0, 7, 7)):
        side.toggle(*cell)
    assert side.cells == ((1, 0, 0), (0, 3, 2))
    # The small LLaVA pads to a square: 48 x 72 to 72 x 72, in patches of 9 pixels; 64 x 48 to 64 x 64, of 8.
    assert [image.size for image in asked.images] == [(48, 72), (64, 48)]
    assert side.points() == ((1, 4.0, -4.0), (0, 2.5 * 9 - 12, 3.5 * 9))
    assert asked.choose(points=side.points()).points == side.points()


@pytest.mark.parametrize("cell", [(0, 8, 0), (0, 0, 8), (0, -1, 0), (0, 0, -1), (2, 0, 0), (-1, 0, 0)])
def test_patches_that_are_none_are_refused(asked: Asked, cell: tuple[int, int, int]) -> None:
    """Outside the grid or in no picture; nothing is chosen by it."""
    side = Side(LLAVA, asked=asked, cells=((0, 1, 1),))
    with pytest.raises(
        BadInputError, match=rf"there is no patch in row {cell[1]}, column {cell[2]} of picture {cell[0]}"
    ):
        side.toggle(*cell)
    assert side.cells == ((0, 1, 1),)
    unasked = Side(LLAVA)
    with pytest.raises(BadInputError, match="ask first"):
        unasked.toggle(0, 0, 0)
    assert unasked.points() == ()
