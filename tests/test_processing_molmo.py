"""Molmo's processor against the reference: tokens, places and crops of prompts with no, one and two pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hooked_mm.errors import BadInputError
from hooked_mm.molmo.processing_molmo import MolmoProcessor
from tests.molmo_examples import PICTURES, SIZES, batch_of, own_part, photograph
from tests.molmo_published import END, END_ID, IMAGE_TOKENS, image_ids, narrowed, published_state, write_published
from tests.molmo_reference import Example, example, logits
from tests.test_image_processing_molmo import PIXEL_ERROR

QUESTIONS = {"text": "is there a cat?", "one": "What is in the picture?", "small": "é 犬 12", "two": "two\nlines "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("molmo")
    write_published(found, SIZES, **narrowed(SIZES))
    return found


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def asked(question: str) -> str:
    """As the published processor writes a prompt (`message_format="role"`, `always_start_with_space`)."""
    return " " + "User: " + question + " Assistant:"


def pictures(name: str) -> list[np.ndarray]:
    return [photograph(*size) for size in PICTURES[name]]


@pytest.fixture(scope="module")
def references(processor: Any) -> dict[str, Example]:
    """The prompt's tokens come from the tokenizer alone; all else is the reference's."""

    def tokens(question: str) -> list[int]:
        found: list[int] = processor.tokenizer.encode(asked(question), add_special_tokens=False)
        return found

    return {
        name: example(pictures(name), tokens(question), END_ID, SIZES, image_ids(SIZES))
        for name, question in QUESTIONS.items()
    }


@pytest.fixture(scope="module")
def expected(references: dict[str, Example]) -> dict[str, torch.Tensor]:
    """The reference's logits."""
    state = published_state(SIZES)
    return {name: logits(state, one, SIZES) for name, one in references.items()}


def encoded(processor: Any, names: list[str], **options: Any) -> Any:
    """The tensors of these examples."""
    images = [[Image.fromarray(one) for one in pictures(name)] for name in names]
    return processor(images=images, text=[asked(QUESTIONS[name]) for name in names], **options)


def test_it_comes_from_the_published_files(processor: Any, folder: Path) -> None:
    """Its own class, not the remote code that the files name."""
    assert type(processor) is MolmoProcessor
    assert type(MolmoProcessor.from_pretrained(folder)) is MolmoProcessor
    ids = processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    assert ids == list(range(SIZES.embedding, SIZES.embedding + 5))
    assert processor.begin_token == END
    assert processor.image_processor.overlap_margins == list(SIZES.margins)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_prompt_alone(name: str, processor: Any, references: dict[str, Example]) -> None:
    """Tokens, places and masks are the reference's; text alone has no pictures' tensors."""
    got, one = encoded(processor, [name]), references[name]
    assert got["input_ids"].tolist() == [one.tokens]
    assert got["attention_mask"].tolist() == [[1] * len(one.tokens)]
    if not PICTURES[name]:
        assert set(got) == {"input_ids", "attention_mask"}
        return
    np.testing.assert_array_equal(got["image_input_idx"][0].clamp_min(-1), np.maximum(one.places, -1))
    np.testing.assert_allclose(got["images"][0], one.crops, atol=PIXEL_ERROR, rtol=0)
    np.testing.assert_allclose(got["image_masks"][0], one.masks, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_all(side: str, processor: Any, references: dict[str, Example]) -> None:
    """Padded on either side; places move with their tokens, crops are filled up behind."""
    got = encoded(processor, list(QUESTIONS), padding=True, padding_side=side)
    want = batch_of(list(references.values()), side, torch.float32)
    assert got.keys() == want.keys()
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(got[name], want[name])
    torch.testing.assert_close(got["image_input_idx"].clamp_min(-1), want["image_input_idx"].clamp_min(-1))
    for name, error in (("images", PIXEL_ERROR), ("image_masks", 1e-6)):
        torch.testing.assert_close(got[name], want[name], atol=error, rtol=0)


def test_every_place_holds_an_image_token_and_every_image_token_is_named_once(processor: Any) -> None:
    """Of a padded batch, counted on the tensors alone."""
    got = encoded(processor, list(QUESTIONS), padding=True, padding_side="left")
    for ids, where in zip(got["input_ids"], got["image_input_idx"], strict=True):
        named = where[where >= 0].sort().values
        assert torch.equal(named, (ids == image_ids(SIZES).patch).nonzero()[:, 0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_from_photographs_to_logits(
    side: str, processor: Any, folder: Path, references: dict[str, Example], expected: dict[str, torch.Tensor]
) -> None:
    """The whole way; what differs is how the pictures were resized."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(**encoded(processor, list(QUESTIONS), padding=True, padding_side=side)).logits
    for values, (name, one) in zip(found, references.items(), strict=True):
        torch.testing.assert_close(own_part(values, one, side).double(), expected[name], atol=1e-3, rtol=0)


def test_pictures_where_the_prompt_puts_them(processor: Any) -> None:
    """One before and one behind the words; without a place of their own they go first."""
    first, second = (Image.fromarray(one) for one in pictures("two"))
    got = processor(images=[first, second], text="<|image|> cat <|image|>dog")
    words = processor.tokenizer.encode(" cat ", add_special_tokens=False)
    tail = processor.tokenizer.encode("dog", add_special_tokens=False)
    one, other = (example([np.array(each)], [], END_ID, SIZES, image_ids(SIZES)) for each in (first, second))
    assert got["input_ids"][0].tolist() == [*one.tokens, *words, *other.tokens[1:], *tail]
    moved = other.places + (other.places >= 0) * (len(one.tokens) + len(words) - 1)
    np.testing.assert_array_equal(
        got["image_input_idx"][0].clamp_min(-1), np.maximum(np.concatenate([one.places, moved]), -1)
    )


def test_a_conversation(processor: Any) -> None:
    """Turns as the training repository joins them: each begins with a space, an answer ends with the end of text."""
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    messages = [
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    said = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert said == f"<|image|> User: What is it? Assistant: A cat.{END} User: Sure? Assistant:"
    alone = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert alone == "<|image|>" + asked("What is it?")


def test_the_end_of_text_begins_a_prompt_once(processor: Any) -> None:
    """Whether or not it was written."""
    plain, written = (processor(text=text)["input_ids"].tolist() for text in ("cat", END + "cat"))
    assert plain == written
    assert plain[0].count(END_ID) == 1


def test_how_pictures_may_be_given(processor: Any) -> None:
    """One picture, a list for one prompt, one each, a list per prompt."""
    picture = Image.fromarray(photograph(53, 131))
    single = processor(images=picture, text="cat")
    assert torch.equal(single["images"], processor(images=[picture], text=["cat"])["images"])
    pair = processor(images=[picture, picture], text=["cat", "cat"])
    assert torch.equal(pair["images"], torch.cat([single["images"]] * 2))
    lists = processor(images=[[picture], [picture]], text=["cat", "cat"])
    assert torch.equal(lists["image_input_idx"], pair["image_input_idx"])


def test_bad_input_is_refused(processor: Any) -> None:
    """Each with its reason."""
    picture = Image.fromarray(photograph(53, 131))
    with pytest.raises(BadInputError, match="2 picture tokens"):
        processor(images=picture, text="<|image|> or <|image|>")
    with pytest.raises(BadInputError, match="1 picture tokens"):
        processor(text="<|image|>")
    with pytest.raises(BadInputError, match="list per prompt"):
        processor(images=[picture] * 3, text=["a", "b"])
    with pytest.raises(BadInputError, match="give text"):
        processor(images=picture)


def test_written_and_read_again(processor: Any, tmp_path: Path, references: dict[str, Example]) -> None:
    """The published files' names; what is read makes the same tensors."""
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "molmo"}))
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).exists()
    again = AutoProcessor.from_pretrained(tmp_path)
    got, plain = encoded(again, ["two"]), encoded(processor, ["two"])
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_decoding(processor: Any) -> None:
    """The tokenizer's."""
    ids = processor.tokenizer.encode(" a cat", add_special_tokens=False)
    assert processor.decode(ids) == " a cat"
    assert processor.batch_decode([[*ids, END_ID]], skip_special_tokens=True) == [" a cat"]
