"""The desk with its tabs: what they are given, what is shown of what they find, and what of their failures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.desk import Desk, said
from hooked_mm.explorer.panels import Facts, Note
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from tests.desks import (
    FULL,
    LLAVA,
    LONG,
    QWEN,
    Setting,
    Shows,
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
def tab(setting: Setting) -> Shows:
    """The tab of the desk."""
    return setting[1]


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
    for short in (MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("not enough memory: 9 bytes")):
        assert said(short).startswith("there is not enough memory for this; take smaller or fewer pictures")
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
