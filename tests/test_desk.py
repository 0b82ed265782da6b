"""The desk: asking and stopping; nothing of one visitor or of an old question reaches another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from PIL import Image

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.explorer.desk import LONGEST_QUESTION, MOST_PICTURES, Desk, Question, unseen
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
    free,
    hooks_of,
    look,
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


@pytest.fixture
def loads(setting: Setting) -> list[tuple[str, str]]:
    """Which models were asked for, and in which thread."""
    return setting[2]


def test_answers_are_those_of_the_model_alone(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """Turn after turn; progress tells the answer so far; at the end the last question can be looked at."""
    visit = desk.visits.of("a")
    first = Conversation().say(FULL, (images[0],))
    answer = alone(llava, first, LONG)
    with slowly(llava, 0.04):
        told = ask(desk, visit, images[0], text=f"  {FULL}\n", generation=LONG)
    assert visit.sides[0].conversation == first.answered(answer)
    texts = [one.texts[0] for one in told]
    assert len(set(texts)) > 2
    assert all(answer.startswith(text) for text in texts)
    assert {one.told for one in told} <= {"answering", "waiting"}
    look(desk, visit)
    second = first.answered(answer).say(SHORT, (images[1],))
    ask(desk, visit, images[1])
    answer = alone(llava, second)
    assert visit.sides[0].conversation == second.answered(answer)
    assert visit.number == 2
    assert visit.work is None
    assert visit.seen == {}, "what was found of the question before is not shown as this one's"
    asked = visit.sides[0].asked
    assert asked is not None
    assert (asked.answer, asked.conversation) == (answer, visit.sides[0].conversation)


def test_a_model_is_loaded_once_and_only_in_the_models_thread(
    desk: Desk, images: list[Image.Image], loads: list[tuple[str, str]]
) -> None:
    """It is run to check it, so no other may run then; from whichever thread it is wanted."""
    found: list[HookedMM] = []
    threads = [threading.Thread(target=lambda: found.append(desk.model(QWEN))) for _ in range(4)]
    for thread in threads:
        thread.start()
    ask(desk, desk.visits.of("a"), images[0], other=QWEN)
    for thread in threads:
        thread.join()
    assert sorted(name for name, _ in loads) == ["small:llava", "small:qwen2_vl"]
    assert all(thread.startswith("explorer-model") for _, thread in loads)
    assert len({id(model) for model in found}) == 1


@pytest.mark.parametrize("compared", [False, True])
def test_a_stopped_question_leaves_the_visit_as_it_was(
    desk: Desk, llava: HookedMM, images: list[Image.Image], compared: bool
) -> None:
    """Stopped in the middle of the answer: conversation, patches and what tabs showed stay, and no hook is left."""
    visit = desk.visits.of("a")
    other = QWEN if compared else None
    ask(desk, visit, images[0], other=other)
    visit.sides[0].toggle(0, 1, 1)
    look(desk, visit)
    before, hooks = state(visit), hooks_of(llava)
    with slowly(llava):
        asking = desk.ask(visit, Question(FULL, (images[1],), LONG, other))
        assert next(one for one in asking if one.texts[0])
        visit.stop()
        with pytest.raises(Stopped):
            list(asking)
    assert state(visit) == before
    assert hooks_of(llava) == hooks
    assert free(desk)


def test_a_question_that_can_not_be_answered_leaves_the_visit_as_it_was(desk: Desk, images: list[Image.Image]) -> None:
    """Refused before it is asked or by the model: with the reason, and the next question is answered."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0])
    look(desk, visit)
    before = state(visit)
    for text, shown, reason in (
        ("", (), "the question is empty"),
        (" \n\t", (), "the question is empty"),
        ("x" * (LONGEST_QUESTION + 1), (), f"has {LONGEST_QUESTION + 1} characters; {LONGEST_QUESTION} at most"),
        ("what ?", (images[0],) * MOST_PICTURES, f"would have {MOST_PICTURES + 1} pictures"),
        ("what ?", (Image.new("RGB", (5000, 8000)),), "40.0 million pixels together"),
        ("<image> what ?", (), "the text has 1 image tokens '<image>' for 0 images"),
        ("what \ue000", (), "private-use character"),
    ):
        with pytest.raises(BadInputError, match=reason):
            ask(desk, visit, *shown, text=text)
        assert state(visit) == before
    ask(desk, visit)
    assert len(visit.sides[0].conversation.turns) == 2


def test_an_old_answer_never_lands_in_a_new_conversation(
    desk: Desk, llava: HookedMM, images: list[Image.Image]
) -> None:
    """Begun anew while the model answers, or once it has answered but before that was seen."""
    visit = desk.visits.of("a")
    for finished in (False, True):
        ask(desk, visit, images[0])
        with slowly(llava):
            asking = desk.ask(visit, Question(SHORT, (images[0],)))
            next(asking)
            if finished:
                assert free(desk)
            visit.clear([LLAVA])
            with pytest.raises(Stopped):
                list(asking)
        assert visit.sides == [Side(LLAVA)]
        assert visit.seen == {}


def test_two_questions_of_one_visit_do_not_mix(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """A second question ends the first; if the first had just been answered, the second is not put behind nothing."""
    visit = desk.visits.of("a")
    with slowly(llava):
        first = desk.ask(visit, Question(FULL, (images[0],), LONG))
        next(first)
        work = visit.work
        ask(desk, visit, images[1])
        assert work is not None
        assert work.stopped, "nobody waits for it"
        with pytest.raises(Stopped):
            list(first)
    assert visit.sides[0].conversation.images == (images[1],)
    with slowly(llava):
        first = desk.ask(visit, Question(SHORT))
        next(first)
        assert free(desk)
        second = desk.ask(visit, Question(OTHER))
        next(second)
        list(first)
        with pytest.raises(Stopped):
            list(second)
    assert [turn.text for turn in visit.sides[0].conversation.turns] == [SHORT, SHORT]


def test_a_question_that_nobody_waits_for_is_ended(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """The page closes the generator: the work has ended when that returns, and the thread is free."""
    visit, hooks = desk.visits.of("a"), hooks_of(llava)
    with slowly(llava):
        asking = desk.ask(visit, Question(FULL, (images[0],), Generation(200)))
        next(asking)
        assert hooks_of(llava) == hooks + 1
        begun = time.monotonic()
        asking.close()  # type: ignore[attr-defined]
        assert hooks_of(llava) == hooks
        assert time.monotonic() - begun < 1
    assert visit.work is None
    assert visit.sides == [Side(LLAVA)]
    assert free(desk)


def test_a_closed_page_frees_the_model_for_others(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """Closed in the middle of an answer: the next visitor's answer comes, and the closed one's nowhere."""
    gone, stays = desk.visits.of("gone"), desk.visits.of("stays")
    with slowly(llava):
        asking = desk.ask(gone, Question(FULL, (images[0],), Generation(200)))
        next(asking)
        waiting = desk.ask(stays, Question(SHORT, (images[1],)))
        assert next(waiting).told == "waiting"
        desk.visits.close("gone")
        list(waiting)
        with pytest.raises(Stopped):
            list(asking)
    assert gone.sides == [Side(LLAVA)]
    assert stays.sides[0].conversation.images == (images[1],)
    assert desk.visits.of("gone") is not gone


def test_visitors_at_once_get_their_own_answers(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """Three threads, each with a picture of its own, two turns each: each has what the model says to it alone."""
    expected, wrong = [], []
    for image in images[:3]:
        said_first = Conversation().say(SHORT, (image,))
        said_first = said_first.answered(alone(llava, said_first))
        last = said_first.say(OTHER)
        expected.append(last.answered(alone(llava, last)))

    def visitor(number: int) -> None:
        visit = desk.visits.of(f"visitor {number}")
        ask(desk, visit, images[number])
        look(desk, visit)
        ask(desk, visit, text=OTHER)
        look(desk, visit)
        seen = visit.seen["shows"][0].asked
        if visit.sides[0].conversation != expected[number] or seen.conversation != expected[number]:
            wrong.append(number)

    threads = [threading.Thread(target=visitor, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(desk.visits) == 3
    assert not wrong


def test_another_model_begins_another_conversation(
    desk: Desk, images: list[Image.Image], loads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is loaded; if it can't be, the visit is as it was."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0])
    list(desk.switch(visit, QWEN))
    assert visit.sides == [Side(QWEN)]
    assert loads[-1][0] == "small:qwen2_vl"
    ask(desk, visit, images[0])
    before = state(visit)

    def fails(name: ModelName) -> HookedMM:
        raise UnsupportedModelError("not this one")

    monkeypatch.setattr(ModelName, "load", fails)
    with pytest.raises(UnsupportedModelError):
        list(desk.switch(visit, ModelName("id", "unknown")))
    assert state(visit) == before


def test_only_open_models_can_be_chosen(desk: Desk) -> None:
    """A visitor can have no other loaded, from no folder and no hub."""
    assert desk.named("small:qwen2_vl") == QWEN
    for name in ("qwen2_vl", "/etc", "x" * 500):
        with pytest.raises(BadInputError, match="is open here; there are: small:llava, small:qwen2_vl") as caught:
            desk.named(name)
        assert len(str(caught.value)) < 200
    with pytest.raises(BadInputError, match="no model to explore; give one by --model or --small"):
        Desk([], [])


@pytest.mark.slow
def test_a_closed_desk_ends_what_runs_and_takes_no_more(desk: Desk, llava: HookedMM, images: list[Image.Image]) -> None:
    """Those who wait learn that it was stopped."""
    runs, waits = desk.visits.of("a"), desk.visits.of("b")
    with slowly(llava):
        asking = desk.ask(runs, Question(FULL, (images[0],), Generation(200)))
        next(asking)
        waiting = desk.ask(waits, Question(SHORT, (images[0],)))
        next(waiting)
        desk.close()
        for one in (asking, waiting, desk.ask(desk.visits.of("c"), Question(SHORT))):
            with pytest.raises(Stopped):
                list(one)


def test_drawing_answers_disturbs_nobody_elses_numbers(desk: Desk, images: list[Image.Image]) -> None:
    """Numbers drawn here are the same whether or not a visitor has answers drawn meanwhile."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    ask(desk, desk.visits.of("a"), images[0], generation=Generation(4, 1.0))
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)


def test_a_picture_is_shown_again_only_if_it_changed(images: list[Image.Image]) -> None:
    """By what is in it, not by which object it is."""
    changed = images[0].copy()
    changed.putpixel((5, 5), (1, 2, 3))
    assert unseen(None, images[0]) == (images[0],)
    assert unseen(images[0], images[0].copy()) == ()
    assert unseen(images[0], changed) == (changed,)
    assert unseen(images[0], None) == ()
    wide, high = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert unseen(wide, high) == (high,)
    grey = wide.convert("L").resize((4, 6))
    assert unseen(wide, grey) == (grey,)


def test_two_models_of_one_name_are_refused() -> None:
    """A visitor could not choose the second."""
    with pytest.raises(BadInputError, match="two models would have one name: model, model"):
        Desk([ModelName("id", "/one/model"), ModelName("id", "/other/model")], [])
