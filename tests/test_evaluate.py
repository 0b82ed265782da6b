"""Scores of the small models: right on models whose score is known, and high on the shipped one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.language import CAPTION_PROMPT, QUESTION_TYPES, caption
from hooked_mm.small import small_model_path
from hooked_mm.small.evaluate import Evaluation, evaluate, slot_accuracy, write_model_card
from tests.test_language import truth

TRUE = "a ring that is big and blue at the top left and a star that is small and red at the bottom right in the sea ."


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (TRUE, {"shapes": 1.0, "colours": 1.0, "sizes": 1.0, "positions": 1.0, "places": 1.0}),
        ("", {"shapes": 0.0, "colours": 0.0, "sizes": 0.0, "positions": 0.0, "places": 0.0}),
        (
            TRUE.replace("red", "green").replace("sea", "snow"),
            {"shapes": 1.0, "colours": 0.5, "sizes": 1.0, "positions": 1.0, "places": 0.0},
        ),
        # Right words in the wrong slots are wrong.
        (
            TRUE.replace("ring", "x").replace("star", "ring").replace("x", "star"),
            {"shapes": 0.0, "colours": 1.0, "sizes": 1.0, "positions": 1.0, "places": 1.0},
        ),
        # One object left out: half of its slots are right.
        (
            "a ring that is big and blue at the top left in the sea .",
            {"shapes": 0.5, "colours": 0.5, "sizes": 0.5, "positions": 0.5, "places": 1.0},
        ),
        # One object too many: saying more must not help.
        (
            f"{TRUE[:-1]}and a cross that is big and black at the top right in the sea .",
            {"shapes": 2 / 3, "colours": 2 / 3, "sizes": 2 / 3, "positions": 2 / 3, "places": 1 / 2},
        ),
    ],
    ids=["right", "nothing", "two words wrong", "swapped", "an object left out", "an object too many"],
)
def test_slot_accuracy(said: str, expected: dict[str, float]) -> None:
    """Shares of right words per class, counted by hand."""
    assert slot_accuracy(said, TRUE) == pytest.approx(expected)


@dataclass
class Pretender:
    """Stands in for a model: it knows every test picture and answers by a rule, or always says one word."""

    word: str | None

    def prepare(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[tuple[bytes, str]]:
        """What was shown and asked."""
        return [(image.tobytes(), prompt) for image, prompt in zip(images, prompts, strict=True)]

    def generate(self, batch: list[tuple[bytes, str]], max_new_tokens: int) -> SimpleNamespace:
        """The truth about the picture that was shown."""
        return SimpleNamespace(text=[self.answer(*item) for item in batch])

    def answer(self, pixels: bytes, prompt: str) -> str:
        """One answer; about what is not in the picture the pretender says nothing."""
        if self.word is not None:
            return self.word
        item = KNOWN[pixels]
        try:
            return caption(item) if prompt == CAPTION_PROMPT else truth(item, prompt)
        except AssertionError:
            return ""


DATA = SceneDataset(30, split="test", seed=5)
KNOWN = {picture(DATA.scene(index)).tobytes(): DATA.scene(index) for index in range(30)}


def pretend(monkeypatch: pytest.MonkeyPatch, word: str | None) -> Evaluation:
    """The evaluation of a pretender."""
    monkeypatch.setattr(HookedMM, "from_pretrained", lambda *_, **__: Pretender(word))
    return evaluate("nowhere", 30, seed=5)


def test_a_perfect_model_scores_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers from the picture that is shown has everything right, and fails when it is another scene's."""
    result = pretend(monkeypatch, None)
    assert result.questions == dict.fromkeys(QUESTION_TYPES, 1.0)
    assert set(result.caption_attributes) == {"shapes", "colours", "sizes", "positions", "places"}
    assert (result.mean_question, result.mean_caption_attribute, result.exact_captions) == (1.0, 1.0, 1.0)
    assert 0 < result.wrong_image < 0.6
    assert result.scenes == 30


def test_a_model_that_always_says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the yes/no questions and nothing else, with any picture."""
    result = pretend(monkeypatch, "yes")
    for kind, share in result.questions.items():
        assert 0.2 < share < 0.8 if kind.startswith("is there") else share == 0
    assert result.mean_question == pytest.approx(np.mean(list(result.questions.values())))
    assert result.wrong_image == pytest.approx(result.mean_question)
    assert (result.exact_captions, result.mean_caption_attribute) == (0, 0)


@pytest.fixture(scope="module")
def shipped() -> Evaluation:
    """The shipped model on forty scenes."""
    return evaluate(small_model_path("llava"), 40)


def test_the_shipped_model_sees(shipped: Evaluation) -> None:
    """It answers questions and captions scenes, and does so from the picture."""
    assert set(shipped.questions) == set(QUESTION_TYPES)
    assert shipped.mean_question >= 0.95
    assert shipped.mean_caption_attribute >= 0.95
    assert min(shipped.questions.values()) >= 0.85
    assert shipped.exact_captions >= 0.85
    assert shipped.wrong_image < 0.6


def test_the_model_card_tells_the_scores(tmp_path: Path) -> None:
    """Every number of the evaluation stands in the card, beside how the model was made."""
    numbers = {kind: 0.5 + n / 100 for n, kind in enumerate(QUESTION_TYPES)}
    slots = {"shapes": 0.11, "places": 0.13}
    result = Evaluation(123, numbers, slots, exact_captions=0.777, wrong_image=0.321)
    (tmp_path / "mine").mkdir()
    write_model_card(tmp_path / "mine", result, 4.2, {"seed": 9, "output": "/secret", "batch": 16})
    card = (tmp_path / "mine" / "README.md").read_text()
    assert all(f"{kind} | {value:.3f} |" in card for kind, value in (numbers | slots).items())
    for part in ("| **0.545** |", "| **0.120** |", "0.777", "0.321", "123 fresh scenes", "4.2 minutes", "seed 9"):
        assert part in card, part
    assert card.startswith("# mine")
    assert "/secret" not in card
