"""Scores of small models: right on stand-ins whose score is known, and on a real processor with mixed pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import STYLES, caption
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.questions import QUESTION_TYPES, Question
from hooked_mm.scenes.world import CANVASES, Scene, scene
from hooked_mm.small import evaluate as module
from hooked_mm.small.accuracy import HELD_OUT_OBJECT, Accuracy, Share, mean
from hooked_mm.small.evaluate import (
    Asked,
    answers,
    constant_answer,
    count_captions,
    count_right,
    main,
    measure,
    slots,
    strangers,
)
from hooked_mm.small.families import FAMILIES, build

TRUE = "a ring that is big and blue at the top left and a star that is small and red at the bottom right in the sea ."


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (TRUE, {"shapes": (2, 2), "colours": (2, 2), "sizes": (2, 2), "positions": (2, 2), "places": (1, 1)}),
        ("", {"shapes": (0, 2), "colours": (0, 2), "sizes": (0, 2), "positions": (0, 2), "places": (0, 1)}),
        (
            TRUE.replace("red", "green").replace("sea", "snow"),
            {"shapes": (2, 2), "colours": (1, 2), "sizes": (2, 2), "positions": (2, 2), "places": (0, 1)},
        ),
        # Right words in the wrong slots are wrong.
        (
            TRUE.replace("ring", "x").replace("star", "ring").replace("x", "star"),
            {"shapes": (0, 2), "colours": (2, 2), "sizes": (2, 2), "positions": (2, 2), "places": (1, 1)},
        ),
        # One object left out: half of its slots are right.
        (
            "a ring that is big and blue at the top left in the sea .",
            {"shapes": (1, 2), "colours": (1, 2), "sizes": (1, 2), "positions": (1, 2), "places": (1, 1)},
        ),
        # One object too many: saying more must not help.
        (
            f"{TRUE[:-1]}and a cross that is big and black at the top right in the sea .",
            {"shapes": (2, 3), "colours": (2, 3), "sizes": (2, 3), "positions": (2, 3), "places": (1, 2)},
        ),
    ],
    ids=["right", "nothing", "two words wrong", "swapped", "an object left out", "an object too many"],
)
def test_slots(said: str, expected: dict[str, tuple[int, int]]) -> None:
    """Right words per class, counted by hand."""
    assert slots(said, TRUE) == {name: Share(*counts) for name, counts in expected.items()}


def test_classes_that_a_style_does_not_name_have_no_slots() -> None:
    """Only the place, only the shapes."""
    assert slots("in the sea .", "in the snow .") == {"places": Share(0, 1)}
    assert slots("a ring and a star .", "a ring and a ring .") == {"shapes": Share(1, 2)}


def test_captions_count_in_either_wording() -> None:
    """For the default prompt both are right and told apart; for a style asked for only its own."""
    items = [scene("test", index) for index in range(4)]
    said = [caption(items[0], "full"), caption(items[1], "short"), caption(items[2], "colourless"), ""]
    found = count_captions(items, said, "any")
    assert (found.exact, found.wordings) == (Share(2, 4), {"full": 1, "short": 1})
    assert found.attributes["places"] == Share(3, 4)
    asked = count_captions(items, said, "short")
    assert (asked.exact, asked.wordings) == (Share(1, 4), {"short": 1})


def test_chance_is_the_best_constant_answer() -> None:
    """By hand; a relation is asked on one of two axes, each of which has a best answer of its own."""
    asked = [Question("colour", "?", word) for word in ("red", "red", "red", "blue")]
    asked += [Question("relation", "?", word) for word in ("left", "left", "right", "above", "below", "below")]
    best = constant_answer(asked)
    assert (best["colour"], best["relation"]) == (Share(3, 4), Share(4, 6))
    assert best["count"] == Share(0, 0)
    right = count_right(asked, ["red"] * 4 + ["left"] * 6)
    assert (right["colour"], right["relation"]) == (Share(3, 4), Share(2, 6))


@given(st.integers(1, 6), st.sampled_from(["test", "unseen"]), st.integers(0, 3))
def test_strangers_are_other_scenes_of_the_same_canvas(count: int, split: Any, seed: int) -> None:
    """Never the scene itself, none twice, of the same split."""
    own = [scene(split, index, seed) for index in range(count)]
    others = strangers(own, split, seed)
    assert [(o.width, o.height) for o in others] == [(o.width, o.height) for o in own]
    assert len({id(o) for o in others}) == count
    assert not set(others) & set(own)
    assert all(o.held_out == (split == "unseen") for o in others)


@dataclass
class Pretender:
    """Stands in for a model. It knows scenes by their pictures and answers by looking a question up in the *shown*
    scene's facts, or always says one word. `asked` remembers the batches: picture sizes, and new tokens allowed.
    """

    scenes: Sequence[Scene]
    word: str | None = None
    style: str = "full"
    batches: list[tuple[set[tuple[int, int]], int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = {picture(item).tobytes(): item for item in self.scenes}

    def prepare(self, images: Sequence[Image.Image], text: Sequence[str]) -> list[tuple[Image.Image, str]]:
        return list(zip(images, text, strict=True))

    def generate(self, batch: list[tuple[Image.Image, str]], length: int) -> SimpleNamespace:
        self.batches.append(({image.size for image, _ in batch}, length, len(batch)))
        said = [self.say(self.known[image.tobytes()], text) for image, text in batch]
        return SimpleNamespace(text=[" ".join(text.split()[:length]) for text in said])

    def say(self, item: Scene, text: str) -> str:
        if self.word is not None:
            return self.word
        for name, style in STYLES.items():
            if text == style.prompt:
                return caption(item, self.style if name == "any" else name)
        return look_up(item, text)


def look_up(item: Scene, text: str) -> str:
    """The answer by the words of the question alone, from the scene that is shown; "nothing" where it has no such."""
    words = text.rstrip(" ?").split()
    if text == "what place is this ?":
        return item.place
    if words[:2] == ["how", "many"]:
        return ("one", "two", "three")[len(item.objects) - 1]
    if words[:2] == ["is", "there"]:
        wanted = set(words[3:]) - {"object"}
        return "yes" if any(wanted <= {o.colour, o.shape} for o in item.objects) else "no"
    for question, ends in (("left or right", ("left", "right")), ("above or below", ("above", "below"))):
        if question in text:
            first, second = (
                find(item, part) for part in text[3:].replace(" of", "").rstrip(" ?").split(f" {question} ")
            )
            if first is None or second is None:
                return "nothing"
            axis = "x" if "left" in ends else "y"
            return ends[getattr(first, axis) > getattr(second, axis)]
    found = find(item, text)
    attribute = {"where": "position", "is": "size"}.get(words[0], words[1])
    return "nothing" if found is None else str(getattr(found, attribute))


def find(item: Scene, text: str) -> Any:
    """The first object with every attribute that a phrase names."""
    for o in item.objects:
        named = [word for word in text.split() if word in (*"red green blue yellow purple orange white black".split(),)]
        shapes = [word for word in text.split() if word in "circle square triangle star cross ring".split()]
        where = [f"{a} {b}" for a in ("top", "bottom") for b in ("left", "right") if f"at the {a} {b}" in text]
        wanted = [*((word, o.colour) for word in named), *((word, o.shape) for word in shapes)]
        if all(word == own for word, own in [*wanted, *((word, o.position) for word in where)]):
            return o
    return None


@pytest.fixture(scope="module")
def known() -> list[Scene]:
    """All scenes that a measurement with 20 scenes can show."""
    return [scene(split, index) for split in ("test", "unseen") for index in range(90 if split == "test" else 12)]


def run(model: Pretender, count: int = 20) -> Accuracy:
    """Measure a stand-in."""
    return measure(cast(HookedMM, model), count)


@pytest.fixture(scope="module")
def seeing(known: list[Scene]) -> tuple[Pretender, Accuracy]:
    """A stand-in that looks every question up in the scene it is shown."""
    model = Pretender(known)
    return model, run(model)


def test_who_sees_everything_is_always_right(seeing: tuple[Pretender, Accuracy]) -> None:
    """On seen and unseen pairs, in every style; by the number of scenes that the table promises."""
    found = seeing[1]
    for split, scenes in (("test", 20), ("unseen", 12)):
        assert all(share.right == share.of for share in found.questions[split].values())
        assert found.questions[split]["place"].of == scenes
        assert {name: c.exact for name, c in found.captions[split].items()} == {
            name: Share(scenes, scenes) if name == "any" else Share(6, 6) for name in STYLES
        }
    assert found.captions["test"]["any"].wordings == {"full": 20, "short": 0}
    asked = {"colour", "shape", "size", "where", "shape at", "is there a pair"}
    assert set(found.questions[HELD_OUT_OBJECT]) <= asked
    # Every scene of `unseen` shows such a pair, but is not always asked about it.
    assert 0 < found.questions[HELD_OUT_OBJECT]["is there a pair"].of < 12
    assert 0 < found.questions[HELD_OUT_OBJECT]["where"].of < 12


def test_who_sees_another_picture_is_not(seeing: tuple[Pretender, Accuracy]) -> None:
    """The question's own scene gives the answer, another one the picture: perfect eyes then are near chance."""
    found = seeing[1]
    assert found.wrong_image["place"].of == 8
    assert mean(found.wrong_image) < mean(found.chance) + 0.15
    assert mean(found.wrong_image) < 0.6
    assert found.wrong_image_captions == Share(0, 8)


def test_who_looks_at_nothing_gets_at_most_chance(known: list[Scene]) -> None:
    """One word for everything, with the right picture and the wrong one alike; never more than the best constant."""
    found = run(Pretender(known, word="yes"))
    for kind in QUESTION_TYPES:
        assert found.wrong_image[kind].right <= found.chance[kind].right
        assert found.wrong_image[kind].of == found.chance[kind].of
    assert found.questions["test"]["place"].right == 0
    assert found.wrong_image["is there a shape"].right > 0
    assert found.captions["test"]["full"].exact.right == 0


def test_an_answer_that_goes_on_is_wrong(known: list[Scene]) -> None:
    """One token more than the right answer is generated, so that going on shows."""

    class Chatty(Pretender):
        def say(self, item: Scene, text: str) -> str:
            return f"{super().say(item, text)} yes"

    assert all(share.right == 0 for share in run(Chatty(known), 4).questions["test"].values())


def test_batches_have_pictures_of_one_size(seeing: tuple[Pretender, Accuracy]) -> None:
    """And as many new tokens as their answers need."""
    batches = seeing[0].batches
    assert all(len(sizes) == 1 and count <= module.BATCH for sizes, _, count in batches)
    assert {length for _, length, _ in batches} == {2, 3, module.CAPTION_TOKENS}
    longest = max(len(caption(scene("test", index, count=3)).split()) for index in range(5))
    assert longest < module.CAPTION_TOKENS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_processor_with_pictures_of_every_size(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers do not depend on what else is asked; a saved model is measured and written down by the command."""
    torch.manual_seed(0)
    model, processor = build(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    hooked = HookedMM(model.eval(), processor, check=False)
    shown = {(o.width, o.height): o for o in (scene("test", index) for index in range(30))}
    assert set(shown) == set(CANVASES)
    texts = ["what place is this ?", "describe the scene ."]
    asked = [Asked(picture(item), text, 3) for item in shown.values() for text in texts]
    alone = [answers(hooked, [one], "alone")[0] for one in asked]
    assert answers(hooked, asked, "together") == alone
    together = hooked.prepare([one.image for one in asked], [one.text for one in asked])
    assert hooked.generate(together, 3).text == alone
    monkeypatch.setattr(module, "STYLES", {"any": STYLES["any"]})
    monkeypatch.setattr(module, "CAPTION_TOKENS", 3)
    main([str(tmp_path), "--scenes", "2", "--seed", "5"])
    found = Accuracy.load(tmp_path)
    assert (found.seed, found.questions["test"]["count"].of, found.questions["unseen"]["count"].of) == (5, 2, 2)


def test_questions_do_not_depend_on_how_many_scenes_there_are(known: list[Scene]) -> None:
    """Fewer scenes ask the beginning of what more scenes ask."""

    class Writing(Pretender):
        def prepare(self, images: Sequence[Image.Image], text: Sequence[str]) -> list[tuple[Image.Image, str]]:
            seen.update(text)
            return super().prepare(images, text)

    seen: Counter[str] = Counter()
    run(Writing(known), 2)
    few, seen = seen, Counter()
    run(Writing(known), 3)
    assert few <= seen
    assert sum(few.values()) < sum(seen.values())
