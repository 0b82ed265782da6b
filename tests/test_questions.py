"""Questions: every answer found anew from the words of the question and the scene's raw numbers."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from hooked_mm.scenes.questions import QUESTION_TYPES, Question, questions, references
from hooked_mm.scenes.world import COLOURS, HELD_OUT, SHAPES, SPLITS, Scene, SceneObject, scene

MANY = {split: [scene(split, index, 42) for index in range(250)] for split in ("train", "test", "unseen")}
ASKED: list[tuple[Scene, Question]] = [
    (item, question)
    for items in MANY.values()
    for number, item in enumerate(items)
    for question in questions(item, np.random.default_rng([9, number]))
]
HELD = {(colour, shape) for shape, colour in HELD_OUT.items()}


def where(item: SceneObject) -> str:
    """The quarter of the canvas."""
    return f"{'top' if item.y < 0.5 else 'bottom'} {'left' if item.x < 0.5 else 'right'}"


def named(item: Scene, words: list[str]) -> SceneObject:
    """The one object that "the red star", "the star", "the red object" or "the object at the top left" means."""
    match words:
        case ["the", "object", "at", "the", *place]:
            found = [o for o in item.objects if where(o) == " ".join(place)]
        case ["the", *rest]:
            found = [o for o in item.objects if all(word in (o.shape, o.colour) for word in rest if word != "object")]
    assert len(found) == 1, f"{words} does not name one object of {item}"
    return found[0]


def truth(item: Scene, text: str) -> str:
    """The answer, by reading the question."""
    shapes, colours = [o.shape for o in item.objects], [o.colour for o in item.objects]
    match text.split():
        case ["what", "colour", "is", *name, "?"]:
            return named(item, name).colour
        case ["what", "shape", "is", "at", "the", *place, "?"]:
            return named(item, ["the", "object", "at", "the", *place]).shape
        case ["what", "shape", "is", *name, "?"]:
            return named(item, name).shape
        case ["is", *name, "big", "or", "small", "?"]:
            return "big" if named(item, name).radius > 0.165 else "small"
        case ["where", "is", *name, "?"]:
            return where(named(item, name))
        case ["what", "place", "is", "this", "?"]:
            return item.place
        case ["how", "many", "objects", "are", "there", "?"]:
            return ["one", "two", "three"][len(item.objects) - 1]
        case ["is", "there", "a", colour, "object", "?"]:
            return "yes" if colour in colours else "no"
        case ["is", "there", "a", shape, "?"]:
            return "yes" if shape in shapes else "no"
        case ["is", "there", "a", colour, shape, "?"]:
            return "yes" if (colour, shape) in zip(colours, shapes, strict=True) else "no"
        case ["is", *rest]:
            return related(item, rest)
    raise AssertionError(f"a question of unknown form: {text!r}")


def related(item: Scene, words: list[str]) -> str:
    """Which of the two it is; the objects must differ enough for the question to be fair."""
    level = "left or right of" in " ".join(words)
    middle = words.index("left" if level else "above")
    one, other = named(item, words[:middle]), named(item, words[middle + (4 if level else 3) : -1])
    difference = one.x - other.x if level else one.y - other.y
    assert abs(difference) >= 0.12
    return (("left", "right") if level else ("above", "below"))[int(difference > 0)]


def test_every_answer_is_true() -> None:
    """Each answer is what geometry and attributes say; every reference names one object alone."""
    for item, question in ASKED:
        assert question.answer == truth(item, question.text), (question, item)


def test_what_a_question_is_about() -> None:
    """Where a question says which object it is about, the answer is that object's attribute."""
    for _, question in ASKED:
        name = {"where": "position", "shape at": "shape"}.get(question.type, question.type)
        assert (question.about is not None) == (name in ("colour", "shape", "size", "position"))
        if question.about is not None:
            assert getattr(question.about, name) == question.answer


def test_types_stand_in_order_and_once() -> None:
    """At most one question of a type per scene; place, count and the three yes/no types always; all occur."""
    for items in MANY.values():
        for number, item in enumerate(items):
            kinds = [question.type for question in questions(item, np.random.default_rng(number))]
            assert kinds == sorted(set(kinds), key=QUESTION_TYPES.index)
            assert {"place", "count", "is there a shape", "is there a colour", "is there a pair"} <= set(kinds)
            assert ("relation" in kinds) <= (len(item.objects) > 1)
    assert {question.type for _, question in ASKED} == set(QUESTION_TYPES)


def test_yes_and_no_are_balanced() -> None:
    """Each type of yes/no question is answered yes about half of the time."""
    answers = defaultdict(list)
    for _, question in ASKED:
        if question.answer in ("yes", "no"):
            answers[question.type].append(question.answer == "yes")
    assert set(answers) == {"is there a shape", "is there a colour", "is there a pair"}
    for kind, values in answers.items():
        # 4 standard deviations of a fair coin.
        assert np.mean(values) == pytest.approx(0.5, abs=2 / np.sqrt(len(values))), kind


def test_hard_negatives() -> None:
    """Most "no" pairs in scenes of several objects are made of words that are both true, so that neither alone tells.

    Every other negative has one true word.
    """
    trues = Counter()
    for item, question in ASKED:
        if question.type == "is there a pair" and question.answer == "no" and len(item.objects) > 1:
            *_, colour, shape, _ = question.text.split()
            trues[any(o.colour == colour for o in item.objects) + any(o.shape == shape for o in item.objects)] += 1
    assert set(trues) == {1, 2}
    assert 0.5 < trues[2] / trues.total() < 0.8


def test_a_held_out_pair_is_named_only_where_it_is_shown() -> None:
    """No training, validation or test question names one; in `unseen` some do, about a scene that shows it."""
    met = Counter()
    for item, question in ASKED:
        words = question.text.split()
        for pair in HELD:
            if any(tuple(words[n : n + 2]) == pair for n in range(len(words))):
                assert pair in {(o.colour, o.shape) for o in item.objects}
                met[item.held_out] += 1
    assert set(met) == {True}


def test_answers_are_varied() -> None:
    """No answer of a type is much commoner than another, so that guessing does not pay."""
    answers = defaultdict(Counter)
    for _, question in ASKED:
        answers[question.type][question.answer] += 1
    expected = {"colour": len(COLOURS), "shape": len(SHAPES), "where": 4, "size": 2, "place": 6, "relation": 4}
    for kind, options in expected.items():
        assert len(answers[kind]) == options
        assert max(answers[kind].values()) / answers[kind].total() < 1.6 / options + 0.02


def test_references_by_hand() -> None:
    """A phrase is a reference only if no other object of the scene fits it."""
    red_star = SceneObject("star", "red", "big", 0.3, 0.3, 0.2)
    red_ring = SceneObject("ring", "red", "big", 0.7, 0.3, 0.2)
    blue_star = SceneObject("star", "blue", "big", 0.3, 0.7, 0.2)
    world = Scene("sea", (red_star, red_ring, blue_star), 0)
    kinds = ("shape", "colour", "colour shape", "position")
    assert references(world, red_star, kinds) == ["the red star", "the object at the top left"]
    assert references(world, red_ring, kinds) == ["the ring", "the red ring", "the object at the top right"]
    assert references(world, blue_star, ("colour",)) == ["the blue object"]


def test_known_questions() -> None:
    """The first questions of each split, word for word: shipped models were trained and evaluated on this stream."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(20):
            for question in questions(scene(split, index), np.random.default_rng(index)):
                digest.update(f"{question.type}|{question.text}|{question.answer}\n".encode())
    assert digest.hexdigest()[:16] == "03215389ca2649e2"
