"""Prompts followed through a processor's rewriting, character by character."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from hooked_mm.batch import Role
from hooked_mm.errors import BadInputError
from hooked_mm.habits import Prompt
from hooked_mm.prompts import join_answer, process_prompts, render_prompt, token_roles
from tests.processors import FAMILIES, processor
from tests.tiny import image_token_id, picture

pytestmark = pytest.mark.oldest


def test_a_token_has_the_role_of_its_last_character() -> None:
    """Under BPE a leading space belongs to the word; special tokens that the tokenizer adds are template."""
    tokenizer = processor("llava").tokenizer
    prompt = Prompt.of("what ", Role.QUESTION) + Prompt.of("is", Role.ANSWER)
    ids, roles = token_roles(tokenizer, prompt)
    names = tokenizer.convert_ids_to_tokens(ids)
    assert names[0] == "<s>"
    assert roles[0] == Role.TEMPLATE
    said = [name for name, role in zip(names, roles, strict=True) if role == Role.ANSWER]
    assert "".join(said) == "Ġis"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("blip-2", "florence2")])
def test_counts_are_the_positions_of_each_image(family: str) -> None:
    """The image tokens in the ids are as many as the processor said, image by image."""
    made = processor(family)
    pictures = [[picture(40, 24)], [picture(24, 40), picture(30, 30)]]
    prompts = [render_prompt(made, "what?", len(sample), template=True) for sample in pictures]
    done = process_prompts(made, image_token_id(family), prompts, pictures, "left")
    if family == "mllama":
        assert done.counts == [None] * 3  # its image token is text
        return
    found = (done.inputs["input_ids"] == image_token_id(family)).sum(dim=1).tolist()
    assert found == [done.counts[0], done.counts[1] + done.counts[2]]


def test_text_that_the_processor_rewrote_otherwise_is_refused() -> None:
    """Roles are never guessed: both texts are shown."""
    made = copy.copy(processor("llava"))
    tokenizer = made.tokenizer

    class Shouting:
        """A processor's own idea of the text."""

        def __call__(self, texts: list[str] | str, **options: object) -> object:
            return tokenizer(texts if isinstance(texts, str) else [text.upper() for text in texts], **options)

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

    made.tokenizer = Shouting()
    prompt = Prompt.of("what is it", Role.QUESTION)
    with pytest.raises(BadInputError, match=r"sample 0: .*roles can't be told; followed: 'what is it', .*WHAT IS IT"):
        process_prompts(made, 4, [prompt], [[]], "left")


def test_answers_follow_with_one_space() -> None:
    """No second space where the prompt ends in white space."""
    assert join_answer("assistant :", "red") == " red"
    assert join_answer("assistant\n", "red") == "red"


def test_a_template_that_drops_images_is_refused() -> None:
    """It may not support images; the way out is named."""
    blind = copy.copy(processor("llava"))
    blind.chat_template = "{% for message in messages %}{{ message['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(BadInputError, match="the chat template wrote 0 image tokens for 1 images"):
        render_prompt(blind, "what?", 1, template=True)
    none = SimpleNamespace(image_token="<image>", chat_template=None)
    with pytest.raises(BadInputError, match="has no chat template; give the whole prompt yourself"):
        render_prompt(none, "what?", 1, template=True)


def test_prompts_that_begin_differently_are_refused() -> None:
    """The tokenizer writes the first special token into all prompts or into none."""
    made = processor("llava")
    prompts = [Prompt.of("<s>what", Role.QUESTION), Prompt.of("what", Role.QUESTION)]
    with pytest.raises(BadInputError, match="some prompts begin with '<s>' and some do not"):
        process_prompts(made, 4, prompts, [[], []], "left")
