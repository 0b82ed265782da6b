"""Answered questions: tokens by number, and where the patches of a picture lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image, ImageDraw

from analyses.targets import answer_targets
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked, Patches, asked_of
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.generation import make_output
from hooked_mm.hooked import HookedMM
from tests.explored import ask
from tests.processors import processor
from tests.tiny import tiny

SMALL = ["llava", "idefics2", "qwen2_vl", "molmo"]
FULL = "describe the scene in full ."


@pytest.fixture(scope="module")
def caption(llava: HookedMM, images: list[Image.Image]) -> Asked:
    """A caption of two pictures, in the second turn."""
    first = Conversation().say("what place is this ?", (images[0],)).answered("snow")
    return ask(llava, FULL, images[1], before=first, generation=Generation(8, temperature=5, seed=1))


@pytest.mark.parametrize("name", SMALL)
def test_numbers_words_and_the_answers_batch_agree(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """The token of each number is its word, and plain transformers predicts it in the row that analyses take for it."""
    model = small(name)
    asked = ask(model, FULL, images[1], generation=Generation(40))
    assert len(asked.numbers) > 6
    assert " ".join(asked.words) == asked.answer
    inputs = {key: value for key, value in asked.batch.inputs.items() if key != "position_ids"}
    with torch.no_grad():
        logits = model.hf_model(**inputs).logits[0]
    places = asked.answer_mask[0].nonzero()[:, 0]
    for number in asked.numbers:
        targets = answer_targets(asked.batch, [number])
        (row,), (token,) = targets.row.tolist(), targets.token.tolist()
        assert model.tokenizer.decode([token]) == asked.word(number)
        assert token == int(asked.batch.input_ids[0, places[number]])
        assert int(logits[row].argmax()) == token
    # The end of the answer is in the batch, but it is no word.
    assert len(places) == len(asked.numbers) + 1
    assert int(asked.batch.input_ids[0, places[-1]]) == model.tokenizer.eos_token_id


def test_special_tokens_inside_an_answer_keep_their_numbers(llava: HookedMM, images: list[Image.Image]) -> None:
    """They are no words, but the others are still counted from the answer's first token."""
    conversation, tokenizer = Conversation().say("what colour is it ?", (images[0],)), llava.tokenizer
    prompt = conversation.prepare(llava)
    ids = tokenizer.convert_tokens_to_ids(["<s>", "red", "<image>", "star", "</s>"])
    output = make_output(prompt, torch.tensor([ids]), None, tokenizer, tokenizer.eos_token_id)
    asked = asked_of(
        llava, ModelName("small", "llava"), conversation.answered("red star"), prompt, output, Generation()
    )
    assert (asked.words, asked.numbers, asked.tokens) == (("red", "star"), (1, 3), (1, 3))
    assert asked.word(3) == "star"
    for number in asked.numbers:
        assert answer_targets(asked.batch, [number]).token.tolist() == [ids[number]]
    with pytest.raises(BadInputError, match=r"the answer has no token 2; there are \[1, 3\]"):
        asked.choose([2])


def test_an_answer_without_a_word_has_no_tokens(llava: HookedMM, images: list[Image.Image]) -> None:
    """Nothing can be chosen of it, and choosing nothing is fine."""
    conversation = Conversation().say("what colour is it ?", (images[0],))
    prompt = conversation.prepare(llava)
    end = torch.tensor([[llava.tokenizer.eos_token_id]])
    output = make_output(prompt, end, None, llava.tokenizer, llava.tokenizer.eos_token_id)
    asked = asked_of(llava, ModelName("small", "llava"), conversation.answered(""), prompt, output, Generation())
    assert (asked.words, asked.numbers, asked.answer, asked.choose([]).tokens) == ((), (), "", ())
    with pytest.raises(BadInputError, match=r"the answer has no token 0; there are \[\]"):
        asked.choose([0])


def test_an_asked_question_knows_what_was_said(caption: Asked, images: list[Image.Image]) -> None:
    """The last question and its answer, and the pictures of all turns."""
    assert caption.question == FULL
    assert caption.answer == " ".join(caption.words)
    assert caption.images == (images[0], images[1])
    assert [turn.text for turn in caption.conversation.turns] == ["what place is this ?", FULL]
    assert len(caption.batch.layout.images) == 2
    assert caption.batch.length == caption.prompt.length + 8


def test_tokens_and_points_are_chosen(caption: Asked) -> None:
    """In their order, once each; none chooses all; choosing one thing leaves the other."""
    chosen = caption.choose([3, 1, 3], [(1, 2.5, 3.0), (0, 1.0, 1.0)])
    assert (chosen.tokens, chosen.points) == ((1, 3), ((1, 2.5, 3.0), (0, 1.0, 1.0)))
    assert (chosen.choose([]).tokens, chosen.choose([]).points) == (caption.numbers, chosen.points)
    assert (chosen.choose(points=[]).tokens, chosen.choose(points=[]).points) == ((1, 3), ())
    assert chosen.choose() == chosen
    assert caption.tokens == caption.numbers


@pytest.mark.parametrize("tokens", [[8], [-1], [True], [1.0], ["1"], [None], [[1]], ["star"], [2**70]])
def test_tokens_that_are_none_are_refused(caption: Asked, tokens: list) -> None:
    """By number, whole and there: what equals one in Python is none."""
    with pytest.raises(BadInputError, match="the answer has no token"):
        caption.choose(tokens)


@pytest.mark.parametrize("picture", [2, -1, True, 0.0, "0", None])
def test_points_in_no_picture_are_refused(caption: Asked, picture: object) -> None:
    """The conversation's pictures are counted from 0."""
    with pytest.raises(BadInputError, match=r"there is no picture .*; there are 2"):
        caption.choose(points=[(picture, 1.0, 1.0)])  # type: ignore[list-item]


def test_the_middle_of_a_patch() -> None:
    """By hand: a grid of 2 x 4 over a box that reaches beyond the picture."""
    patches = Patches(2, 4, (-8.0, 0.0, 72.0, 40.0))
    assert patches.centre(0, 0) == (2.0, 10.0)
    assert patches.centre(1, 3) == (62.0, 30.0)


@pytest.mark.parametrize(
    "size", [(61, 90), *(pytest.param(size, marks=pytest.mark.slow) for size in [(48, 72), (64, 48), (180, 60)])]
)
@pytest.mark.parametrize("name", SMALL)
def test_what_is_changed_in_the_middle_of_a_patch_reaches_that_patch(
    small: Callable[[str], HookedMM], name: str, size: tuple[int, int]
) -> None:
    """A dot painted there changes the tower's patch of that row and column most, whatever the processor does before."""
    model, grey = small(name), Image.new("RGB", size, (128, 128, 128))
    asked = ask(model, "what shape is it ?", Image.new("RGB", (50, 50)), grey, generation=Generation(1))
    patches, place = asked.patches(1), asked.batch.layout.images[1]
    assert patches is not None
    assert place.patches is not None
    high, wide = place.patches.shape[0] // patches.rows, place.patches.shape[1] // patches.cols

    def seen(picture: Image.Image) -> torch.Tensor:
        batch = model.prepare([[asked.images[0], picture]], "what shape is it ?")
        value = model.run_with_cache(batch, "vision.blocks.0.hook_resid_pre")[1]["vision.blocks.0.hook_resid_pre"]
        layout = batch.layout
        # Class tokens before the patches are not counted; a packed tower has one row.
        value = value[:, value.shape[1] - layout.patches :] if value.ndim == 3 and layout.patches else value
        value = value if value.ndim == 3 else value[None]
        rows, cells = layout.images[1].patches.unbind(-1)
        return value[rows, cells]

    plain = seen(grey)
    cells = [(row, col) for row in range(patches.rows) for col in range(patches.cols)]
    inside = [
        cell for cell in cells if all(1 < at < side - 1 for at, side in zip(patches.centre(*cell), size, strict=True))
    ]
    assert len(inside) >= len(cells) / 4
    for row, col in (inside[0], inside[len(inside) // 3], inside[len(inside) // 2 + 1], inside[-1]):
        across, down = patches.centre(row, col)
        painted = grey.copy()
        ImageDraw.Draw(painted).rectangle((across - 1, down - 1, across + 1, down + 1), fill=(255, 255, 255))
        change = (seen(painted) - plain).norm(dim=-1)
        most = divmod(int(change.argmax()), change.shape[1])
        assert (most[0] // high, most[1] // wide) == (row, col)


def test_models_without_pictures_or_with_a_decoder_of_their_own(images: list[Image.Image]) -> None:
    """An encoder-decoder's answer stands in the decoder; a model that crosses attention has patches all the same."""
    model = HookedMM(tiny("florence2"), processor("florence2"), check=False)
    asked = ask(model, "what colour is it ?", images[0])
    assert asked.batch.decoder is not None
    assert asked.answer_batch is asked.batch.decoder
    assert asked.answer_mask.shape == asked.batch.decoder.modality.shape
    assert asked.patches(0) is not None
    model = HookedMM(tiny("mllama"), processor("mllama"), check=False)
    asked = ask(model, "what colour is it ?", images[0], generation=Generation(4))
    assert asked.answer_batch is asked.batch
    assert [answer_targets(asked.batch, [one]).token.tolist() for one in asked.numbers] == [
        [token] for token in asked.batch.input_ids[0, -4:].tolist()
    ]


def test_a_question_without_a_picture(llava: HookedMM) -> None:
    """It has tokens, and nothing to click."""
    asked = ask(llava, "what colour is the star ?")
    assert asked.images == ()
    assert asked.words
    with pytest.raises(BadInputError, match="there is no picture 0; there are 0"):
        asked.choose(points=[(0, 1.0, 1.0)])
