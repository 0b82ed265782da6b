"""Position rules against plain Python predicates on single positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.batch import Modality, Role
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import (
    ALL,
    GENERATED,
    IMAGE,
    LAST_PROMPT,
    PROMPT,
    QUESTION,
    TEXT,
    PositionRule,
    Positions,
    as_rule,
)
from hooked_mm.runner import Hook
from tests.test_value_layout import KINDS, make_batch

RESID = "blocks.1.hook_resid_post"
# A rule, and what it means for one position told as a dictionary of plain facts.
Meaning = tuple[PositionRule, Callable[[dict[str, Any]], bool]]
SIMPLE: list[Meaning] = [
    (ALL, lambda p: p["modality"] != "pad"),
    (IMAGE, lambda p: p["modality"] == "image"),
    (TEXT, lambda p: p["modality"] == "text"),
    (Positions(modality="pad"), lambda p: p["modality"] == "pad"),
    (QUESTION, lambda p: p["role"] == "question"),
    (Positions(role="answer"), lambda p: p["role"] == "answer"),
    (PROMPT, lambda p: p["modality"] != "pad" and not p["generated"]),
    (GENERATED, lambda p: p["generated"]),
    (LAST_PROMPT, lambda p: p["last"]),
    (Positions(index=0), lambda p: p["own"] == 0),
    (Positions(index=[0, -1]), lambda p: not p["generated"] and p["own"] in (0, p["length"] - 1)),
    (Positions(start=-9), lambda p: p["modality"] != "pad"),
    (Positions(index=-1), lambda p: not p["generated"] and p["own"] == p["length"] - 1),
    (Positions(start=2), lambda p: p["own"] >= 2),
    (Positions(start=-1, modality="text"), lambda p: p["own"] >= p["length"] - 1 and p["modality"] == "text"),
    (Positions(sample=0), lambda p: p["sample"] == 0 and p["modality"] != "pad"),
    (Positions(role="question", sample=-1), lambda p: p["role"] == "question" and p["sample"] == p["samples"] - 1),
]


def combine(children: st.SearchStrategy[Meaning]) -> st.SearchStrategy[Meaning]:
    """Rules joined by `&`, `|` and `~`, with the meaning joined by and, or and not-padding-and-not."""
    return st.one_of(
        st.tuples(children, children).map(lambda ab: (ab[0][0] & ab[1][0], lambda p: ab[0][1](p) and ab[1][1](p))),
        st.tuples(children, children).map(lambda ab: (ab[0][0] | ab[1][0], lambda p: ab[0][1](p) or ab[1][1](p))),
        children.map(lambda a: (~a[0], lambda p: p["modality"] != "pad" and not a[1](p))),
    )


def check(samples: list[list[tuple[int, int]]], left: bool, step: int, beams: int, meaning: Meaning) -> None:
    """The rule chooses exactly the positions for which its meaning holds."""
    rule, holds = meaning
    batch = make_batch(samples, left)
    width = batch.modality.shape[1]
    count = width if step == 0 else 1
    mask = rule.resolve(Hook(RESID, 1, step, batch), (beams * len(samples), count, 4))
    assert tuple(mask.shape) == (beams * len(samples), count)
    assert mask.dtype == torch.bool
    for row, sample in enumerate(sample for sample in range(len(samples)) for _ in range(beams)):
        tokens = samples[sample]
        prompt = [index for index, token in enumerate(tokens) if token[1] != int(Role.ANSWER)]
        for column in range(count):
            own = len(tokens) + step - 1 if step else column - (width - len(tokens) if left else 0)
            inside = bool(step) or 0 <= own < len(tokens)
            kinds = (1, 3) if step else tokens[own] if inside else (0, 0)
            fact = {
                "modality": Modality(kinds[0]).name.lower(),
                "role": Role(kinds[1]).name.lower(),
                "generated": bool(step),
                "own": own if inside else -1,
                "length": len(tokens),
                "last": not step and inside and bool(prompt) and own == prompt[-1],
                "sample": sample,
                "samples": len(samples),
            }
            assert bool(mask[row, column]) == holds(fact), (rule, fact)


@given(
    samples=st.lists(st.lists(KINDS, min_size=1, max_size=5), min_size=1, max_size=3),
    left=st.booleans(),
    step=st.integers(0, 3),
    beams=st.integers(1, 3),
    meaning=st.recursive(st.sampled_from(SIMPLE), combine, max_leaves=4),
)
def test_rules_against_predicates(
    samples: list[list[tuple[int, int]]], left: bool, step: int, beams: int, meaning: Meaning
) -> None:
    """Rules and their combinations, at step 0 as at later ones, with beams and padding."""
    check(samples, left, step, beams, meaning)


@pytest.mark.parametrize("number", range(len(SIMPLE)))
def test_every_simple_rule_and_its_opposite(number: int) -> None:
    """In one padded batch with everything in it, on either side, in the prompt and behind it."""
    samples = [[(1, 1), (2, 0), (2, 0), (1, 2), (1, 1), (1, 3)], [(1, 1), (1, 2), (1, 1)], [(1, 2)]]
    rule, holds = SIMPLE[number]
    for left in (True, False):
        for step in range(3):
            check(samples, left, step, 2, (rule, holds))
            check(samples, left, step, 2, (~rule, lambda p: p["modality"] != "pad" and not holds(p)))


def test_rules_of_a_real_batch(llava: HookedMM, images: list[Image.Image]) -> None:
    """The words of the question, the last prompt token, and image patches, by what the tokens say."""
    batch = llava.prepare(images[:2], ["what place is this ?", "where is the star ? what place ?"])
    hook, shape = Hook(RESID, 1, 0, batch), (*batch.modality.shape, 128)
    mask = QUESTION.resolve(hook, shape)
    said = [[token for token, kept in zip(*pair, strict=True) if kept] for pair in zip(batch.tokens, mask, strict=True)]
    assert [" ".join(words) for words in said] == ["what place is this ?", "where is the star ? what place ?"]
    assert IMAGE.resolve(hook, shape).sum(dim=1).tolist() == [64, 64]
    assert LAST_PROMPT.resolve(hook, shape).nonzero().tolist() == [[0, shape[1] - 1], [1, shape[1] - 1]]
    assert batch.tokens[0][int(Positions(index=0, sample=0).resolve(hook, shape).nonzero()[0, 1])] == "<s>"


def test_tower_points_take_rules_without_roles(llava: HookedMM, images: list[Image.Image]) -> None:
    """Patches are image positions with an index; what only tokens have is refused."""
    batch = llava.prepare([[images[0], images[1]], [images[2]]], ["what place is this ?", "what"])
    hook, shape = Hook("projector.hook_out", None, 0, batch), (3, 64, 128)
    assert IMAGE.resolve(hook, shape).all()
    assert not TEXT.resolve(hook, shape).any()
    assert as_rule(-1).resolve(hook, shape).nonzero().tolist() == [[0, 63], [1, 63], [2, 63]]
    assert Positions(sample=0).resolve(hook, shape).all(dim=1).tolist() == [True, True, False]
    for rule in (QUESTION, LAST_PROMPT, PROMPT, ~GENERATED):
        with pytest.raises(BadInputError, match=r"Positions\(.*at 'projector.hook_out', but it holds image patches"):
            rule.resolve(hook, shape)
    with pytest.raises(BadInputError, match=r"sample 0: Positions\(index=64\): there are only 64 patches"):
        as_rule(64).resolve(hook, shape)


def test_short_forms_and_printing() -> None:
    """Words, numbers, None; equal rules are equal; a rule prints as what makes it."""
    assert as_rule("image") == IMAGE
    assert as_rule(None) == as_rule("all") == ALL
    assert as_rule([3, -1]) == Positions(index=(3, -1))
    assert hash(IMAGE & QUESTION) == hash(Positions(modality="image") & Positions(role="question"))
    for rule in (Positions("text", "question", (0, -1), start=2), IMAGE | ~LAST_PROMPT, PROMPT & Positions(sample=1)):
        assert eval(repr(rule)) == rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_rule("imgae"), "no positions are called 'imgae'; nearest: image"),
        (lambda: Positions(role="asker"), "unknown role 'asker'"),
        (lambda: Positions(index=1.5), "index=1.5; it must be a whole number"),
        (lambda: Positions(sample=[]), r"sample=\[\]; it must be a whole number or several"),
        (lambda: Positions(index=True), "index=True"),
    ],
)
def test_wrong_rules_are_refused(make: Callable[[], Any], message: str) -> None:
    """When made, with the value."""
    with pytest.raises(BadInputError, match=message):
        make()


def test_what_a_sample_lacks_is_refused() -> None:
    """An index beyond a sample's own tokens, a sample that is not there, roles of raw tensors."""
    text = (1, 2)
    batch = make_batch([[text] * 4, [text] * 2])
    hook = Hook(RESID, 1, 0, batch)
    with pytest.raises(BadInputError, match=r"sample 1: Positions\(index=3\): there are only 2 tokens"):
        as_rule(3).resolve(hook, (2, 4, 8))
    with pytest.raises(BadInputError, match=r"sample 1: .*index=-3.*only 2 tokens"):
        as_rule(-3).resolve(hook, (6, 4, 8))
    assert Positions(index=3, sample=0).resolve(hook, (2, 4, 8)).nonzero().tolist() == [[0, 3]]
    with pytest.raises(BadInputError, match="sample 2 was asked for in a batch of 2"):
        Positions(sample=2).resolve(hook, (2, 4, 8))
    raw = make_batch([[(1, -1)] * 2])
    with pytest.raises(BadInputError, match=r"role='question'.*raw tensors, so roles are unknown"):
        QUESTION.resolve(Hook(RESID, 1, 0, raw), (1, 2, 8))
