"""Templates put the question where it belongs, or are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.datasets.templates import CAPTION, TEMPLATES, fill, resolve
from hooked_mm.errors import BadInputError


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_serve_either_questions_or_captions(name: str) -> None:
    """Each is right for one kind of data set and refused for the other."""
    asks = "{text}" in TEMPLATES[name]
    assert resolve(name, asks=asks) == TEMPLATES[name]
    with pytest.raises(BadInputError):
        resolve(name, asks=not asks)


@given(st.text(), st.text(), st.text())
def test_the_question_stands_in_the_template_as_it_is(before: str, question: str, after: str) -> None:
    """Whatever braces, percent signs or backslashes either holds."""
    template = f"Q {before}".replace("{text}", "") + "{text}" + after.replace("{text}", "")
    if template.count("{text}") == 1:
        left, right = template.split("{text}")
        assert fill(resolve(template, asks=True), question) == left + question + right


def test_without_a_template_the_question_stands_alone() -> None:
    """And without a question the template does."""
    assert fill(None, "what ?") == "what ?"
    assert fill(resolve(CAPTION, asks=False), None) == CAPTION


@pytest.mark.parametrize(
    ("template", "asks", "part"),
    [
        ("llava-shrot", True, "nearest: llava-short"),
        ("llava-captions", False, "nearest: llava-caption"),
        ("", False, "no template ''"),
        ("Answer briefly.", True, "must hold {text} once"),
        ("{text} or {text}?", True, "must hold {text} once"),
        ("About {text}:", False, "has no questions"),
    ],
)
def test_refusals(template: str, asks: bool, part: str) -> None:
    """A name mistyped is not asked as a prompt."""
    with pytest.raises(BadInputError) as error:
        resolve(template, asks=asks)
    assert part in str(error.value)


def test_task_tokens_are_no_names() -> None:
    """Florence-2's are single words."""
    assert resolve("<MORE_DETAILED_CAPTION>", asks=False) == "<MORE_DETAILED_CAPTION>"
