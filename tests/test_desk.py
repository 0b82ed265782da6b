"""The desk: asking, looking and stopping; nothing of one visitor or of an old question reaches another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.explorer.desk import LONGEST_QUESTION, MOST_PICTURES, Desk, Progress, Question, said, unseen
from hooked_mm.explorer.panels import Facts, Note
from hooked_mm.explorer.tab import Control, Number, View
from hooked_mm.explorer.visits import Side, Visit
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM

LLAVA, QWEN = ModelName("small", "llava"), ModelName("small", "qwen2_vl")
SHORT, OTHER, FULL = "what place is this ?", "what shape is the object ?", "describe the scene in full ."
LONG = Generation(24)


class Shows:
    """A tab that shows what it was given."""

    name, title, about, order = "shows", "Shows", "", 1

    def __init__(self) -> None:
        self.meanwhile: Callable[[Asked, Work], None] = lambda asked, work: None

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """One number, up to the model's last layer."""
        return [Number("layer", "Layer", 0, model.cfg.n_layers - 1, 0)]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """What was asked and chosen."""
        work.step("showing", 1, 2)
        self.meanwhile(asked, work)
        logits = asked.model.run_with_hooks(asked.batch)
        assert logits is not None
        facts = [("model", str(asked.name)), ("tokens", asked.tokens), ("points", asked.points), *values.items()]
        return View([Facts(facts)], arrays={"logits": logits})


@pytest.fixture(autouse=True)
def loads(small: Callable[[str], HookedMM], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Small models are not loaded again; which was asked for, and in which thread."""
    told: list[tuple[str, str]] = []

    def load(name: ModelName) -> HookedMM:
        told.append((str(name), threading.current_thread().name))
        return small(name.name)

    monkeypatch.setattr(ModelName, "load", load)
    return told


@pytest.fixture
def tab() -> Shows:
    """The tab of the desk."""
    return Shows()


@pytest.fixture
def desk(tab: Shows) -> Iterator[Desk]:
    """Two models and a tab."""
    made = Desk([LLAVA, QWEN], [tab])
    yield made
    made.close()


@contextmanager
def slowly(model: HookedMM, seconds: float = 0.12) -> Iterator[None]:
    """Every pass of the model takes longer than `Desk` waits before it tells of it, so that there is a meanwhile."""
    handle = model.hf_model.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


def state(visit: Visit) -> dict[str, Any]:
    """All that a visit has, to compare: asked questions by identity, as they hold tensors."""
    sides = [(side.name, side.conversation, id(side.asked), side.cells) for side in visit.sides]
    return {
        **vars(visit),
        "sides": sides,
        "seen": {name: [id(one) for one in seen] for name, seen in visit.seen.items()},
    }


def ask(desk: Desk, visit: Visit, *images: Image.Image, text: str = SHORT, **more: Any) -> list[Progress]:
    """Ask to the end."""
    return list(desk.ask(visit, Question(text, images, **more)))


def alone(model: HookedMM, conversation: Conversation, generation: Generation | None = None) -> str:
    """What a model answers without a desk."""
    return conversation.ask(model, generation or Generation())[0].turns[-1].answer or ""


def look(desk: Desk, visit: Visit, *tokens: Sequence[int], **values: Any) -> list[Progress]:
    """Let the tab look to the end."""
    return list(desk.look(visit, "shows", tokens, {"layer": 0} | values))


def hooks_of(model: HookedMM) -> int:
    """Hooks before passes of the whole model."""
    return len(model.hf_model._forward_pre_hooks)


def free(desk: Desk) -> bool:
    """Whether the models' thread is free for the next."""
    return desk.worker.start(lambda work: None).wait(5)


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
        ("what ?", (images[0],) * MOST_PICTURES, f"more than {MOST_PICTURES} pictures; begin a new one"),
        ("<image> what ?", (), "the text has 1 image tokens '<image>' for 0 images"),
        ("what \ue000", (), "private-use character"),
    ):
        with pytest.raises(BadInputError, match=reason):
            ask(desk, visit, *shown, text=text)
        assert state(visit) == before
    ask(desk, visit)
    assert len(visit.sides[0].conversation.turns) == 2


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


def test_a_tab_looks_at_every_side_with_its_own_choice(desk: Desk, images: list[Image.Image]) -> None:
    """Tokens and patches per side; what was chosen is kept with what was found."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0], text=FULL, other=QWEN, generation=LONG)
    visit.sides[1].toggle(0, 0, 0)
    told = look(desk, visit, [1, 2], [0], layer=3)
    seen = visit.seen["shows"]
    facts = [dict(one.view.panels[0].facts) for one in seen]  # type: ignore[union-attr]
    assert [fact["model"] for fact in facts] == ["small:llava", "small:qwen2_vl"]
    assert [fact["tokens"] for fact in facts] == [(1, 2), (0,)]
    assert [len(fact["points"]) for fact in facts] == [0, 1]
    assert [fact["layer"] for fact in facts] == [3, 3]
    assert [one.asked.tokens for one in seen] == [(1, 2), (0,)]
    for one, side in zip(seen, visit.sides, strict=True):
        assert side.asked is not None
        assert one.asked.batch is side.asked.batch
    assert all(one.share in (None, 0.5) for one in told)


def test_a_tab_looks_at_nothing_before_a_question(desk: Desk) -> None:
    """The visitor is told to ask first."""
    with pytest.raises(BadInputError, match="nothing was asked yet; ask a question first"):
        look(desk, desk.visits.of("a"))


@pytest.mark.parametrize(
    ("tokens", "values", "reason"),
    [
        ([[999]], {}, "the answer has no token 999"),
        ([[-1]], {}, "the answer has no token -1"),
        ([["star"]], {}, "the answer has no token 'star'"),
        ([[True]], {}, "the answer has no token True"),
        ([[]], {"layer": 99}, "Layer: 99 is not between 0 and 5"),
        ([[]], {"layer": "/etc/passwd"}, "Layer: /etc/passwd is not between"),
        ([[]], {"more": 1}, "but the controls are"),
    ],
)
def test_what_is_no_choice_stands_in_the_view(
    desk: Desk, images: list[Image.Image], tokens: list[list[Any]], values: dict[str, Any], reason: str
) -> None:
    """Tokens and values as they come from a page are checked; the reason is shown in the tab's place."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0])
    look(desk, visit, *tokens, **values)
    (panel,) = visit.seen["shows"][0].view.panels
    assert isinstance(panel, Note)
    assert panel.kind == "warning"
    assert reason in panel.text


def test_what_a_tab_can_not_do_of_one_side_is_said_there(desk: Desk, tab: Shows, images: list[Image.Image]) -> None:
    """The other side is shown all the same."""

    def meanwhile(asked: Asked, work: Work) -> None:
        if asked.name == LLAVA:
            raise UnsupportedModelError("this model has no such thing")

    visit, tab.meanwhile = desk.visits.of("a"), meanwhile
    ask(desk, visit, images[0], other=QWEN)
    look(desk, visit)
    first, second = (one.view for one in visit.seen["shows"])
    assert first.panels == [Note("this model has no such thing", "warning")]
    assert isinstance(second.panels[0], Facts)


def test_a_failing_tab_tells_the_visitor_nothing_of_the_server(
    desk: Desk, tab: Shows, llava: HookedMM, images: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    """Errors of others may name files: they go to the log, and what was shown before stays."""

    def meanwhile(asked: Asked, work: Work) -> None:
        raise OSError("/home/somebody/secret.txt: no such file")

    visit = desk.visits.of("a")
    ask(desk, visit, images[0])
    look(desk, visit)
    before, hooks, tab.meanwhile = state(visit), hooks_of(llava), meanwhile
    with pytest.raises(OSError, match="secret") as caught:
        look(desk, visit)
    assert state(visit) == before
    assert hooks_of(llava) == hooks
    with caplog.at_level(logging.ERROR):
        told = said(caught.value)
    assert told == "this failed (OSError); whoever runs this page finds more in its log"
    assert "secret.txt" in caplog.text
    caplog.clear()
    assert said(BadInputError("wrong")) == "wrong"
    assert said(Stopped("stopped")) == "stopped"
    assert not caplog.text


@pytest.mark.parametrize("way", ["stop", "close", "ask", "clear", "compare no more"])
def test_a_look_that_is_ended_shows_nothing(
    desk: Desk, tab: Shows, llava: HookedMM, images: list[Image.Image], way: str
) -> None:
    """Whatever ends it: what it found is not shown, least of all as another question's."""

    def meanwhile(asked: Asked, work: Work) -> None:
        begun.set()
        for turn in range(500):
            work.step("counting", turn, 500)
            time.sleep(0.01)

    visit, begun = desk.visits.of("a"), threading.Event()
    ask(desk, visit, images[0])
    tab.meanwhile, hooks = meanwhile, hooks_of(llava)
    looking = desk.look(visit, "shows", [[]], {"layer": 0})
    assert next(looking)
    assert begun.wait(5)
    if way == "close":
        looking.close()  # type: ignore[attr-defined]
    else:
        {
            "stop": visit.stop,
            "ask": lambda: ask(desk, visit, text=FULL),
            "clear": lambda: visit.clear([LLAVA]),
            "compare no more": visit.compare_no_more,
        }[way]()
        with pytest.raises(Stopped):
            list(looking)
    assert visit.seen == {}
    assert visit.work is None
    assert hooks_of(llava) == hooks
    assert free(desk)


def test_a_look_that_ended_before_another_question_was_answered_is_not_shown_as_its(
    desk: Desk, images: list[Image.Image]
) -> None:
    """Found, but not yet fetched when the next answer came."""
    visit = desk.visits.of("a")
    ask(desk, visit, images[0])
    looking = desk.look(visit, "shows", [[]], {"layer": 0})
    with slowly(desk.model(LLAVA), 0.15):
        next(looking)
        assert free(desk)
    visit.number += 1
    with pytest.raises(Stopped, match="another question was asked meanwhile"):
        list(looking)
    assert visit.seen == {}


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
