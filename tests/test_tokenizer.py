"""The small models' tokenizer: whole words, the family's own special tokens, and the turns of a chat."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template
from transformers import AutoTokenizer

from hooked_mm.scenes.language import vocabulary
from hooked_mm.small.tokenizer import BASIC, build_tokenizer, chat_template

TOKENIZER = build_tokenizer(["<image>"])


@given(st.lists(st.sampled_from(vocabulary()), min_size=1, max_size=20))
def test_sentences_survive(words: list[str]) -> None:
    """One token per word; decoded, the sentence is back."""
    text = " ".join(words)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == words
    assert TOKENIZER.decode(ids) == text


def test_special_tokens() -> None:
    """They come first, each is one token wherever it stands, and none is a word; what is unknown is `<unk>`."""
    assert TOKENIZER.convert_tokens_to_ids([*BASIC, "<image>"]) == [0, 1, 2, 3, 4]
    named = (TOKENIZER.pad_token, TOKENIZER.unk_token, TOKENIZER.bos_token, TOKENIZER.eos_token)
    assert named == BASIC
    assert TOKENIZER("<s>red<image></s> Elephant.", add_special_tokens=False)["input_ids"] == [
        TOKENIZER.convert_tokens_to_ids(token) for token in ("<s>", "red", "<image>", "</s>", "<unk>", ".")
    ]
    assert not {*BASIC, "<image>"} & set(vocabulary())
    assert len(TOKENIZER) == len(BASIC) + 1 + len(vocabulary())


@given(st.text(max_size=30))
def test_any_text_is_taken(text: str) -> None:
    """No text breaks the tokenizer, and every id is one of the model's."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert all(0 <= index < len(TOKENIZER) for index in ids)


def test_case_and_spacing_do_not_matter() -> None:
    """People type "Is there a Star?"."""
    wanted = TOKENIZER("is there a star ?", add_special_tokens=False)["input_ids"]
    assert TOKENIZER("Is there  a STAR?", add_special_tokens=False)["input_ids"] == wanted
    assert TOKENIZER.unk_token_id not in wanted


def test_padding_is_on_the_left() -> None:
    """So that answers of a batch begin at one position."""
    made = TOKENIZER(["red", "a red star"], padding=True)
    assert made["input_ids"][0][:2] == [0, 0]
    assert made["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("named", [{}, {"image_token": "<image>"}])
def test_saved_and_loaded(tmp_path: Path, named: dict[str, str]) -> None:
    """The same ids and the same named tokens; special tokens are left out of an answer."""
    made = build_tokenizer(["<image>", "<mark>"], **named)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == made.get_vocab()
    ids = made("<s> a <image> red <mark> star </s>")["input_ids"]
    assert loaded("<s> a <image> red <mark> star </s>")["input_ids"] == ids
    assert loaded.decode(ids, skip_special_tokens=True) == "a red star"
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 512)
    if named:
        assert loaded.image_token_id == loaded.convert_tokens_to_ids("<image>")


def test_turns() -> None:
    """Roles, pictures where they stand, text as parts or whole; an answer ends with the end token."""
    template = Template(chat_template("<here>"))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what place is this ?"}]}
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    asked = template.render(messages=[user], add_generation_prompt=True, **special)
    assert asked == "<s>user : <here> what place is this ? assistant :"
    talk = [user, {"role": "assistant", "content": "sea"}, {"role": "user", "content": "red"}]
    assert template.render(messages=talk, **special) == (
        "<s>user : <here> what place is this ? assistant : sea </s>user : red "
    )
