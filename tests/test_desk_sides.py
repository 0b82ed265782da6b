"""The desk with two sides: another model or another picture beside the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.conversation import Conversation, Generation
from hooked_mm.explorer.desk import Desk, Question
from hooked_mm.explorer.visits import Side
from hooked_mm.explorer.work import Stopped
from hooked_mm.hooked import HookedMM
from tests.desks import (
    FULL,
    LLAVA,
    LONG,
    OTHER,
    QWEN,
    SHORT,
    Setting,
    alone,
    ask,
    opened,
    slowly,
    state,
)


@pytest.fixture
def setting(small: Callable[[str], HookedMM], monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """A desk, its tab, and which models it loads where."""
    with opened(monkeypatch, small) as made:
        yield made


@pytest.fixture
def desk(setting: Setting) -> Desk:
    """Two models and a tab."""
    return setting[0]


def test_a_question_that_failed_in_the_second_side_leaves_both(
    desk: Desk, small: Callable[[str], HookedMM], images: list[Image.Image]
) -> None:
    """The first side's answer is not kept alone; the text is the image token of the second model only."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0], other=QWEN)
    before = state(visit)
    with pytest.raises(BadInputError, match="image tokens"):
        ask(desk, visit, text=f"what {small('qwen2_vl').processor.image_token} ?", other=QWEN)
    assert state(visit) == before


def test_another_model_is_compared_in_the_middle_of_a_conversation(
    desk: Desk, small: Callable[[str], HookedMM], images: list[Image.Image]
) -> None:
    """It has been told all that the first was and answered; from then on each has its own answers."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0])
    begun = visit.sides[0].conversation
    ask(desk, visit, text=OTHER, other=QWEN)
    ask(desk, visit, images[1], other=QWEN)
    for side, name in zip(visit.sides, ("llava", "qwen2_vl"), strict=True):
        second = begun.say(OTHER)
        third = second.answered(alone(small(name), second)).say(SHORT, (images[1],))
        assert side.conversation == third.answered(alone(small(name), third))
        assert side.name.name == name
        assert side.asked is not None
        assert side.asked.model is small(name)
    ask(desk, visit)
    assert len(visit.sides) == 1
    assert len(visit.sides[0].conversation.turns) == 4


def test_another_picture_is_compared_from_the_beginning(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """The second side has been told nothing of the first's pictures; with no picture more it goes on with its own."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0])
    ask(desk, visit, text=OTHER, other=LLAVA, other_images=(images[1],))
    ask(desk, visit, other=LLAVA, other_images=())
    first, second = (side.conversation for side in visit.sides)
    assert (first.images, second.images) == ((images[0],), (images[1],))
    assert [turn.text for turn in second.turns] == [OTHER, SHORT]
    asked = Conversation().say(OTHER, (images[1],))
    assert second.turns[0] == asked.answered(alone(llava, asked)).turns[0]


def test_what_was_compared_does_not_come_back(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """Compared no more while both answer: the second side stays away, also for a comparison with something else."""
    visit = desk.visits.of("a")
    with slowly(llava):
        asking = desk.ask(visit, Question(FULL, (images[0],), LONG, QWEN))
        next(asking)
        visit.compare_no_more()
        with pytest.raises(Stopped):
            list(asking)
    assert visit.sides == [Side(LLAVA)]
    ask(desk, visit, images[0], other=LLAVA, other_images=(images[1],))
    assert visit.sides[1].conversation.images == (images[1],)
    assert len(visit.sides[1].conversation.turns) == 1


def test_another_comparison_begins_its_own_second_side(desk: Desk, images: list[Image.Image]) -> None:
    """A second side that another model answered is not gone on with by this one."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0], text=FULL, other=QWEN, generation=Generation(8, 5))
    first, second = (side.conversation.turns[0] for side in visit.sides)
    assert first.answer != second.answer
    ask(desk, visit, other=LLAVA)
    assert [side.conversation.turns[0] for side in visit.sides] == [first, first]
