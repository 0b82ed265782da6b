"""What processors do with prompts: each habit against what the processor itself does."""

from __future__ import annotations

import copy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.batch import Role
from hooked_mm.habits import HABITS, Prompt
from tests.processors import idefics2, processor
from tests.tiny import picture

pytestmark = pytest.mark.oldest

ROLES = st.sampled_from([Role.TEMPLATE, Role.QUESTION, Role.ANSWER])


def prompt_of(pieces: list[tuple[str, Role]]) -> Prompt:
    """Pieces joined."""
    return sum((Prompt.of(text, role) for text, role in pieces), Prompt("", ()))


@given(st.lists(st.tuples(st.text(st.sampled_from("ab#"), max_size=4), ROLES), max_size=6), st.text("xy", max_size=3))
def test_replacing_keeps_the_roles_of_all_else(pieces: list[tuple[str, Role]], new: str) -> None:
    """The text is that of `re.sub`; what is put in is template, every other character keeps its role."""
    prompt = prompt_of(pieces)
    changed = prompt.sub("#+", lambda match: new)
    assert changed.text == re.sub("#+", new, prompt.text)
    assert len(changed.roles) == len(changed.text)
    kept = [(letter, role) for letter, role in zip(prompt.text, prompt.roles, strict=True) if letter != "#"]
    found = [(letter, role) for letter, role in zip(changed.text, changed.roles, strict=True) if letter not in "xy"]
    assert found == kept
    put_in = {role for letter, role in zip(changed.text, changed.roles, strict=True) if letter in "xy"}
    assert put_in <= {Role.TEMPLATE}


@given(before=st.sampled_from(["", "User:", "a "]), after=st.sampled_from(["what", " what", "", "\n", "<end>"]))
@pytest.mark.parametrize("split", [False, True])
def test_idefics2s_marks_and_spaces_are_template(split: bool, before: str, after: str) -> None:
    """Adjacent fake tokens become one, and a space stands before a word: none of it is the question's."""
    made = idefics2(split=split)
    text = f"{before}<image><image>{after}"
    prompt = Prompt.of(text, Role.QUESTION)
    rewritten = HABITS["Idefics2Processor"].rewrite(made, prompt, 2)
    heard: list[str] = []
    listening = copy.copy(made)

    class Tokenizer:
        """Notes what it is asked to tokenize."""

        def __call__(self, texts: list[str], **options: object) -> dict:
            heard.extend(texts)
            raise InterruptedError

        def __getattr__(self, name: str) -> object:
            return getattr(made.tokenizer, name)

    listening.tokenizer = Tokenizer()
    with pytest.raises(InterruptedError):
        listening(text=[text], images=None)
    assert [rewritten.text] == heard
    question = "".join(
        letter for letter, role in zip(rewritten.text, rewritten.roles, strict=True) if role == Role.QUESTION
    )
    assert question == before + after


def test_mllama_begins_behind_leading_images() -> None:
    """Where the processor puts the beginning-of-text token, and only if there is none."""
    made = processor("mllama")
    rewrite = HABITS["MllamaProcessor"].rewrite
    bare = rewrite(made, Prompt.of("<|image|>what", Role.QUESTION), 1)
    assert bare.text == "<|image|><|begin_of_text|>what"
    ids = made(text=["<|image|>what"], images=[[picture(40, 24)]], add_special_tokens=False)["input_ids"][0]
    assert made.tokenizer.decode(ids) == bare.text
    assert rewrite(made, bare, 1) == bare
