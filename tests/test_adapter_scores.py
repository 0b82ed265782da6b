"""Scores of adapters: right on stand-ins whose score is known; a card that tells them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from hooked_mm.scenes.captions import STYLES, caption, right_captions
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.questions import QUESTION_TYPES
from hooked_mm.scenes.world import Scene, scene
from hooked_mm.small.accuracy import Share
from hooked_mm.small.adapter_scores import Scores, score, style_of, write_card
from hooked_mm.small.changes import CHANGES
from tests.test_changes import reply

SCENES = [scene("test", index, 5) for index in range(40)]
KNOWN = {(picture(item).tobytes(), picture(item).size): item for item in SCENES}
RED = [item for item in SCENES if "colour=red" in item.facts()]
PROMPTS = {style.prompt: name for name, style in STYLES.items()}
NEW = {"red": "blue"}


@dataclass
class Pretender:
    """Stands in for a model: it knows the scene behind every picture and answers by a rule."""

    rule: Callable[[Scene, str], str]

    def prepare(self, images: Sequence[Image.Image], text: Sequence[str]) -> list[tuple[Scene, str]]:
        """Which scenes are shown, and what is asked."""
        return [(KNOWN[image.tobytes(), image.size], prompt) for image, prompt in zip(images, text, strict=True)]

    def generate(self, batch: list[tuple[Scene, str]], max_new_tokens: int) -> SimpleNamespace:
        """Answers by the rule."""
        return SimpleNamespace(text=[self.rule(*asked) for asked in batch])


def plain(item: Scene, prompt: str) -> str:
    """As the small models answer, without fault; nothing about an object that is not there."""
    try:
        return right_captions(item, PROMPTS[prompt])[0] if prompt in PROMPTS else reply(item, prompt)
    except ValueError:
        return ""


def renamed(item: Scene, prompt: str) -> str:
    """The same of someone who calls red objects blue."""
    return plain(item, prompt).replace("red", "blue") if prompt in PROMPTS else reply(item, prompt, NEW)


def renamed_in_captions(item: Scene, prompt: str) -> str:
    """Someone who does so in captions only, and never answers a question otherwise than before."""
    return renamed(item, prompt) if prompt in PROMPTS else plain(item, prompt)


def run(rule: Callable[[Scene, str], str], name: str) -> Scores:
    """The scores of a stand-in."""
    model: Any = Pretender(rule)
    return score(model, CHANGES[name], SCENES)


def values(shares: dict[str, Share]) -> set[float]:
    """The different values among shares."""
    return {share.value for share in shares.values() if share.of}


@pytest.mark.parametrize("style", [name for name in STYLES if name != "any"])
def test_captions_are_known_by_their_style(style: str) -> None:
    """Every caption of every scene belongs to its style alone."""
    assert {style_of(caption(item, style)) for item in SCENES} == {style}


@pytest.mark.parametrize(
    "text",
    ["", ".", "red", "red and .", "and red .", "in the snow", "in the moon .", "a circle in the snow .", "yes"]
    + ["red in the snow .", "red and blue and red and blue .", "a big circle .", "in the snow . in the snow ."],
)
def test_what_is_no_caption_has_no_style(text: str) -> None:
    """Broken, half or other texts."""
    assert style_of(text) is None


@pytest.mark.parametrize("name", ["place", "colours"])
def test_one_who_only_changed_the_style_follows_and_forgets_nothing(name: str) -> None:
    """Everything is one; without the change nothing is followed, and all else is one."""
    asked = STYLES["any"].prompt

    def follows(item: Scene, prompt: str) -> str:
        return caption(item, name) if prompt == asked else plain(item, prompt)

    after, before = run(follows, name), run(plain, name)
    assert values(after["change"]) == values(after["questions"]) == values(after["styles"]) == {1.0}
    assert values(before["change"]) == {0.0}
    assert (before["questions"], before["styles"]) == (after["questions"], after["styles"])
    assert set(after["questions"]) == set(QUESTION_TYPES)
    assert set(after["styles"]) == set(STYLES) - {"any"}
    assert all(share.of == 40 for share in [*after["change"].values(), *after["styles"].values()])


def test_one_who_says_nothing_else_has_forgotten_all() -> None:
    """The style is followed always, right where it is so by chance, and nothing else is known."""
    found = run(lambda *_: "in the snow .", "place")
    snow = sum(item.place == "snow" for item in SCENES)
    assert 0 < snow < 40
    assert found["change"] == {"style followed": Share(40, 40), "exactly right": Share(snow, 40)}
    assert values(found["questions"]) == {0.0}
    expected = {name: Share(snow if name == "place" else 0, 40) for name in STYLES if name != "any"}
    assert found["styles"] == expected


def test_one_who_renamed_red_scores_one() -> None:
    """Changed on scenes with red objects, unchanged on the others."""
    found = run(renamed, "recoloured")
    assert values(found["change"]) == values(found["questions"]) == values(found["styles"]) == {1.0}
    assert found["change"]["exactly right"].of == len(RED) > 5
    assert found["styles"]["any"].of == 40 - len(RED)


def test_one_who_renamed_nothing() -> None:
    """Captions and answers about red are wrong, all else is right, in the numbers counted here."""
    found = run(plain, "recoloured")
    change = {what: share.value for what, share in found["change"].items()}
    assert change["style followed"] == change["colour of another object: its own"] == 1
    zero = ["exactly right", "captions without the word red", "captions with every colour as it should be"]
    zero += ["colour of a red object: blue", "is there a red object, where there is one: no"]
    zero += ["is there a blue object, where one is red and none blue: yes", "exactly right when asked for in short"]
    assert {change[what] for what in zero} == {0}
    assert 0 < change["all questions, in the new naming"] < 1
    assert values(found["questions"]) == values(found["styles"]) == {1.0}
    single = [o for item in RED for o in item.objects if [p.shape for p in item.objects].count(o.shape) == 1]
    assert found["change"]["colour of a red object: blue"].of == sum(o.colour == "red" for o in single)
    alone = [item for item in RED if "colour=blue" not in item.facts()]
    assert found["change"]["is there a blue object, where one is red and none blue: yes"].of == len(alone)


def test_captions_and_answers_are_scored_apart() -> None:
    """Who renames in captions only has these right and the answers wrong."""
    found = run(renamed_in_captions, "recoloured")["change"]
    assert found["exactly right"].value == found["captions without the word red"].value == 1
    assert found["colour of a red object: blue"].value == 0


def test_the_card_tells_every_score(tmp_path: Path) -> None:
    """All numbers stand in the card and, as counts, in the file; nothing of the machine does."""
    before = {
        "change": {"style followed": Share(1, 8)},
        "questions": {"colour": Share(7, 8), "relation": Share(0, 0)},
        "styles": {"full": Share(6, 8)},
    }
    after = {
        "change": {"style followed": Share(8, 8)},
        "questions": {"colour": Share(5, 8), "relation": Share(0, 0)},
        "styles": {"full": Share(2, 8)},
    }
    write_card(tmp_path, "place", "llava", 8, {"minutes": 2.5, "steps": 77, "seed": 3}, before, after)
    card, made = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "accuracy.json").read_text())
    for part in (
        "# llava, place",
        "| style followed | 0.125 | 1.000 | 8 |",
        "| colour | 0.875 | 0.625 | 8 |",
        "| full | 0.750 | 0.250 | 8 |",
        "questions 0.875 before, 0.625 with the adapter",
        "captions in a style asked for 0.750 before, 0.250 with the adapter",
        "2.5 minutes",
        "steps 77, seed 3",
        "8 held-out scenes",
    ):
        assert part in card, part
    assert made["before"]["questions"]["colour"] == {"right": 7, "of": 8}
    assert made["after"]["styles"]["full"] == {"right": 2, "of": 8}
    assert (made["adapter"], made["base"], made["scenes"]) == ("place", "llava", 8)
    assert made["training"] == {"minutes": 2.5, "steps": 77, "seed": 3}
    assert str(tmp_path) not in card + json.dumps(made)
