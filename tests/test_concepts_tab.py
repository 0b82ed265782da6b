"""The explorer's concepts: what fires is what a plain pass says, is named by what is said, and is nobody else's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import nnls

from concept_dict import concepts_tab
from concept_dict.concepts_tab import KEPT, make_tab
from concept_dict.dictionary import ConceptDictionary
from concept_dict.grounding import STOPWORDS
from concept_dict.on_the_spot import SceneRows, learnt_here
from concept_dict.pca import PCA
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.conversation import Generation
from hooked_mm.explorer.panels import Note, Pictures, Table, Words
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.draw import render
from hooked_mm.scenes.world import Scene
from hooked_mm.selectors import EachOf
from tests.explored import ask, assert_same, first_values, look, made_again, told
from tests.processors import processor
from tests.tiny import tiny

HOOK = "blocks.5.hook_resid_post"


@pytest.fixture(scope="module")
def starry(scenes: list[Scene]) -> Scene:
    """A scene with one star among other things."""
    return next(one for one in scenes if len(one.objects) > 1 and [o.shape for o in one.objects].count("star") == 1)


def panels(view: View, kind: type) -> list[Any]:
    """The panels of a kind."""
    return [one for one in view.panels if isinstance(one, kind)]


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_the_strongest_concept_is_the_colour_that_is_said(
    small: Callable[[str], HookedMM], name: str, starry: Scene
) -> None:
    """Planted truth: learnt on scenes, named by the answer's word first, and over the star more than elsewhere."""
    colour = next(one.colour for one in starry.objects if one.shape == "star")
    asked = ask(small(name), "what colour is the star ?", picture(starry), name=name)
    view = look(make_tab([]), asked)
    assert asked.answer == colour
    firing = panels(view, Table)[0]
    concept, activation, at, words = firing.rows[0]
    assert (at.strip(), words.split(", ")[0]) == (colour, colour)
    assert firing.picks[0]["concept"].startswith(f"{concept} of scenes words")
    assert activation == pytest.approx(float(view.arrays["activations"].max()))
    closely = panels(view, Table)[1]
    assert closely.rows[0][0] == colour
    assert closely.rows[0][1] > 0.5
    assert panels(view, Pictures)[1].title == f"Samples that activate concept {concept} most"
    # The map over the picture's pixels; objects are drawn in their order.
    values = view.arrays[f"map of {concept} in 0"]
    index = [one.shape for one in starry.objects].index("star")
    mask = np.asarray(render(starry)[1][index]) > 0.5
    share = torch.nn.functional.interpolate(values[None, None].nan_to_num(), mask.shape)[0, 0].numpy()
    assert share[mask].mean() > share[~mask].mean()


def test_activations_are_those_of_a_plain_pass(llava: HookedMM, images: list[Image.Image]) -> None:
    """Non-negative least squares by scipy, on the rows that transformers alone gives, token for token."""
    asked = ask(llava, "what place is this ?", images[0])
    tab = make_tab([])
    view = look(tab, asked, dictionary="here", kind="semi-NMF", count=4)
    with torch.no_grad():
        stream: list[torch.Tensor] = []
        handle = llava.hf_model.model.language_model.layers[5].register_forward_hook(
            lambda module, args, output: stream.append(output[0].double())
        )
        llava.hf_model.model(**asked.batch.inputs)
        handle.remove()
    image = asked.batch.mask("image")[0]
    rows = stream[0][image]
    concepts = view.arrays["concepts"].double()
    mean = rows.mean(dim=0)
    expected = np.stack([nnls(concepts.T.numpy(), (row - mean).numpy())[0] for row in rows])
    np.testing.assert_allclose(view.arrays["activations"].numpy(), expected, rtol=2e-3, atol=0.02 * expected.max())
    close = panels(view, Table)[0].rows[0][0]
    assert close == int(expected.max(axis=0).argmax())
    at_tokens = view.arrays["tokens"]
    assert torch.equal(at_tokens.isnan(), image)
    place = int((~image).nonzero()[-1])
    by_hand = nnls(concepts.T.numpy(), (stream[0][place] - mean).numpy())[0][close]
    assert float(at_tokens[place]) == pytest.approx(by_hand, rel=2e-3, abs=0.02 * expected.max())
    assert len(panels(view, Words)[0].words) == int((~image).sum())


@pytest.mark.parametrize("family", ["mllama", "florence2", "blip-2"])
def test_pictures_that_stand_elsewhere_than_in_the_text(family: str) -> None:
    """Cross-attention, an encoder of their own, latents: concepts of what there is, maps over the tower's patches."""
    model = HookedMM(tiny(family), processor(family), check=False)
    asked = told(model, "what is this?", "a red circle", Image.new("RGB", (40, 30), (200, 30, 40)), name=family)
    tab = make_tab([])
    for changed in ({"dictionary": "here", "count": 3}, {"dictionary": "scenes words", "scenes": 8, "count": 4}):
        view = look(tab, asked, kind="k-means", **changed)
        maps = [value for name, value in view.arrays.items() if name.startswith("map of")]
        assert maps
        assert max(float(value.nan_to_num().max()) for value in maps) > 0
        assert len(panels(view, Words)[0].words) > 3
        assert_same(made_again(view, asked), view.arrays)
    if family != "blip-2":
        with pytest.raises(BadInputError, match="no position in any scene"):
            look(tab, asked, dictionary="scenes image", scenes=8)


def test_a_click_opens_a_concept_and_chosen_tokens_are_the_rows(llava: HookedMM, images: list[Image.Image]) -> None:
    """A row's pick is looked at; of a caption only the tokens chosen above count."""
    tab = make_tab([])
    asked = ask(llava, "describe the image .", images[1], generation=Generation(10))
    few: dict[str, Any] = {"scenes": 8, "kind": "semi-NMF"}
    whole = look(tab, asked, **few)
    picks = panels(whole, Table)[0].picks
    assert len(picks) > 2
    opened = look(tab, asked, **few, **picks[2])
    number = panels(whole, Table)[0].rows[2][0]
    assert panels(opened, Table)[1].title.startswith(f"Concept {number}:")
    assert [int(value.split()[0]) for _, value in opened.options["concept"]] == list(range(26))
    # Of another dictionary the number says nothing: its strongest is shown.
    other = look(tab, asked, **few, **picks[2], layer=2)
    strongest = panels(other, Table)[0].rows[0][0]
    assert panels(other, Table)[1].title.startswith(f"Concept {strongest}:")
    chosen = look(tab, asked.choose(tokens=[asked.numbers[1]]), **few)
    assert torch.equal(chosen.arrays["activations"], whole.arrays["activations"][1:2])


def test_what_is_downloaded_finds_the_same(llava: HookedMM, images: list[Image.Image], tmp_path: Path) -> None:
    """Bit for bit: learnt here and on scenes, opened with and without samples; several turns and pictures, none."""
    asked = ask(llava, "describe the image .", images[0])
    later = ask(llava, "what place is this ?", images[1], before=asked.conversation)
    alone = ask(llava, "what place is this ?")
    learnt_here(llava, asked.batch, HOOK, "k-means", 3).save(tmp_path / "own")
    tab = make_tab([tmp_path / "own"])
    few: dict[str, Any] = {"scenes": 8, "kind": "k-means"}
    looks: list[tuple[Any, dict[str, Any]]] = [
        (asked, {**few, "dictionary": "here", "layer": 2, "concept": "1 of here 2 k-means 12", "count": 12}),
        (later, {**few, "dictionary": "scenes image", "count": 4}),
        (later, {"dictionary": "scenes words", "scenes": 8, "concept": "3 of scenes words 5 sparse 8 8", "count": 8}),
        (alone, {**few, "dictionary": "here", "count": 50}),
        (asked, few),
    ]
    for one, changed in looks:
        view = look(tab, one, **changed)
        assert_same(made_again(view, one), view.arrays)
    assert len({key.split(" in ")[1] for key in look(tab, later, **few).arrays if key.startswith("map")}) == 2


def test_what_scenes_gave_is_kept_and_nothing_of_a_visitor(
    llava: HookedMM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next look makes no scene; few results are held, and none of a visitor's own."""
    made: list[int] = []
    real = concepts_tab.scene_rows

    def counted(*args: Any) -> SceneRows:
        made.append(args[3])
        return real(*args)

    monkeypatch.setattr(concepts_tab, "scene_rows", counted)
    tab, own = make_tab([]), images[2].copy()
    asked = ask(llava, "what place is this ?", own)
    for _ in range(2):
        look(tab, asked, scenes=8, kind="k-means")
        look(tab, asked, scenes=8, kind="k-means", dictionary="here")
    assert made[:2] == [8, 8]
    assert len(made) == 2
    for layer in range(4):
        found = look(tab, asked, scenes=8, layer=layer, count=2, kind="k-means", dictionary="scenes image")
    fresh = look(make_tab([]), asked, scenes=8, layer=3, count=2, kind="k-means", dictionary="scenes image")
    assert_same(found.arrays, fresh.arrays)
    assert len(tab._kept) == KEPT
    assert {type(one) for one in tab._kept.values()} == {SceneRows, ConceptDictionary}
    seen = [weakref.ref(own), weakref.ref(asked.batch), weakref.ref(asked)]
    del own, asked
    gc.collect()
    assert [one() for one in seen] == [None] * 3


def test_stopped_among_scenes_nothing_half_made_is_kept(llava: HookedMM, images: list[Image.Image]) -> None:
    """It says how far it is, ends at the next step, and the next look begins anew."""

    class Impatient(Work):
        def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
            super().step(told, done, total)
            if done:
                assert (told, self.share) == ("looking at made scenes", 16 / 40)
                self.stop()

    tab = make_tab([])
    asked = ask(llava, "what place is this ?", images[0])
    with pytest.raises(Stopped):
        tab.look(asked, first_values(tab, llava, scenes=40), Impatient())
    assert not tab._kept
    assert panels(look(tab, asked, scenes=8, kind="k-means"), Table)


def test_another_model_and_what_there_is_not_are_refused(
    llava: HookedMM, small: Callable[[str], HookedMM], images: list[Image.Image], tmp_path: Path
) -> None:
    """Clearly; and a concept that a smaller dictionary no longer has is not."""
    asked = ask(llava, "what place is this ?", images[0])
    learnt_here(llava, asked.batch, HOOK, "k-means", 3).save(tmp_path / "run" / "KMeans-k3")
    tab = make_tab([tmp_path / "run"])
    other = ask(small("molmo"), "what place is this ?", images[0], name="molmo")
    with pytest.raises(BadInputError, match=r"learnt on the model.*llava.*molmo"):
        look(tab, other)
    for wrong in ("3", -1, 1.5, "x of y"):
        with pytest.raises(BadInputError, match="no concept"):
            look(tab, asked, concept=wrong)
    view = look(tab, asked, concept="40 of opened 0")
    assert "no concept 40 among these 3" in panels(view, Note)[0].text
    with pytest.raises(BadInputError, match="holds neither"):
        make_tab([tmp_path])


def test_the_other_end_of_a_signed_concept_has_its_own_words(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """What fires below zero is named by the negative direction, and shown by samples at that end."""
    asked = ask(llava, "what place is this ?", images[0])
    rows = torch.randn(40, llava.cfg.d_model, generator=torch.Generator().manual_seed(1))
    fitted = PCA(2).fit(rows)
    fitted.mean_ += 1e4 * fitted.components_[0]
    ConceptDictionary(fitted, HOOK, {"selectors": {"0": EachOf("image").describe()}}).save(tmp_path)
    view = look(make_tab([tmp_path]), asked, scenes=8)
    concept, activation = panels(view, Table)[0].rows[0][:2]
    assert concept == 0
    assert activation < -5e3
    scaled = -fitted.components_[0] * llava.cfg.d_model**0.5
    ordered = llava.to_logits(scaled).argsort(descending=True).tolist()
    words = [llava.tokenizer.decode([token]).strip() for token in ordered]
    assert "negative end" in panels(view, Table)[1].title
    assert panels(view, Table)[1].rows[0][0] == next(one for one in words if one.isalpha() and one not in STOPWORDS)
    assert_same(made_again(view, asked), view.arrays)


def test_big_pictures_and_many_of_them_are_drawn_small(llava: HookedMM) -> None:
    """Maps are never larger than what is shown, and no more than a dozen."""
    sizes = [(2600, 1700), *[(300, 700)] * 3]
    big = [Image.new("RGB", size, (20 * n, 90, 40)) for n, size in enumerate(sizes)]
    asked = ask(llava, "what place is this ?", *big)
    view = look(make_tab([]), asked, dictionary="here", kind="k-means", scenes=8)
    shown = [one for panel in panels(view, Pictures) for one in panel.pictures]
    assert shown
    assert max(max(one.image.size) for one in shown) <= 600
    assert len(panels(view, Pictures)[0].pictures) <= 12
    assert any("maps are shown" in note.text for note in panels(view, Note))
