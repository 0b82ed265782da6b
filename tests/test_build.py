"""The small models before training: a tokenizer of whole words, a real processor and a real LLaVA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from hooked_mm.scenes.language import vocabulary
from hooked_mm.small import small_model_path
from hooked_mm.small.build import SPECIAL, build_llava, build_tokenizer

TOKENIZER = build_tokenizer()


@given(st.lists(st.sampled_from(vocabulary()), min_size=1, max_size=20))
def test_sentences_survive_the_tokenizer(words: list[str]) -> None:
    """One token per word; decoded, the sentence is back."""
    text = " ".join(words)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == words
    assert TOKENIZER.decode(ids) == text


def test_special_tokens() -> None:
    """They come first, each is one token wherever it stands, and none is a word; what is unknown is `<unk>`."""
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    named = (TOKENIZER.pad_token, TOKENIZER.unk_token, TOKENIZER.bos_token, TOKENIZER.eos_token)
    assert named == ("<pad>", "<unk>", "<s>", "</s>")
    assert TOKENIZER("<s>red<image></s> Elephant.", add_special_tokens=False)["input_ids"] == [
        TOKENIZER.convert_tokens_to_ids(token) for token in ("<s>", "red", "<image>", "</s>", "<unk>", ".")
    ]
    assert not set(SPECIAL) & set(vocabulary())
    assert len(TOKENIZER) == len(SPECIAL) + len(vocabulary())


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


def test_the_shipped_tokenizer_is_this_one() -> None:
    """The shipped weights belong to the vocabulary that the package builds now, id by id."""
    shipped = AutoTokenizer.from_pretrained(small_model_path("llava"))
    assert shipped.get_vocab() == TOKENIZER.get_vocab()


def test_the_chat_template() -> None:
    """A prompt, word by word, with and without the answer."""
    _, processor = build_llava()
    content = [{"type": "image"}, {"type": "text", "text": "what place is this ?"}]
    user = {"role": "user", "content": content}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True)
    assert prompt == "<s>user : <image> what place is this ? assistant :"
    whole = processor.apply_chat_template([user, {"role": "assistant", "content": "sea"}])
    assert whole == "<s>user : <image> what place is this ? assistant : sea </s>"


@pytest.mark.parametrize(("size", "patch"), [(48, 8), (56, 8), (64, 16)])
def test_image_tokens_fit_the_tower(size: int, patch: int) -> None:
    """The processor writes as many image tokens as the tower makes patches; pixels lie in -1 to 1."""
    model, processor = build_llava(size, patch)
    picture = np.zeros((size, size, 3), np.uint8)
    picture[0, 0] = 255
    inputs = processor(text="<s>user : <image> what", images=Image.fromarray(picture), return_tensors="pt")
    patches = (size // patch) ** 2
    assert int((inputs["input_ids"] == 4).sum()) == patches == model.config.image_seq_length
    pixels = inputs["pixel_values"]
    assert torch.equal(pixels[0, :, 0, 0], torch.ones(3))
    assert torch.equal(pixels[0, :, 1:], -torch.ones(3, size - 1, size))
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(TOKENIZER))
    assert torch.isfinite(logits).all()


def test_the_model_is_small_and_the_seed_decides_it() -> None:
    """1.5 million parameters; the same seed gives the same ones, another seed others."""
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(build_llava()[0].state_dict())
    assert 1.4e6 < sum(value.numel() for value in made[0].values()) < 1.6e6
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    assert not torch.equal(made[0]["lm_head.weight"], made[2]["lm_head.weight"])


def test_saving_and_loading(tmp_path: Path) -> None:
    """Model and processor come back through the Auto classes with the same logits; generation knows its end."""
    model, processor = build_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    text = "<s>user : <image> what place is this ? assistant :"
    one, two = (p(text=text, images=image, return_tensors="pt", add_special_tokens=False) for p in (processor, again))
    assert all(torch.equal(one[name], two[name]) for name in ("input_ids", "attention_mask", "pixel_values"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**one).logits, loaded.eval()(**two).logits, rtol=0, atol=1e-5)
    assert (loaded.generation_config.pad_token_id, loaded.generation_config.eos_token_id) == (0, 3)
