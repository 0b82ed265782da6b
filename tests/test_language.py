"""What is said about a scene is true of it, balanced, and within the vocabulary."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hooked_mm.scenes.language import (
    CAPTION_PROMPT,
    QUESTION_TYPES,
    WORD_CLASSES,
    Question,
    caption,
    caption_slots,
    questions,
    vocabulary,
)
from hooked_mm.scenes.world import Scene, SceneObject, scene
from hooked_mm.small import small_model_path

SCENES = st.builds(scene, st.integers(0, 5000), st.integers(0, 5000))
MANY = [scene(42, index) for index in range(600)]
NUMBERS = ("one", "two")


def truth(item: Scene, text: str) -> str:
    """The answer to a question, found anew from its words and the scene's raw numbers."""
    words = text.split()

    def where(o: SceneObject) -> str:
        return f"{'top' if o.y < 0.5 else 'bottom'} {'left' if o.x < 0.5 else 'right'}"

    def only(matching: list[SceneObject]) -> SceneObject:
        assert len(matching) == 1, f"{text!r} does not name one object of {item}"
        return matching[0]

    match words:
        case ["what", "colour", "is", "the", shape, "?"]:
            return only([o for o in item.objects if o.shape == shape]).colour
        case ["what", "shape", "is", "the", colour, "object", "?"]:
            return only([o for o in item.objects if o.colour == colour]).shape
        case ["is", "the", shape, "big", "or", "small", "?"]:
            return "big" if only([o for o in item.objects if o.shape == shape]).radius > 0.15 else "small"
        case ["where", "is", "the", shape, "?"]:
            return where(only([o for o in item.objects if o.shape == shape]))
        case ["what", "shape", "is", "at", "the", vertical, horizontal, "?"]:
            return only([o for o in item.objects if where(o) == f"{vertical} {horizontal}"]).shape
        case ["what", "place", "is", "this", "?"]:
            return item.place
        case ["how", "many", "objects", "are", "there", "?"]:
            return NUMBERS[len(item.objects) - 1]
        case ["is", "there", "a", colour, "object", "?"]:
            return "yes" if any(o.colour == colour for o in item.objects) else "no"
        case ["is", "there", "a", shape, "?"]:
            return "yes" if any(o.shape == shape for o in item.objects) else "no"
        case ["is", "there", "a", colour, shape, "?"]:
            return "yes" if any((o.colour, o.shape) == (colour, shape) for o in item.objects) else "no"
    raise AssertionError(f"a question of unknown form: {text!r}")


def asked(item: Scene, seed: int = 0) -> list[Question]:
    """One question of every type."""
    return questions(item, np.random.default_rng([9, seed]))


def test_every_answer_is_true() -> None:
    """Each answer is what the scene's geometry and attributes say, re-derived from the question's words."""
    for number, item in enumerate(MANY):
        for question in asked(item, number):
            assert question.answer == truth(item, question.text), question


@given(SCENES, st.integers(0, 1000))
def test_one_question_of_every_type(item: Scene, seed: int) -> None:
    """All types in a fixed order; the same generator gives the same questions."""
    assert tuple(question.type for question in asked(item, seed)) == QUESTION_TYPES
    assert asked(item, seed) == asked(item, seed)


def test_yes_and_no_are_balanced() -> None:
    """Over 600 scenes each kind of yes/no question is answered yes about half of the time."""
    answers = defaultdict(list)
    for number, item in enumerate(MANY):
        for question in asked(item, number):
            if question.answer in ("yes", "no"):
                answers[question.type].append(question.answer == "yes")
    assert set(answers) == {"is there a shape", "is there a colour", "is there a pair"}
    for kind, values in answers.items():
        assert len(values) == len(MANY)
        # 4 standard deviations of a fair coin.
        assert np.mean(values) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(600)), kind


def test_hard_negatives_occur() -> None:
    """Many "no" pairs join the colour of one object with the shape of the other, so neither word alone tells."""
    hard = negatives = 0
    for number, item in enumerate(MANY):
        question = asked(item, number)[-1]
        if question.answer == "no" and len(item.objects) == 2:
            *_, colour, shape, _ = question.text.split()
            negatives += 1
            hard += any(o.colour == colour for o in item.objects) and any(o.shape == shape for o in item.objects)
    assert 0.5 < hard / negatives < 0.9


def test_questions_about_both_objects_occur() -> None:
    """The first and the second object are asked about equally often."""
    pairs = [(item, asked(item, n)[0]) for n, item in enumerate(MANY) if len(item.objects) == 2]
    first = [question.text.split()[4] == item.objects[0].shape for item, question in pairs]
    assert np.mean(first) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(first)))


def test_a_caption_written_by_hand() -> None:
    """The caption of a scene built by hand, word for word: attributes come after their noun."""
    ring = SceneObject("ring", "blue", "big", 0.25, 0.3, 0.19)
    star = SceneObject("star", "red", "small", 0.7, 0.7, 0.1)
    assert caption(Scene("sea", (ring, star), 0)) == (
        "a ring that is big and blue at the top left and a star that is small and red at the bottom right in the sea ."
    )
    assert caption(Scene("snow", (star,), 0)) == "a star that is small and red at the bottom right in the snow ."


@given(SCENES)
def test_captions_can_be_read_back(item: Scene) -> None:
    """A caption's slots are every attribute of every object in order, and the place: nothing lost, nothing added."""
    assert caption_slots(caption(item)) == {
        "shapes": [o.shape for o in item.objects],
        "colours": [o.colour for o in item.objects],
        "sizes": [o.size for o in item.objects],
        "positions": [o.position for o in item.objects],
        "places": [item.place],
        "counts": [],
    }


def test_slots_are_whole_words() -> None:
    """Parts of words and of phrases do not count."""
    slots = caption_slots("a redder encircled ring at the top of the left snowfield , two top left stars")
    assert slots == {
        "shapes": ["ring"],
        "colours": [],
        "sizes": [],
        "positions": ["top left"],
        "places": [],
        "counts": ["two"],
    }
    assert caption_slots("a cat and a dog", {"animals": ("dog", "cat")}) == {"animals": ["cat", "dog"]}


def test_vocabulary_covers_everything_said() -> None:
    """With the shipped tokenizer nothing that is generated becomes <unk>, and each listed word is one token."""
    tokenizer = AutoTokenizer.from_pretrained(small_model_path("llava"))
    texts = [CAPTION_PROMPT]
    for number, item in enumerate(MANY):
        texts.append(caption(item))
        texts += [f"{question.text} {question.answer}" for question in asked(item, number)]
    said = {word for text in texts for word in text.split()}
    assert said <= set(vocabulary())
    encoded = tokenizer(sorted({*said, *vocabulary()}), add_special_tokens=False)["input_ids"]
    assert all(len(ids) == 1 and ids[0] != tokenizer.unk_token_id for ids in encoded)
    # Words of the chat template aside, the vocabulary holds nothing that nobody says.
    assert set(vocabulary()) - said <= {"user", "assistant", ":"}


def test_word_classes_are_disjoint() -> None:
    """No word belongs to two classes, so that a word tells its class."""
    words = [word for options in WORD_CLASSES.values() for word in options]
    assert len(set(words)) == len(words)
