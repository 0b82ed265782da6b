"""The position that represents a word is the one that predicts it: shown with the model's own head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.errors import BadInputError, UnknownWordError
from hooked_mm.hooked import GenerationOutput, HookedMM
from hooked_mm.scenes.captions import CAPTION_PROMPT
from hooked_mm.scenes.language import WORD_CLASSES
from hooked_mm.selectors import (
    AtIndex,
    BeforeSpecial,
    EachOf,
    LastPrompt,
    MeanOver,
    Pick,
    Selector,
    TokenOfInterest,
    gather,
)

LAST = "blocks.5.hook_resid_post"
WORDS = tuple(word for options in WORD_CLASSES.values() for word in options)


@pytest.fixture(scope="module")
def said(llava: HookedMM, images: list[Image.Image]) -> GenerationOutput:
    """Greedy captions of sixteen scenes."""
    return llava.generate(llava.prepare(images[:16], CAPTION_PROMPT), 40)


def values(model: HookedMM, batch: Batch, picks: list[Pick], hook: str = LAST) -> Tensor:
    """Representations of picks, (n, d), indexed by hand."""
    cache = model.run_with_cache(batch, hook)[1]
    return torch.stack([cache[hook][pick.sample, list(pick.positions)].mean(0) for pick in picks])


def unembedded(model: HookedMM, resid: Tensor) -> list[int]:
    """What the model's own final norm and head make of last-layer values."""
    core = model.hf_model
    with torch.no_grad():
        return core.lm_head(core.model.language_model.norm(resid)).argmax(-1).tolist()


def test_predicts_is_where_the_model_says_the_word(llava: HookedMM, said: GenerationOutput) -> None:
    """At every picked position of every generated caption, the head's first choice is the word's first token."""
    assert said.batch is not None
    picks = TokenOfInterest(WORDS)(said.batch, llava.tokenizer)
    # Each caption names at least shape, size, colour, position and place.
    assert len(picks) >= 5 * 16
    assert {pick.word for pick in picks} >= {"red", "top left", "snow", "big", "circle"}
    first = [llava.tokenizer(str(pick.word), add_special_tokens=False)["input_ids"][0] for pick in picks]
    assert unembedded(llava, values(llava, said.batch, picks)) == first


def test_at_is_where_the_word_has_been_read(llava: HookedMM, said: GenerationOutput) -> None:
    """At every picked position the input token is the word's last sub-token."""
    assert said.batch is not None
    picks = TokenOfInterest(WORDS, where="at")(said.batch, llava.tokenizer)
    last = [llava.tokenizer(str(pick.word), add_special_tokens=False)["input_ids"][-1] for pick in picks]
    assert [int(said.batch.input_ids[pick.sample, pick.positions[0]]) for pick in picks] == last


def test_every_occurrence_is_picked_in_order(llava: HookedMM, said: GenerationOutput) -> None:
    """Picks are the caption's words in order; with `first` the first of each sample."""
    assert said.batch is not None
    colours = WORD_CLASSES["colours"]
    spoken = [(n, word) for n, text in enumerate(said.text) for word in text.split() if word in colours]
    assert [(p.sample, p.word) for p in TokenOfInterest(colours)(said.batch, llava.tokenizer)] == spoken
    first = TokenOfInterest(colours, occurrences="first")(said.batch, llava.tokenizer)
    expected = [next(pair for pair in spoken if pair[0] == n) for n in range(16)]
    assert [(pick.sample, pick.word) for pick in first] == expected


def test_prompt_words_are_not_picked(llava: HookedMM, images: list[Image.Image]) -> None:
    """Words of interest are looked for in the answer alone: the question's "red" is none."""
    batch = llava.prepare(images[:2], "is there a red object ?", answers=["yes", "red"])
    picks = TokenOfInterest(("red",))(batch, llava.tokenizer)
    assert [pick.sample for pick in picks] == [1]
    # The answer's first word is predicted by the prompt's last token.
    assert picks[0].positions == (int(batch.last_prompt()[1]),)
    assert TokenOfInterest(("red",))(llava.prepare(images[:2], "is there a red object ?"), llava.tokenizer) == []


@pytest.mark.parametrize("where", ["predicts", "at"])
def test_given_answers_give_the_same_picks(
    llava: HookedMM, images: list[Image.Image], said: GenerationOutput, where: str
) -> None:
    """Generated captions, given back as answers, yield the same words with the same representations."""
    selector = TokenOfInterest(WORDS, where)  # type: ignore[arg-type]
    assert said.batch is not None
    given = llava.prepare(images[:16], CAPTION_PROMPT, answers=said.text)
    expected, got = selector(said.batch, llava.tokenizer), selector(given, llava.tokenizer)
    assert [(pick.sample, pick.word) for pick in got] == [(pick.sample, pick.word) for pick in expected]
    torch.testing.assert_close(values(llava, given, got), values(llava, said.batch, expected), rtol=0, atol=1e-4)


SELECTORS: list[Selector] = [
    TokenOfInterest(WORDS),
    TokenOfInterest(WORDS, "at", "first"),
    LastPrompt(),
    MeanOver("image"),
    MeanOver("text", "question"),
    MeanOver(role="answer"),
    EachOf("image"),
    AtIndex(3),
    AtIndex(-2),
    BeforeSpecial(),
    BeforeSpecial("mean"),
]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: str(selector.describe())[:60])
def test_padding_side_does_not_matter(llava: HookedMM, images: list[Image.Image], selector: Selector) -> None:
    """Left and right padding pick the same representations."""
    prompts = [CAPTION_PROMPT, "what place is this ?", "what colour is the circle ?"]
    answers = ["a big red star at the top left .", "snow", "blue and green"]
    picked = []
    for side in ("left", "right"):
        batch = llava.prepare(images[:3], prompts, answers, padding_side=side)
        picks = selector(batch, llava.tokenizer)
        assert picks
        picked.append(([(pick.sample, pick.word) for pick in picks], values(llava, batch, picks)))
    assert picked[0][0] == picked[1][0]
    torch.testing.assert_close(picked[0][1], picked[1][1], rtol=0, atol=1e-4)


def test_mean_over_the_image(llava: HookedMM, images: list[Image.Image]) -> None:
    """The mean over image positions is the mean over the 64 places of `<image>` in the ids."""
    batch = llava.prepare(images[:3], [CAPTION_PROMPT, "what place is this ?", "where is the star ?"])
    picks = MeanOver(modality="image")(batch, llava.tokenizer)
    cache = llava.run_with_cache(batch, "blocks.2.hook_resid_post")[1]
    value = cache["blocks.2.hook_resid_post"]
    image = batch.input_ids == llava.tokenizer.convert_tokens_to_ids("<image>")
    assert image.sum(1).tolist() == [64] * 3
    by_hand = torch.stack([value[row][image[row]].mean(0) for row in range(3)])
    torch.testing.assert_close(gather(value, picks), by_hand, rtol=0, atol=1e-5)


def test_mean_leaves_out_samples_without_such_positions(llava: HookedMM, images: list[Image.Image]) -> None:
    """A sample without an image has no mean over the image; nothing takes its place."""
    batch = llava.prepare([images[0], None, images[1]], "what place is this ?")
    assert [pick.sample for pick in MeanOver("image")(batch, llava.tokenizer)] == [0, 2]


def test_last_prompt_predicts_the_first_token(llava: HookedMM, images: list[Image.Image]) -> None:
    """With prompts of several lengths, the head's choice at the picked position is what generation says first."""
    prompts = ["what place is this ?", CAPTION_PROMPT, "how many objects are there ?", "is there a red object ?"] * 3
    batch = llava.prepare(images[:12], prompts)
    generated = llava.generate(batch, 3)
    assert generated.batch is not None
    for one in (batch, generated.batch):
        picks = LastPrompt()(one, llava.tokenizer)
        assert [pick.sample for pick in picks] == list(range(12))
        assert unembedded(llava, values(llava, one, picks)) == generated.tokens[:, 0].tolist()


def test_gather_accumulates_in_float32() -> None:
    """A mean of many bfloat16 values is the float32 mean, rounded once; the dtype stays."""
    value = (1000 + torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    picks = [Pick(1, tuple(range(400))), Pick(0, (3,))]
    got = gather(value, picks)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[0], value[1].double().mean(0).bfloat16())
    assert torch.equal(got[1], value[0, 3])
    assert gather(value, []).shape == (0, 8)


def test_description_names_every_setting() -> None:
    """What goes into the manifest tells two selectors apart."""
    described = [str(selector.describe()) for selector in [*SELECTORS, TokenOfInterest(("red",)), MeanOver("text")]]
    assert len(set(described)) == len(described)
    assert TokenOfInterest(("red",)).describe() == {
        "selector": "TokenOfInterest",
        "words": ("red",),
        "where": "predicts",
        "occurrences": "all",
        "word_class": None,
    }


def test_words_that_can_not_be_said_are_refused(llava: HookedMM, images: list[Image.Image]) -> None:
    """A word outside the vocabulary is named."""
    batch = llava.prepare(images[:1], CAPTION_PROMPT, answers=["a red star ."])
    with pytest.raises(UnknownWordError, match="elephant"):
        TokenOfInterest(("red", "elephant"))(batch, llava.tokenizer)
    with pytest.raises(BadInputError, match="give words, or word_class"):
        TokenOfInterest(())
    with pytest.raises(BadInputError, match=r"write \['red'\]"):
        TokenOfInterest("red")
    with pytest.raises(BadInputError, match="nearest: colours"):
        TokenOfInterest(word_class="colors")
    with pytest.raises(BadInputError, match="can't make any of the sentiments"):
        TokenOfInterest(word_class="sentiments")(batch, llava.tokenizer)


def test_a_class_of_words(llava: HookedMM, images: list[Image.Image]) -> None:
    """Its words that the tokenizer knows are picked; others, which the model could never say, are no error."""
    batch = llava.prepare(images[:1], CAPTION_PROMPT, answers=["a red star and a blue ring on a beach ."])
    picks = TokenOfInterest(word_class="colours")(batch, llava.tokenizer)
    assert [pick.word for pick in picks] == ["red", "blue"]
    both = TokenOfInterest(["beach", "blue"], word_class="colours")(batch, llava.tokenizer)
    assert [pick.word for pick in both] == ["red", "blue", "beach"]


def test_each_position_and_one_position(llava: HookedMM, images: list[Image.Image]) -> None:
    """As they stand in the batch, padding left out, whatever the neighbours' lengths."""
    batch = llava.prepare(images[:2], [CAPTION_PROMPT, "what place is this ?"], answers=["a red star .", "sea"])
    assert len(set(batch.inputs["attention_mask"].sum(1).tolist())) == 2
    answers = EachOf(role="answer")(batch, llava.tokenizer)
    spelled = [[batch.tokens[p.sample][p.positions[0]] for p in answers if p.sample == n] for n in range(2)]
    assert spelled == [["a", "red", "star", "."], ["sea"]]
    assert len(EachOf()(batch, llava.tokenizer)) == int(batch.inputs["attention_mask"].sum())
    assert {pick.word for pick in EachOf()(batch, llava.tokenizer)} == {None}
    named = EachOf(tokens=True)(batch, llava.tokenizer)
    assert [pick.word for pick in named if pick.sample == 1][-1] == "sea"
    assert sum(pick.word is None for pick in named) == int(batch.mask("image").sum())
    starts = [int(row.nonzero()[0]) for row in batch.inputs["attention_mask"]]
    assert [p.positions for p in AtIndex(0)(batch, llava.tokenizer)] == [(start,) for start in starts]
    assert {p.positions for p in AtIndex(-1)(batch, llava.tokenizer)} == {(batch.input_ids.shape[1] - 1,)}
    longest = int(batch.inputs["attention_mask"].sum(1).max())
    assert len(AtIndex(longest - 1)(batch, llava.tokenizer)) == 1
    assert not AtIndex(longest)(batch, llava.tokenizer)


def test_before_the_end(llava: HookedMM, said: GenerationOutput) -> None:
    """The generated end is left out; the mean is over all that was said before it, or before a token of one's own."""
    assert said.batch is not None
    answer = said.batch.mask(role="answer")
    last, mean, first = (
        BeforeSpecial(**settings)(said.batch, llava.tokenizer)  # type: ignore[arg-type]
        for settings in ({}, {"pool": "mean"}, {"pool": "mean", "tokens": ["and", "."]})
    )
    assert len(last) == len(mean) == len(first) == 16
    for sample in range(16):
        words = [said.batch.tokens[sample][place] for place in answer[sample].nonzero()[:, 0].tolist()]
        assert words[-1] == llava.tokenizer.eos_token
        assert said.batch.tokens[sample][last[sample].positions[0]] == words[-2] == "."
        assert [said.batch.tokens[sample][place] for place in mean[sample].positions] == words[:-1]
        end = min(words.index(word) for word in ("and", ".") if word in words)
        assert [said.batch.tokens[sample][place] for place in first[sample].positions] == words[:end]
    with pytest.raises(BadInputError, match="no token of this tokenizer"):
        BeforeSpecial(tokens=["<end>"])(said.batch, llava.tokenizer)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (TokenOfInterest, {"where": "before"}),
        (TokenOfInterest, {"occurrences": "last"}),
        (BeforeSpecial, {"pool": "max"}),
    ],
)
def test_settings_that_do_not_exist_are_refused(kind: Any, setting: dict[str, str]) -> None:
    """A misspelt setting is refused and named, never taken for another one."""
    words = {"words": ["red"]} if kind is TokenOfInterest else {}
    with pytest.raises(BadInputError, match=next(iter(setting.values()))):
        kind(**words, **setting)


@pytest.mark.parametrize(("selector", "named"), [(MeanOver("imag"), "image"), (MeanOver(role="reply"), "reply")])
def test_unknown_modalities_and_roles_are_refused(
    llava: HookedMM, images: list[Image.Image], selector: MeanOver, named: str
) -> None:
    """The known ones are offered."""
    with pytest.raises(BadInputError, match=named):
        selector(llava.prepare(images[:1], CAPTION_PROMPT), llava.tokenizer)


def test_raw_tensors_have_no_answer(llava: HookedMM) -> None:
    """A batch made from raw tensors has no roles, so words of its answer can't be asked for."""
    batch = batch_from_inputs({"input_ids": torch.tensor([[2, 8, 39]])}, llava.structure, llava.hf_model.config)
    with pytest.raises(BadInputError, match="roles are unknown"):
        TokenOfInterest(("red",))(batch, llava.tokenizer)
