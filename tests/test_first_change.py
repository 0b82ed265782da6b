"""Where hooks first act: every rule, point, condition and kind of intervention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.batch import Batch
from hooked_mm.conditions import Above
from hooked_mm.first_change import Change, first_changed, start_of
from hooked_mm.hooked import HookedMM
from hooked_mm.interventions import Add, ProjectOut, Replace, Scale, SetComponent
from hooked_mm.knockout import KnockOut
from hooked_mm.patching import Patch
from hooked_mm.positions import GENERATED, IMAGE, LAST_PROMPT, PROMPT, QUESTION, Positions

POINT = "blocks.1.hook_resid_post"
V = torch.ones(128)
PROMPTS = ["what colour is the circle ?", "what ?", "describe the scene ."]
WORDS: dict[str, Change] = {
    "generated": "generated",
    "last_prompt": "last_prompt",
    "answer": "generated",
    "all": "prompt",
    "prompt": "prompt",
    "image": "prompt",
    "text": "prompt",
    "question": "prompt",
    "template": "prompt",
    "pad": "prompt",
}


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Three prompts of different lengths, padded on the left."""
    return llava.prepare(images[:3], PROMPTS)


def add(at: Any, point: Any = POINT) -> Add:
    """A vector added somewhere."""
    return Add(point, V, at=at)


@pytest.mark.parametrize("word", WORDS)
def test_rules_by_their_words(llava: HookedMM, batch: Batch, word: str) -> None:
    """A word, alone and with a later one beside it; several hooks are as early as the earliest."""
    assert first_changed([add(word)], llava, batch) == WORDS[word]
    assert first_changed([add(GENERATED), add(word), add(GENERATED)], llava, batch) == WORDS[word]
    assert first_changed([add(GENERATED) + add(word)], llava, batch) == WORDS[word]


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (GENERATED | LAST_PROMPT, "last_prompt"),
        (GENERATED & LAST_PROMPT, "generated"),
        (~PROMPT, "generated"),
        (~LAST_PROMPT, "prompt"),
        (IMAGE & LAST_PROMPT, "generated"),
        (QUESTION | GENERATED, "prompt"),
        (Positions(index=-1), "last_prompt"),
        (Positions(start=-1), "last_prompt"),
        (Positions(start=-2), "prompt"),
        (Positions(index=0), "prompt"),
        (Positions(index=999), "prompt"),
        (Positions(last_prompt=True, sample=1), "last_prompt"),
    ],
)
def test_rules_are_resolved_in_the_batch(llava: HookedMM, batch: Batch, rule: Any, found: Change) -> None:
    """Unions, intersections, complements, numbers; one that makes no sense there can't be told."""
    assert first_changed([add(rule)], llava, batch) == found


@pytest.mark.parametrize(
    ("point", "found"),
    [
        ("blocks.*.hook_resid_post", "generated"),
        (["blocks.0.hook_mlp_out", "blocks.2.attn.hook_z"], "generated"),
        (lambda name: name.startswith("blocks.3."), "prompt"),
        (lambda name: name == POINT, "generated"),
        ("*hook_resid_post", "prompt"),
        ("vision.blocks.0.hook_resid_post", "prompt"),
        ("projector.hook_out", "prompt"),
        ("blocks.0.attn.hook_rot_k", "prompt"),
    ],
)
def test_points_of_the_tower_come_first(llava: HookedMM, batch: Batch, point: Any, found: Change) -> None:
    """By name, glob, list and function; keys that attention has of all positions are none of the last."""
    if isinstance(point, str) and point.endswith("rot_k") and point not in llava.hook_names:
        pytest.skip("this model has no such point")
    assert first_changed([add("generated", point)], llava, batch) == found


def test_conditions_are_asked_where_they_look(llava: HookedMM, batch: Batch) -> None:
    """Those of a whole sample at their own positions, those of each position where the intervention acts."""
    for over in ("any", "mean"):
        for at, found in (("last_prompt", "last_prompt"), ("image", "prompt"), ("all", "prompt")):
            asked = add("generated").when(Above(V, 0.0, POINT, over=over, at=at))  # type: ignore[arg-type]
            assert first_changed([asked], llava, batch) == found
            assert first_changed([add("generated") + asked], llava, batch) == found
            assert first_changed([asked.when(Above(V, 0.0, POINT))], llava, batch) == found
    each = Above(V, 0.0, POINT)
    assert first_changed([add("generated").when(each)], llava, batch) == "generated"
    assert first_changed([add("last_prompt").when(each)], llava, batch) == "last_prompt"
    assert first_changed([add("image").when(each)], llava, batch) == "prompt"
    tower = Above(torch.ones(64), 0.0, "projector.hook_out", over="any", at="all")
    assert first_changed([add("generated").when(tower)], llava, batch) == "prompt"


def test_what_cannot_be_told_is_of_the_prompt(llava: HookedMM, batch: Batch) -> None:
    """Functions, subclasses, attention, patches; nothing at all changes nothing."""

    class Own(Add):
        """Whatever it does."""

    assert first_changed([], llava, batch) == "generated"
    value = torch.zeros(3, batch.length, 128)
    for hook in (
        (POINT, lambda value, hook: None),
        Own(POINT, V, at="generated"),
        KnockOut(0, queries="generated"),
        Patch(POINT, value, at="last_prompt", batch=batch),
    ):
        assert first_changed([hook], llava, batch) == "prompt"  # type: ignore[list-item]
    for known in (ProjectOut(POINT, V, at="generated"), Replace(POINT, 0, at="generated")):
        assert first_changed([known], llava, batch) == "generated"
    for known in (Scale(POINT, 2, at="last_prompt"), SetComponent(POINT, V, 1, at="last_prompt")):
        assert first_changed([known], llava, batch) == "last_prompt"


@given(st.lists(st.sampled_from(["", "a red circle", "the", "a big blue star in the sea"]), min_size=3, max_size=3))
def test_an_answer_that_is_begun_moves_the_start(llava: HookedMM, images: list[Image.Image], begun: list[str]) -> None:
    """The start is the earliest last prompt position; what is given of answers comes behind it."""
    batch = llava.prepare(images[:3], PROMPTS, answer_prefix=[text or None for text in begun])
    answered = (batch.role == 3).sum(dim=1)
    assert start_of(batch) == batch.length - 1 - int(answered.max())
    assert first_changed([add("last_prompt")], llava, batch) == "last_prompt"
    assert first_changed([add("answer")], llava, batch) == ("last_prompt" if any(begun) else "generated")
