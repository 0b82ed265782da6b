"""Explanations: the concepts that fire, at the dictionary's own positions, recomputed from a plain forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from concept_dict.dictionary import ConceptDictionary
from concept_dict.explain import (
    Explanation,
    explain,
    fire,
    made_selectors,
    rows_to_look_at,
    stream,
    token_activations,
)
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import load_images
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.world import COLOURS
from hooked_mm.selectors import AtIndex, LastPrompt, MeanOver, TokenOfInterest
from tests.planted import dictionary

HOOK = "blocks.5.hook_resid_post"
COLOUR_WORDS = TokenOfInterest(tuple(COLOURS))
PICKED = {"colours": COLOUR_WORDS.describe()}


@pytest.fixture(scope="module")
def item() -> Sample:
    """A scene with objects of two colours, and its full caption."""
    data = SceneDataset(40, style="full", seed=3, count=2)
    return next(s for s in (data[n] for n in range(40)) if len(set(s.columns["colour"])) == 2)


@pytest.fixture(scope="module")
def colours(llava: HookedMM) -> ConceptDictionary:
    """A concept per colour: what the final norm and the unembedding read its word from."""
    vocabulary = llava.tokenizer.get_vocab()
    gain = llava.hf_model.get_submodule(llava.structure.final_norm).weight
    rows = [llava.hf_model.get_output_embeddings().weight[vocabulary[colour]] / gain for colour in COLOURS]
    rows = torch.stack(rows).detach()
    return dictionary(HOOK, rows - rows.mean(0), selectors=PICKED, answer="generated", max_new_tokens=40)


def test_what_fires_is_what_the_picture_shows(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """Concepts of the two colours of the scene fire most, each where its word is predicted, named by its word."""
    found = colours.explain(llava, item.images, item.text, count=2)
    assert {firing.at for firing in found.firings} == set(item.columns["colour"])
    for firing in found.firings:
        assert list(COLOURS)[firing.concept] == firing.at == firing.words[0].text
    assert found.answer == item.answer
    assert found.how == "gradient"


def test_activations_are_those_of_a_plain_pass(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """The caption given: rows from hooks read by hand, the largest activation per concept, strongest first."""
    found = explain(colours, llava, item.images, item.text, item.answer, count=8)
    batch = llava.prepare([item.images], item.text, [item.answer])
    _, cache = llava.run_with_cache(batch, [HOOK])
    places = [pick.positions[0] for pick in COLOUR_WORDS(batch, llava.tokenizer)]
    rows = cache[HOOK][0, places].double().numpy()
    expected = np.maximum(rows @ colours.concepts.double().numpy().T, 0)
    order = np.argsort(-expected.max(0))
    fired = [k for k in order if expected[:, k].max() > 0]
    assert [firing.concept for firing in found.firings] == fired
    for firing in found.firings:
        assert firing.activation == pytest.approx(expected[:, firing.concept].max(), rel=1e-4)
        assert firing.position == places[int(expected[:, firing.concept].argmax())]


def test_the_answer_is_made_as_the_dictionarys_was(llava: HookedMM, item: Sample) -> None:
    """Prompts alone where it was made of prompts; a prefix where it had one; another selector where asked."""
    directions = np.random.default_rng(0).standard_normal((3, 128))
    last = {"LastPrompt": {"selector": "LastPrompt"}}
    alone = explain(dictionary(HOOK, directions, selectors=last, answer="none"), llava, item.images, item.text)
    assert alone.answer is None
    made = dictionary(HOOK, directions, selectors=last, answer="generated", answer_prefix="a red", max_new_tokens=3)
    begun = explain(made, llava, item.images, item.text)
    batch = llava.prepare([item.images], item.text, answer_prefix="a red")
    assert begun.answer == llava.generate(batch, 3).text[0]
    other = explain(made, llava, item.images, item.text, selector=AtIndex(0))
    assert other.selector == "AtIndex(index=0)"
    assert {firing.position for firing in other.firings} == {0}


def test_a_negative_activation_is_the_other_end(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """A signed concept turned round fires as much below zero, with the words of its other end."""
    plain = explain(colours, llava, item.images, item.text, item.answer, count=1).firings[0]
    turned = dictionary(HOOK, -colours.concepts.numpy(), signed=True, **colours.made_by)
    found = next(
        firing
        for firing in explain(turned, llava, item.images, item.text, item.answer, count=8).firings
        if firing.concept == plain.concept
    )
    # Its largest activation in size may be another colour's word, which points away from it.
    assert found.activation < 0 or abs(found.activation) >= plain.activation
    ends = [f for f in explain(turned, llava, item.images, item.text, item.answer, count=8).firings if f.activation < 0]
    assert any(firing.words[0].text == list(COLOURS)[firing.concept] for firing in ends)


def test_maps_and_pictures(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """One map per picture and concept, in the picture's frame; at image positions the concept itself is drawn."""
    found = explain(colours, llava, item.images, item.text, item.answer, count=3)
    for firing in found.firings:
        (area,) = firing.where
        assert area.values.shape == (8, 8)
        assert area.size == item.images.size
    assert found.draw(96).width > 2 * 96
    at_image = explain(colours, llava, item.images, item.text, item.answer, selector=MeanOver(modality="image"))
    assert at_image.how == "positions"
    batch = llava.prepare([item.images], item.text)
    _, cache = llava.run_with_cache(batch, [HOOK])
    for firing in at_image.firings:
        rows = cache.grid(HOOK, 0)[0]
        expected = (rows @ colours.concepts[firing.concept]).clamp_min(0).numpy()
        np.testing.assert_allclose(firing.where[0].values, expected, atol=2e-4)


def test_without_a_picture(llava: HookedMM, colours: ConceptDictionary) -> None:
    """Concepts of text alone fire too; there is nothing to draw, and that is said."""
    found = explain(colours, llava, None, "what is this ?", "a red circle")
    assert found.firings
    assert all(firing.where == () for firing in found.firings)
    with pytest.raises(BadInputError, match="no pictures"):
        found.draw()


def test_a_short_table(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """Question and answer, hook, and a line per concept; nothing wider than a terminal."""
    lines = str(explain(colours, llava, item.images, item.text, item.answer, count=2)).splitlines()
    assert lines[0] == f"{item.text!r} -> {item.answer!r}"
    assert lines[1].startswith(HOOK)
    assert lines[2].split() == ["concept", "activation", "at", "words"]
    assert [line.split()[2] for line in lines[3:]] == [line.split()[3].rstrip(",") for line in lines[3:]]
    assert len(lines) == 5
    assert max(map(len, lines[1:])) <= 130
    assert str(Explanation((), "why", None, HOOK, "x", "gradient", ())).endswith("(nothing fires)")


@pytest.mark.parametrize(
    ("made_by", "reason"),
    [
        ({}, "made_by has no 'selectors'"),
        ({"selectors": {"mine": {"selector": "Mine"}}}, "no selector 'Mine'.*your own, give it"),
    ],
)
def test_positions_that_are_not_known(llava: HookedMM, made_by: dict[str, Any], reason: str, item: Sample) -> None:
    """Refused with the way out, which works."""
    made = dictionary(HOOK, np.eye(128)[:2], **made_by)
    with pytest.raises(BadInputError, match=reason):
        explain(made, llava, item.images, item.text)
    assert explain(made, llava, item.images, item.text, "a", selector=LastPrompt()).selector == "LastPrompt()"


def test_an_answer_without_the_words(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """Where the selector finds nothing there is nothing to explain; the answer is told, and an unknown way refused."""
    with pytest.raises(BadInputError, match=r"finds no position in this sample \('a circle'\)"):
        explain(colours, llava, item.images, item.text, "a circle")
    with pytest.raises(BadInputError, match="no way to say where 'gradients'; nearest: gradient"):
        explain(colours, llava, item.images, item.text, item.answer, how="gradients")


def test_selectors_come_back_from_their_description() -> None:
    """Every selector of ours, through JSON."""
    asked = {"a": COLOUR_WORDS, "b": MeanOver(role="answer"), "c": AtIndex(-2)}
    found = made_selectors({"selectors": {name: one.describe() for name, one in asked.items()}})
    assert found == asked


def test_what_fires_at_given_positions(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """Rows are those of the picks; only so many have maps; one that is asked for comes even if it does not fire."""
    batch = llava.prepare([item.images], item.text, [item.answer])
    picks = COLOUR_WORDS(batch, llava.tokenizer)
    pictures = load_images(item.images)
    found = fire(colours, llava, batch, picks, pictures, count=3, drawn=1)
    assert found.activations.shape == (len(picks), len(COLOURS))
    strongest = found.activations.max(dim=0).values
    assert [one.concept for one in found.firings] == strongest.argsort(descending=True)[:3].tolist()
    assert [len(one.where) for one in found.firings] == [1, 0, 0]
    least = int(strongest.argmin())
    more = fire(colours, llava, batch, picks, pictures, count=3, drawn=0, also=[least])
    assert [one.concept for one in more.firings][-1] == least
    assert [len(one.where) for one in more.firings] == [0, 0, 0, 1]
    with pytest.raises(BadInputError, match="no concept 8"):
        fire(colours, llava, batch, picks, pictures, also=[8])
    with pytest.raises(BadInputError, match="take a dictionary of the language model's stream"):
        stream(llava, batch, "projector.hook_out")


def test_rows_of_an_answer_are_its_chosen_tokens(llava: HookedMM, colours: ConceptDictionary, item: Sample) -> None:
    """Where they are predicted or where they are read, as the dictionary's own; elsewhere what its selector finds."""
    batch = llava.prepare([item.images], item.text, [item.answer])
    first = int(batch.mask(role="answer")[0].nonzero()[0])

    def places(*selectors: Any, tokens: tuple[int, ...] = (0, 3)) -> list[tuple[int, ...]]:
        described = {str(n): selector.describe() for n, selector in enumerate(selectors)}
        made = ConceptDictionary(colours.decomposition, HOOK, {"selectors": described} if selectors else {})
        return [pick.positions for pick in rows_to_look_at(made, llava, batch, tokens)]

    predicted, read = [(first - 1,), (first + 2,)], [(first,), (first + 3,)]
    assert places(TokenOfInterest(("red",))) == places() == predicted
    assert places(TokenOfInterest(("red",), where="at")) == places(MeanOver(role="answer")) == read
    assert places(LastPrompt()) == [(first - 1,)]
    image = batch.mask("image")[0].nonzero()[:, 0].tolist()
    assert places(MeanOver("image"), LastPrompt()) == [tuple(image), (first - 1,)]
    with pytest.raises(BadInputError, match="no token 99"):
        places(tokens=(99,))
    with pytest.raises(BadInputError, match="finds no position in this conversation"):
        places(AtIndex(10_000))
    with pytest.raises(BadInputError, match="finds no position in this conversation"):
        places(TokenOfInterest(("red",)), tokens=())


def test_activations_at_every_token_are_those_of_the_text(
    llava: HookedMM, colours: ConceptDictionary, item: Sample
) -> None:
    """NaN where a picture stands; elsewhere positive parts of products with a plain pass."""
    batch = llava.prepare([item.images], item.text, [item.answer])
    found = token_activations(colours, llava, batch)
    image = batch.mask("image")[0]
    assert torch.equal(found.isnan().all(dim=1), image)
    with torch.no_grad():
        _, cache = llava.run_with_cache(batch, [HOOK])
    expected = (cache[HOOK][0].double() @ colours.concepts.double().T).clamp_min(0)
    torch.testing.assert_close(found[~image].double(), expected[~image], rtol=1e-4, atol=1e-4)
