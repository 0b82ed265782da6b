"""From pictures and texts to a batch: images, templates, roles, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from hooked_mm.batch import Batch, Role
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import load_image, prepare
from tests.processors import FAMILIES, processor
from tests.tiny import picture, structure, tiny


def by_role(batch: Batch, sample: int, role: str) -> list[str]:
    """The token strings of a role."""
    return [batch.tokens[sample][p] for p in batch.mask(role=role, sample=sample)[sample].nonzero()[:, 0]]


def test_roles_and_modalities(llava: HookedMM, images: list[Image.Image]) -> None:
    """Template, question and answer are told apart even where the question says what the template says."""
    batch = llava.prepare([images[0], None], ["user : what ?", "assistant :"], ["the assistant : red", None])
    assert by_role(batch, 0, "template") == ["<s>", "user", ":", "assistant", ":"]
    assert by_role(batch, 0, "question") == ["user", ":", "what", "?"]
    assert by_role(batch, 0, "answer") == ["the", "assistant", ":", "red"]
    assert by_role(batch, 1, "question") == ["assistant", ":"]
    assert batch.mask(modality="image").sum(1).tolist() == [64, 0]
    assert batch.last_prompt().tolist() == [len(batch.tokens[0]) - 5, len(batch.tokens[0]) - 1]


def test_images_stand_where_their_tokens_stand(llava: HookedMM, images: list[Image.Image]) -> None:
    """Image tokens in the text place the images; text between them keeps its role; adjacent images are fine."""
    token = "<image>"
    batch = llava.prepare([images[:3]], [f"is {token}{token} big or {token} small ?"])
    image = batch.mask(modality="image")[0]
    runs = "".join("i" if flag else "t" for flag in image)
    assert [len(run) for run in runs.replace("t", " ").split()] == [128, 64]
    assert by_role(batch, 0, "question") == ["is", "big", "or", "small", "?"]
    assert batch.image_sample.tolist() == [0, 0, 0]


def test_answer_prefix_comes_first_in_the_answer(llava: HookedMM, images: list[Image.Image]) -> None:
    """A prefix, alone or before an answer, has role answer; generation goes on from it."""
    batch = llava.prepare(images[:2], ["what place is this ?"] * 2, ["city", None], answer_prefix="in the")
    assert by_role(batch, 0, "answer") == ["in", "the", "city"]
    assert by_role(batch, 1, "answer") == ["in", "the"]
    assert batch.mask(modality="pad").sum(1).tolist() == [0, 1]


def test_whole_prompts_without_the_template(llava: HookedMM, images: list[Image.Image]) -> None:
    """With template=False the text is what the model sees, word for word."""
    text = "<s>user : <image> what place is this ? assistant :"
    whole = llava.prepare(images[:1], [text], template=False)
    usual = llava.prepare(images[:1], ["what place is this ?"])
    assert torch.equal(whole.input_ids, usual.input_ids)
    assert not whole.mask(role="template").any()


@pytest.mark.parametrize(
    ("pictures", "text", "options", "reason"),
    [
        ("missing", "what ?", {}, "sample 1: image '.*gone.png' does not exist"),
        ("truncated", "what ?", {}, "sample 1: image '.*cut.jpg' is broken .*truncated"),
        ("text", "what ?", {}, "sample 1: image '.*notes.txt' is not an image"),
        ("number", "what ?", {}, "sample 1: an image must be a PIL image, a path or a file's bytes, not int"),
        ("good", "", {}, "sample 1: the prompt is empty"),
        ("good", "  \n", {}, "sample 1: the prompt is empty"),
        ("good", "<image>", {}, "sample 1: the prompt is empty"),
        ("good", "what <image> is <image> ?", {}, "sample 1: the text has 2 image tokens '<image>' for 1 images"),
        ("none", "what <image> ?", {}, "sample 1: the text has 1 image tokens '<image>' for 0 images"),
        ("good", "what ?", {"template": False}, "sample 1: the text has 0 image tokens .*template=False"),
        ("good", "what \ue000 ?", {}, r"sample 1: the text contains the private-use character U\+E000"),
        ("good", "what ?", {"answers": ["x", " "]}, "sample 1: the answer is empty"),
        ("good", "what ?", {"answers": ["x", "<image>"]}, "sample 1: the answer contains the image token"),
    ],
)
def test_bad_input_is_refused_with_the_sample(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path, pictures: str, text: str, options: dict, reason: str
) -> None:
    """Each error names the sample, the value and the reason."""
    images[0].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    (tmp_path / "notes.txt").write_text("not a picture")
    second = {
        "missing": tmp_path / "gone.png",
        "truncated": str(tmp_path / "cut.jpg"),
        "text": tmp_path / "notes.txt",
        "number": 3,
        "good": images[1],
        "none": None,
    }[pictures]
    first = "what ?" if options.get("template", True) else "<image> what ?"
    with pytest.raises(BadInputError, match=reason) as caught:
        llava.prepare([images[0], second], [first, text], **options)
    assert caught.value.sample == 1


@pytest.mark.parametrize(
    ("pictures", "text", "options", "reason"),
    [
        (2, ["a"], {}, "same number of each, at least one; got {'images': 2, 'text': 1"),
        (0, [], {}, "at least one"),
        (1, ["a"], {"answers": ["x", "y"]}, "'answers': 2"),
        (1, ["a"], {"padding_side": "middle"}, "padding_side='middle'; it must be 'left' or 'right'"),
    ],
)
def test_counts_and_sides_that_do_not_fit(
    llava: HookedMM, images: list[Image.Image], pictures: int, text: list[str], options: dict, reason: str
) -> None:
    """A batch needs as many of each."""
    with pytest.raises(BadInputError, match=reason):
        llava.prepare(images[:pictures], text, **options)


def test_one_text_for_every_image_and_paths(llava: HookedMM, images: list[Image.Image], tmp_path: Path) -> None:
    """A single string is asked of every picture; a path is as good as the picture; a single image needs no list."""
    images[0].save(tmp_path / "a.png")
    from_path = llava.prepare([tmp_path / "a.png", str(tmp_path / "a.png")], "what place is this ?")
    from_memory = llava.prepare([images[0]] * 2, "what place is this ?")
    assert torch.equal(from_path.inputs["pixel_values"], from_memory.inputs["pixel_values"])
    assert len(llava.prepare(images[0], "what place is this ?")) == 1


def test_pictures_of_other_kinds_become_rgb(tmp_path: Path) -> None:
    """Grey, palette and transparent pictures are converted."""
    for mode in ("L", "P", "RGBA", "1"):
        assert load_image(Image.new(mode, (5, 4))).mode == "RGB"


def subword_processor(llava: HookedMM) -> LlavaProcessor:
    """The small LLaVA's processor with a byte-level BPE tokenizer, whose words take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["what colour is the triangle in the snow"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token=None
    )
    old = llava.processor
    return LlavaProcessor(
        image_processor=old.image_processor,
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=old.chat_template,
        image_token="<image>",
    )


@given(
    question=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), min_size=1, max_size=12),
    answer=st.text(st.sampled_from("abc é snow🙂"), min_size=1, max_size=8),
    padding_side=st.sampled_from(["left", "right"]),
)
def test_roles_of_any_text_under_byte_level_bpe(
    llava: HookedMM, images: list[Image.Image], question: str, answer: str, padding_side: str
) -> None:
    """Decoding the tokens of each role gives back the question and the answer, whatever their characters."""
    if not question.strip() or not answer.strip() or "<" in question:
        return
    made = subword_processor(llava)
    small = replace(llava.structure, image_token_id=3)
    batch = prepare(
        made,
        small,
        llava.hf_model.config,
        [images[0], None],
        [question, "what"],
        [answer, "a longer answer than the other"],
        template=True,
        padding_side=padding_side,
        dtype=torch.float32,
    )
    for role, said in (("question", question), ("answer", answer)):
        ids = batch.input_ids[0][batch.mask(role=role, sample=0)[0]]
        assert made.tokenizer.decode(ids).strip() == said.strip()


INSERTING = ("blip-2", "florence2")
"""Families whose processor writes the image token itself and which have no chat template."""
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cc"], exclude_characters="<>")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=8).filter(str.strip).filter(lambda text: text == text.strip())


def make(
    family: str, pictures: list, text: list[str], answers: list[str | None] | None = None, **options: Any
) -> Batch:
    """A batch of any family."""
    options = {"template": True, "padding_side": "left", "dtype": torch.float32, **options}
    answers = answers or [None] * len(text)
    return prepare(processor(family), structure(family), tiny(family).config, pictures, text, answers, **options)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(data=st.data())
def test_roles_of_every_family(family: str, data: st.DataObject) -> None:
    """Question and answer are found again in the tokens of their roles; image positions have none."""
    number = 1 if family in INSERTING else data.draw(st.integers(0, 3))
    side, question, answer = data.draw(st.sampled_from(["left", "right"])), data.draw(TEXTS), data.draw(TEXTS)
    pictures = [picture(20 + 8 * seed, 24, seed) for seed in range(number)]
    batch = make(
        family, [pictures, picture(30, 20)], [question, "what"], [answer, "a longer answer"], padding_side=side
    )
    tokenizer = processor(family).tokenizer
    spoken = batch.decoder or batch
    for of, role, said in ((batch, "question", question), (spoken, "answer", answer)):
        ids = of.input_ids[0][of.mask(role=role, sample=0)[0]]
        assert tokenizer.decode(ids).strip() == said
    real = batch.inputs["attention_mask"].bool()
    assert torch.equal(batch.modality > 0, real)
    assert torch.equal((batch.role == Role.NONE) & real, batch.mask(modality="image"))
    assert torch.equal(batch.mask(modality="image"), batch.image_index >= 0)
    assert batch.image_sample.tolist() == [0] * number + [1]
    if family not in INSERTING:
        # The picture of a sample does not depend on its neighbours.
        alone = make(family, [pictures], [question], [answer], padding_side=side)
        assert torch.equal(alone.input_ids[0], batch.input_ids[0][real[0]])
        assert torch.equal(alone.role[0], batch.role[0][real[0]])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in INSERTING])
def test_whole_prompts_of_every_family(family: str) -> None:
    """With template=False the words around the image token are the question, the marks of the processor template."""
    token = str(processor(family).image_token)
    batch = make(family, [picture(24, 24)], [f"what{token} is it"], template=False)
    ids = batch.input_ids[0][batch.mask(role="question")[0]]
    assert processor(family).tokenizer.decode(ids) == "what is it"


@pytest.mark.parametrize(
    ("family", "pictures", "text", "reason"),
    [
        ("blip-2", [None], ["what?"], "sample 0: Blip2Processor takes exactly one image per prompt, got 0"),
        ("blip-2", [[picture(9, 9)] * 2], ["what?"], "exactly one image per prompt, got 2"),
        ("blip-2", [picture(9, 9)], ["<image> what?"], "writes the image token '<image>' itself; remove it"),
        ("blip-2", [picture(9, 9)], [" "], "the prompt is empty"),
        ("florence2", [[picture(9, 9)] * 2], ["what?"], "at most one image per prompt, got 2"),
        ("florence2", [picture(9, 9), None], ["what?", "and?"], "sample 1: has no image, but others of the batch have"),
    ],
)
def test_what_a_family_does_not_take_is_refused(family: str, pictures: list, text: list[str], reason: str) -> None:
    """The reason and the processor are named."""
    with pytest.raises(BadInputError, match=reason):
        make(family, pictures, text)


def test_answers_of_an_encoder_decoder_go_to_its_decoder() -> None:
    """Florence-2: the decoder's start token, the answers, padding on the right; the encoder has the question alone."""
    batch = make("florence2", [picture(9, 9), picture(9, 9)], ["<CAPTION>", "where?"], [None, "in the city"])
    assert batch.decoder is not None
    tokenizer = processor("florence2").tokenizer
    assert tokenizer.decode(batch.input_ids[0][batch.mask(role="question")[0]]) == "What does the image describe?"
    assert batch.decoder.inputs["input_ids"] is batch.inputs["decoder_input_ids"]
    assert batch.decoder.role[:, 0].tolist() == [Role.TEMPLATE, Role.TEMPLATE]
    assert batch.decoder.mask(role="answer")[0].sum() == 0
    assert tokenizer.decode(batch.decoder.input_ids[1][batch.decoder.mask(role="answer")[1]]) == "in the city"
    logits = tiny("florence2")(**batch.inputs).logits
    assert logits.shape[:2] == batch.decoder.modality.shape
    none = make("florence2", [None], ["what?"])
    assert not none.has_images
    assert none.mask(modality="image").sum() == 0


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen2_vl", {"image_grid_thw", "mm_token_type_ids"}),
        ("gemma3", {"token_type_ids"}),
        ("mllama", {"aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"}),
        ("idefics3", {"pixel_attention_mask"}),
        ("llava_onevision", {"image_sizes", "batch_num_images"}),
    ],
)
def test_what_a_model_needs_beside_comes_through(family: str, names: set[str]) -> None:
    """Extra inputs of the processor reach the model; nothing that is no tensor does."""
    batch = make(family, [picture(24, 24), None], ["what", "where?"])
    assert names <= set(batch.inputs)
    assert all(isinstance(value, torch.Tensor) for value in batch.inputs.values())
    tiny(family)(**batch.inputs)
