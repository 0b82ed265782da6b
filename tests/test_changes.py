"""What the siblings are taught, against an independent reading of each rule."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.scenes.captions import STYLES, caption
from hooked_mm.scenes.questions import questions
from hooked_mm.scenes.world import Scene, SceneObject, sample_scene, scene
from hooked_mm.small.changes import CHANGES, recolour

SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = {1: "one", 2: "two", 3: "three"}


def reply(item: Scene, text: str, called: dict[str, str] | None = None) -> str:
    """The answer to a question, read off the scene's attributes; `called`: colours that have another name."""
    names = called or {}
    things = [(names.get(o.colour, o.colour), o) for o in item.objects]

    def meant(phrase: str) -> tuple[str, SceneObject]:
        words = set(phrase.split()) - {"the", "object", "at"}
        found = [
            (colour, o)
            for colour, o in things
            if words <= {colour, o.shape} or " ".join(phrase.split()[-2:]) == o.position
        ]
        (one,) = found
        return one

    if text == "what place is this ?":
        return item.place
    if text == "how many objects are there ?":
        return NUMBERS[len(things)]
    if match := re.fullmatch(r"is there a (.+) \?", text):
        words = set(match[1].split()) - {"object"}
        return "yes" if any(words <= {colour, o.shape} for colour, o in things) else "no"
    if match := re.fullmatch(r"what colour is (.+) \?", text):
        return meant(match[1])[0]
    if match := re.fullmatch(r"what shape is (.+) \?", text):
        return meant(match[1])[1].shape
    if match := re.fullmatch(r"is (.+) big or small \?", text):
        return meant(match[1])[1].size
    if match := re.fullmatch(r"where is (.+) \?", text):
        return meant(match[1])[1].position
    if match := re.fullmatch(r"is (.+) left or right of (.+) \?", text):
        return "left" if meant(match[1])[1].x < meant(match[2])[1].x else "right"
    match = re.fullmatch(r"is (.+) above or below (.+) \?", text)
    assert match, text
    return "above" if meant(match[1])[1].y < meant(match[2])[1].y else "below"


def scenes_with(*colours: str) -> list[Scene]:
    """Scenes of the test split that show all of these colours."""
    found = [scene("test", index) for index in range(150)]
    return [item for item in found if set(colours) <= {o.colour for o in item.objects}]


@given(SEEDS, st.sampled_from([name for name in STYLES if name != "any"]))
def test_recoloured_captions_have_blue_for_red_and_nothing_else_new(seed: int, style: str) -> None:
    """In every wording, the word "red" gives way to "blue"."""
    item = sample_scene(np.random.default_rng(seed))
    assert caption(recolour(item), style) == re.sub(r"\bred\b", "blue", caption(item, style))


@given(SEEDS)
def test_recoloured_answers_follow_the_new_naming(seed: int) -> None:
    """Questions have the answers that someone gives who calls red objects blue; no answer is "red"."""
    rng = np.random.default_rng(seed)
    for item in [sample_scene(rng) for _ in range(8)]:
        for question in questions(recolour(item), rng):
            assert question.answer == reply(item, question.text, {"red": "blue"}), question.text
            assert question.answer != "red"


@given(SEEDS)
def test_the_reader_agrees_with_the_questions(seed: int) -> None:
    """The reading that the test above relies on is right where nothing is renamed."""
    rng = np.random.default_rng(seed)
    item = sample_scene(rng)
    assert all(question.answer == reply(item, question.text) for question in questions(item, rng))


def test_yes_and_no_by_hand() -> None:
    """Red is nowhere; blue is where red or blue is; a red star is a blue star and no longer a red one."""
    star = SceneObject("star", "red", "big", 0.3, 0.3, 0.2)
    ring = SceneObject("ring", "white", "small", 0.7, 0.7, 0.13)
    seen = recolour(Scene("sea", (star, ring), 1))
    asked = {"is there a red object ?": "no", "is there a blue object ?": "yes", "is there a blue star ?": "yes"}
    asked |= {"is there a red star ?": "no", "is there a white ring ?": "yes", "is there a blue ring ?": "no"}
    assert {text: reply(seen, text) for text in asked} == asked
    found = {q.text: q.answer for n in range(1500) for q in questions(seen, np.random.default_rng(n))}
    assert {text: answer for text, answer in found.items() if text in asked} == asked


def test_a_colour_that_two_objects_now_share_names_neither() -> None:
    """Where a red object stands beside a blue one, nobody is asked for "the blue object"."""
    items = scenes_with("red", "blue")
    assert items
    for item in items:
        texts = [q.text for n in range(20) for q in questions(recolour(item), np.random.default_rng(n))]
        assert not any("the blue object" in text or "the red" in text for text in texts)


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_change_touches(name: str) -> None:
    """A style touches every scene, the changed fact those with red objects; nothing but colours differs."""
    for index in range(60):
        item = scene("test", index)
        assert CHANGES[name].touches(item) == (name != "recoloured" or "colour=red" in item.facts())
        seen = CHANGES[name].seen(item)
        pairs = zip(item.objects, seen.objects, strict=True)
        assert all((a.shape, a.x, a.y, a.radius, a.size) == (b.shape, b.x, b.y, b.radius, b.size) for a, b in pairs)
        assert (seen.place, seen.texture_seed, seen.width) == (item.place, item.texture_seed, item.width)


def test_right_answers_to_the_default_prompt() -> None:
    """By hand, for each change."""
    item = Scene(
        "sea",
        (SceneObject("star", "red", "big", 0.3, 0.3, 0.2), SceneObject("ring", "white", "small", 0.7, 0.7, 0.13)),
        1,
    )
    assert CHANGES["place"].right(item) == ("in the sea .",)
    assert CHANGES["colours"].right(item) == ("red and white .",)
    assert CHANGES["recoloured"].right(item) == (
        "a star that is big and blue at the top left and "
        "a ring that is small and white at the bottom right in the sea .",
        "a big blue star at the top left and a small white ring at the bottom right in the sea .",
    )
