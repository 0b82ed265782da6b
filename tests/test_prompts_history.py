"""Conversations of several turns as prompts: against what transformers makes of the whole conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hooked_mm.batch import Batch, Role
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prompts import Turn, process_prompts, render_prompt
from tests.processors import FAMILIES, processor
from tests.tiny import image_token_id, picture

SMALL = ["llava", "idefics2", "qwen2_vl", "molmo"]
TURNS = [
    Turn("what place is this ?", "snow", 1),
    Turn("what colour is the circle ?", "blue and red", 2),
    Turn("only this ?", "no"),
]
LAST = "how many objects are there ?"


def messages(turns: Sequence[Turn], last: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """A conversation as transformers takes it; pictures that no turn has are the last question's."""
    left, made = list(images), []
    for text, answer, count in [*((one.text, one.answer, one.images) for one in turns), (last, None, None)]:
        shown = [left.pop(0) for _ in range(len(left) if count is None else count)]
        pictures = [{"type": "image", "image": image} for image in shown]
        made.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}]})
        if answer is not None:
            made.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return made


def by_transformers(model: HookedMM, turns: Sequence[Turn], last: str, images: Sequence[Image.Image]) -> Any:
    """The processor's own tensors."""
    return model.processor.apply_chat_template(
        messages(turns, last, images), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def by_role(batch: Batch, role: str, sample: int = 0) -> list[str]:
    """The token strings of a role."""
    return [batch.tokens[sample][place] for place in batch.mask(role=role)[sample].nonzero()[:, 0]]


def own_ids(batch: Batch, sample: int) -> list[int]:
    """The ids of a sample without padding."""
    return batch.input_ids[sample][batch.inputs["attention_mask"][sample].bool()].tolist()


@pytest.mark.parametrize("name", SMALL)
def test_the_whole_conversation_is_as_transformers_makes_it(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """Every tensor: ids, and the pixels of all pictures in the order in which they were shown."""
    model = small(name)
    for turns, shown in ((TURNS, images[:4]), (TURNS, images[:3]), (TURNS[2:], []), (TURNS[2:], images[:1])):
        batch, expected = (
            model.prepare([shown or None], [LAST], history=[turns]),
            by_transformers(model, turns, LAST, shown),
        )
        for key, value in expected.items():
            assert torch.equal(batch.inputs[key], value.to(batch.inputs[key].dtype)), key
        assert len(batch.layout.images) == len(shown)


@pytest.mark.parametrize("name", SMALL)
def test_only_the_last_question_is_the_question(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """All earlier words are template, the earlier answers too; the answer behind the prompt is the only answer."""
    model = small(name)
    turns = [Turn(LAST, "two", 1), Turn(LAST, "three")]
    batch = model.prepare([images[:2]], [LAST], ["three"], history=[turns])
    alone = model.prepare([None], [LAST], ["three"])
    assert by_role(batch, "question") == by_role(alone, "question")
    assert by_role(batch, "answer") == by_role(alone, "answer")
    asked = batch.mask(role="question")[0].nonzero()[:, 0]
    assert int(asked.min()) > int(batch.mask(modality="image")[0].nonzero().max())
    text = batch.mask(modality="text")
    rest = text & ~batch.mask(role="question") & ~batch.mask(role="answer")
    assert torch.equal(rest, batch.mask(role="template"))
    said = model.tokenizer.decode(batch.input_ids[0][rest[0]])
    assert said.count("how many objects are there") == 2
    assert "two" in said


@pytest.mark.parametrize(("name", "side"), [*((name, "left") for name in SMALL), ("llava", "right")])
def test_conversations_of_different_lengths_share_a_batch(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str, side: str
) -> None:
    """Each sample is as it is alone: ids, roles, its own pictures, and on the left the logits behind it."""
    model = small(name)
    history: list[list[Turn]] = [TURNS, [], TURNS[:1]]
    shown = [images[:3], [images[3]], [images[4], images[5]]]
    batch = model.prepare(shown, [LAST, "what place is this ?", LAST], history=history, padding_side=side)
    logits = model.run_with_hooks(batch)
    assert logits is not None
    assert batch.image_sample.tolist() == [0, 0, 0, 1, 2, 2]
    last = batch.last_prompt()
    for sample, (turns, pictures) in enumerate(zip(history, shown, strict=True)):
        alone = model.prepare([pictures], [LAST if sample != 1 else "what place is this ?"], history=[turns])
        assert own_ids(batch, sample) == own_ids(alone, 0)
        there = batch.inputs["attention_mask"][sample].bool()
        assert torch.equal(batch.role[sample][there], alone.role[0])
        single = model.run_with_hooks(alone)
        assert single is not None
        torch.testing.assert_close(logits[sample, last[sample]], single[0, -1], rtol=1e-3, atol=1e-3)
    assert bool((batch.mask(modality="pad")[1, 0 if side == "left" else -1]).all())


def test_pictures_of_other_turns_change_the_answer(llava: HookedMM, images: list[Image.Image]) -> None:
    """Swapping the pictures of two turns is another conversation, with the same words."""
    turns = [Turn("what place is this ?", "snow", 1)]
    one = llava.prepare([images[:2]], [LAST], history=[turns])
    other = llava.prepare([images[1::-1]], [LAST], history=[turns])
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"].flip(0))


def test_image_tokens_place_pictures_inside_their_turn(llava: HookedMM, images: list[Image.Image]) -> None:
    """In earlier turns as in the last: where the token stands in the text."""
    batch = llava.prepare([images[:2]], [f"is <image> {LAST}"], history=[[Turn("a <image> b", "snow", 1)]])
    runs = "".join("i" if flag else "t" for flag in batch.mask(modality="image")[0])
    words = [piece.split() for piece in llava.tokenizer.decode(own_ids(batch, 0)).replace("<image>", "|").split("|")]
    assert [len(run) for run in runs.replace("t", " ").split()] == [64, 64]
    assert next(piece for piece in words if piece)[-1:] == ["a"]
    assert by_role(batch, "question")[:2] == ["is", "how"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("blip-2", "florence2")])
def test_every_processor_is_followed_over_turns(family: str) -> None:
    """Real processors of all families: the ids of the whole conversation, and a question that the turns repeat."""
    made, last = processor(family), "what is the colour?"
    turns = [Turn(last, "red", 1), Turn("and where is it?", "in the snow", 0), Turn(last, "what is the colour?", 1)]
    pictures = [picture(40, 24), picture(24, 40), picture(30, 30)]
    prompt = render_prompt(made, last, 3, template=True, history=turns)
    bare = [
        {**one, "content": [{key: value for key, value in part.items() if key != "image"} for part in one["content"]]}
        for one in messages(turns, last, pictures)
    ]
    text = made.apply_chat_template(bare, tokenize=False, add_generation_prompt=True)
    assert prompt.text == text
    question = [place for place, role in enumerate(prompt.roles) if role == Role.QUESTION]
    assert question == list(range(text.rindex(last), text.rindex(last) + len(last)))
    done = process_prompts(made, image_token_id(family), [prompt], [pictures], "left")
    begins = made.tokenizer.bos_token and text.startswith(made.tokenizer.bos_token)
    special = {"add_special_tokens": False} if begins or family in ("mllama", "molmo") else {}
    expected = made(text=[text], images=[pictures], return_tensors="pt", **special)["input_ids"]
    assert torch.equal(done.inputs["input_ids"], expected)


@given(st.lists(st.tuples(st.sampled_from(["what ?", "assistant : red", "user :"]), st.integers(0, 2)), max_size=4))
def test_turns_of_any_number_have_all_their_image_tokens(drawn: list[tuple[str, int]]) -> None:
    """As many image tokens as pictures in all, none of them in the question's role."""
    made = processor("llava")
    turns = [Turn(text, "user : what ?", count) for text, count in drawn]
    total = sum(count for _, count in drawn)
    prompt = render_prompt(made, LAST, total + 1, template=True, history=turns)
    assert prompt.text.count("<image>") == total + 1
    asked = "".join(letter for letter, role in zip(prompt.text, prompt.roles, strict=True) if role == Role.QUESTION)
    assert asked == LAST
    assert set(prompt.roles) == {Role.TEMPLATE, Role.QUESTION}


@pytest.mark.parametrize(
    ("turns", "shown", "options", "reason"),
    [
        ([Turn("what ?", "red", 2)], 1, {}, "earlier turns have 2 images, but the sample has 1; give all of them"),
        ([Turn("what ?", " ")], 0, {}, r"the answer is empty \(' '\)"),
        ([Turn("what ?", "<image>")], 0, {}, "the answer contains the image token"),
        ([Turn("", "red")], 0, {}, "the prompt is empty"),
        ([Turn("what <image> ?", "red", 0)], 1, {}, "the text has 1 image tokens '<image>' for 0 images"),
        ([Turn("what <image> ?", "red", 2)], 2, {}, "the text has 1 image tokens '<image>' for 2 images"),
        ([Turn("what \ue000", "red")], 0, {}, r"private-use character U\+E000"),
        ([Turn("what ?", "\ue000red")], 0, {}, r"private-use character U\+E000"),
        ([Turn("what ?", "red")], 0, {"template": False}, "1 earlier turns were given, but with template=False"),
    ],
)
def test_turns_that_can_not_be_told_are_refused(
    llava: HookedMM, images: list[Image.Image], turns: list[Turn], shown: int, options: dict[str, Any], reason: str
) -> None:
    """With the sample that has them; without a turn the same sample is taken."""
    with pytest.raises(BadInputError, match=f"sample 1: .*{reason}") as caught:
        llava.prepare([None, images[:shown] or None], ["what ?"] * 2, history=[[], turns], **options)
    assert caught.value.sample == 1


def test_histories_of_another_shape_are_refused(llava: HookedMM) -> None:
    """One list of turns per sample; a list of turns alone is not taken for that of one sample."""
    for history in ([], [[], []], [Turn("what ?", "red")], [*TURNS]):
        with pytest.raises(BadInputError, match="give a list of turns for each"):
            llava.prepare(None, [LAST], history=history)  # type: ignore[arg-type]
    for count in (-1, True, 1.0, "1"):
        with pytest.raises(BadInputError, match=r"a turn has images=.*; give how many"):
            Turn("what ?", "red", count)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["blip-2", "florence2"])
def test_processors_that_take_one_text_refuse_turns(family: str) -> None:
    """They have no template for a conversation; the way out is named."""
    made = processor(family)
    with pytest.raises(BadInputError, match="takes one text; write them into it, or ask anew"):
        render_prompt(made, "what ?", 1, template=True, history=[Turn("what ?", "red")])
    assert render_prompt(made, "what ?", 1, template=True).text == "what ?"
