"""The explorer's steering: what it says is what a model with a hand-made hook says, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from concept_dict.dictionary import ConceptDictionary
from concept_dict.pca import PCA
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import Generation
from hooked_mm.explorer.panels import Facts, Note, Table, Texts
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import Scene
from hooked_mm.steering_vector import SteeringVector, save_vectors
from steering import steering_tab
from steering.steering_tab import alphas_of, make_tab
from tests.explored import ask, assert_same, first_values, look, made_again, told
from tests.processors import processor
from tests.tiny import tiny

QUESTION = "what colour is the {} ?"
HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def coloured(scenes: list[Scene]) -> tuple[Image.Image, str, str]:
    """A picture, a question about a thing in it that stands alone with its shape, and the true colour."""
    for scene in scenes:
        first = scene.objects[0]
        if sum(one.shape == first.shape for one in scene.objects) == 1 and first.colour != "blue":
            return picture(scene), QUESTION.format(first.shape), first.colour
    raise AssertionError("no such scene")


def panel(view: View, kind: type) -> Any:
    """The first panel of a kind."""
    return next(one for one in view.panels if isinstance(one, kind))


def said(view: View) -> tuple[str, str]:
    """Unsteered and steered answers."""
    (_, one), (_, other) = panel(view, Texts).texts
    return one, other


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_a_true_colour_becomes_blue_in_every_family(
    small: Callable[[str], HookedMM], name: str, coloured: tuple[Image.Image, str, str]
) -> None:
    """Unsteered it is the scene's own truth; steered, what was typed; and its token's probability tells it."""
    image, question, colour = coloured
    view = look(make_tab([]), ask(small(name), question, image, name=name), target="blue")
    assert said(view) == (colour, "blue")
    rows = {row[0].strip(): row[1:] for row in panel(view, Table).rows}
    assert rows[colour][0] > 0.9
    assert rows["blue"][1] > 0.5
    assert rows["blue"][0] < 0.05
    assert dict(panel(view, Facts).facts)["answer"] == "changed"


@pytest.mark.parametrize("family", ["mllama", "florence2"])
def test_pictures_that_stand_elsewhere_than_in_the_text(family: str) -> None:
    """Cross-attention, an encoder of their own: random miniatures, found again bit for bit."""
    model = HookedMM(tiny(family), processor(family), check=False)
    asked = told(model, "what is this?", "a red circle", Image.new("RGB", (40, 30), (200, 30, 40)), name=family)
    tab = make_tab([])
    for changed in ({"target": "a triangle"}, {"operation": "rotate", "layer": 0, "alpha": 1.0}):
        view = look(tab, asked, **changed)
        assert float(view.arrays["vector"].norm()) > 0
        assert not torch.equal(view.arrays["before"], view.arrays["after"])
        assert_same(made_again(view, asked), view.arrays)


def test_alpha_zero_changes_nothing(llava: HookedMM, coloured: tuple[Image.Image, str, str]) -> None:
    """Not a bit of the first token's logits, nor a token; neither for greedy answers nor for drawn ones."""
    image, question, _ = coloured
    for generation in (Generation(6), Generation(12, temperature=3.0, top_p=0.95, seed=5)):
        asked = ask(llava, question, image, generation=generation)
        view = look(make_tab([]), asked, target="blue", alpha=0, sweep=True)
        assert said(view) == (asked.answer, asked.answer)
        assert torch.equal(view.arrays["before"], view.arrays["after"])
        answer = asked.batch.input_ids[asked.answer_mask].tolist()
        assert view.arrays["steered"].tolist() == answer
        assert view.arrays["alphas"].tolist() == [0.0]
        assert view.arrays["swept"].tolist() == [answer]


def by_hand(asked: Asked, vector: Tensor, alpha: float) -> list[int]:
    """A greedy answer by transformers alone, the vector added behind block 3 where the answer is said."""

    def add(module: object, args: object, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, -1] += alpha * vector
        return changed

    model = asked.model.hf_model
    handle = model.model.language_model.layers[3].register_forward_hook(add)
    try:
        inputs = {name: value for name, value in asked.prompt.inputs.items() if name != "position_ids"}
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=asked.generation.max_new_tokens)
    finally:
        handle.remove()
    new: list[int] = tokens[0, asked.prompt.input_ids.shape[1] :].tolist()
    return new


def test_the_same_as_a_hand_made_hook(llava: HookedMM, images: list[Image.Image], tmp_path: Path) -> None:
    """Random vectors of a folder, several alphas, a caption: token for token."""
    drawn = torch.randn(2, llava.cfg.d_model, generator=torch.Generator().manual_seed(3)) * 4
    save_vectors([SteeringVector(one, HOOK, "coarse", f"v{n}") for n, one in enumerate(drawn)], tmp_path)
    asked = ask(llava, "describe the image .", images[1], generation=Generation(10))
    tab = make_tab([tmp_path])
    view = look(tab, asked, vector="0.1", alpha=1.5, at="last_prompt+generated", sweep=True)
    assert view.arrays["steered"].tolist() == by_hand(asked, drawn[1], 1.5)
    assert len({tuple(row) for row in view.arrays["swept"].tolist()}) > 2
    for alpha, row in zip(view.arrays["alphas"].tolist(), view.arrays["swept"].tolist(), strict=True):
        assert [token for token in row if token != -1] == by_hand(asked, drawn[1], alpha)


def test_what_is_downloaded_finds_the_same(llava: HookedMM, coloured: tuple[Image.Image, str, str]) -> None:
    """Bit for bit: operations, positions, several turns, no picture, drawn answers; whatever was typed is only text."""
    image, question, _ = coloured
    tab, odd = make_tab([]), "red'''\n\"; raise SystemExit\\"
    first = ask(llava, "describe the image .", image)
    questions = [
        (ask(llava, question, image), {"target": "blue", "sweep": True, "alpha": 1.0}),
        (ask(llava, question, image, generation=Generation(8, 2.0, 0.9, 4)), {"vector": "read", "layer": 1}),
        (ask(llava, question, before=first.conversation), {"operation": "rotate", "alpha": 1.0, "at": "all"}),
        (ask(llava, question), {"operation": "project_out", "sweep": True, "at": "text"}),
        (ask(llava, "what colour is " + odd, image), {"source": "a blue", "target": "green star", "at": "generated"}),
    ]
    for asked, changed in questions:
        view = look(tab, asked, **changed)
        assert_same(made_again(view, asked), view.arrays)


class Interrupted(Work):
    """Work that is stopped at its n-th step, or at the n-th forward pass behind that step."""

    def __init__(self, steps: int, passes: int = -1) -> None:
        super().__init__()
        self.steps, self.passes = steps, passes

    def check(self) -> None:
        if not self.steps and self.passes >= 0:
            self.passes -= 1
        if not self.steps and self.passes < 0:
            self.stop()
        super().check()

    def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
        self.steps = max(0, self.steps - 1)
        super().step(told, done, total)


@pytest.mark.parametrize(("steps", "passes"), [(3, 0), (3, 2), (4, 0), (6, 0), (6, 2)])
def test_nothing_stays_behind_when_it_is_stopped(
    llava: HookedMM, coloured: tuple[Image.Image, str, str], steps: int, passes: int
) -> None:
    """Between two alphas or in the middle of a steered answer: the model is what it was, no hook is left in it."""
    image, question, colour = coloured
    asked, tab = ask(llava, question, image), make_tab([])
    values = first_values(tab, llava, target="blue", sweep=True, alpha=8)

    def hooks() -> list[tuple[int, int]]:
        return [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in llava.hf_model.modules()]

    before, logits = hooks(), llava.run_with_hooks(asked.prompt)
    work = Interrupted(steps, passes)
    # As the page does, whose stop button ends a pass too.
    with pytest.raises(Stopped), work.watching(llava.hf_model):
        tab.look(asked, values, work)
    assert hooks() == before
    after = llava.run_with_hooks(asked.prompt)
    assert logits is not None
    assert after is not None
    assert torch.equal(logits, after)
    assert llava.generate(asked.prompt, 6).text == [colour]


def test_vectors_of_folders(
    llava: HookedMM,
    small: Callable[[str], HookedMM],
    images: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read once and not before the first look; without gates; of this model alone; concepts as vectors of norm 1."""
    owner = llava.hf_model.config._name_or_path
    drawn = torch.randn(3, llava.cfg.d_model, generator=torch.Generator().manual_seed(0))
    kinds = ("gate", "coarse", "coarse")
    made = [
        SteeringVector(one, HOOK, kind, f"v{n}", model=owner)
        for n, (one, kind) in enumerate(zip(drawn, kinds, strict=True))
    ]
    save_vectors(made, tmp_path / "vectors")
    learnt = ConceptDictionary(PCA(2).fit(drawn), HOOK, {"model": owner})
    learnt.save(tmp_path / "dictionaries" / "PCA-k2")
    read: list[Path] = []
    real = steering_tab.read_vectors
    monkeypatch.setattr(steering_tab, "read_vectors", lambda folder: read.append(folder) or real(folder))
    tab = make_tab([tmp_path / "vectors", tmp_path / "dictionaries"])
    assert [value for _, value in tab.controls(llava)[0].options] == ["odds", "read"]
    assert not read
    asked = ask(llava, "describe the image .", images[0])
    view = look(tab, asked)
    look(tab, asked)
    assert len(read) == 2
    assert [value for _, value in view.options["vector"]] == ["odds", "read", "0.1", "0.2", "1.0", "1.1"]
    concept = look(tab, asked, vector="1.1", alpha=10.0)
    torch.testing.assert_close(concept.arrays["vector"], learnt.concepts[1])
    assert_same(made_again(concept, asked), concept.arrays)
    moved = look(tab, asked, vector="0.2", layer=1, alpha=10.0)
    assert ("point", "blocks.1.hook_resid_post") in panel(moved, Facts).facts
    assert_same(made_again(moved, asked), moved.arrays)
    with pytest.raises(BadInputError, match="vector"):
        look(tab, asked, vector="0.0")
    other = ask(small("molmo"), "describe the image .", images[0], name="molmo")
    for chosen in ("0.1", "1.0"):
        with pytest.raises(BadInputError, match=r"llava.*molmo"):
            look(tab, other, vector=chosen)


def test_folders_that_hold_nothing(llava: HookedMM, images: list[Image.Image], tmp_path: Path) -> None:
    """They are refused at the start; one that breaks later spoils only itself, and is said."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInputError, match="neither steering vectors"):
            make_tab([folder])
    (tmp_path / "steering_vectors.json").write_text("{")
    view = look(make_tab([tmp_path]), ask(llava, "describe the image .", images[0]))
    assert panel(view, Note).kind == "warning"
    assert "steering_vectors" in panel(view, Note).text
    assert panel(view, Texts)


def test_what_leads_nowhere_is_said(llava: HookedMM, coloured: tuple[Image.Image, str, str]) -> None:
    """Two answers that are the same, an answer without a word, no amount for what has none."""
    image, question, colour = coloured
    asked, tab = ask(llava, question, image), make_tab([])
    with pytest.raises(BadInputError, match="both answers are the same"):
        look(tab, asked, target=colour)
    with pytest.raises(BadInputError, match="Alpha: 51"):
        look(tab, asked, alpha=51)
    mute = replace(asked, conversation=asked.conversation.answered(""))
    with pytest.raises(BadInputError, match="said nothing"):
        look(tab, mute)
    view = look(tab, asked, operation="project_out", sweep=True)
    assert "alpha is not used" in panel(view, Note).text


def test_by_default_another_likely_word_is_said(llava: HookedMM, coloured: tuple[Image.Image, str, str]) -> None:
    """Nothing typed: the likeliest other word of plain transformers, and it is said."""
    image, question, colour = coloured
    asked = ask(llava, question, image)
    with torch.no_grad():
        logits = llava.hf_model(**asked.prompt.inputs).logits[0, -1]
    words = [llava.tokenizer.decode([token]).strip() for token in logits.topk(2).indices.tolist()]
    assert words[0] == colour
    assert said(look(make_tab([]), asked)) == (colour, words[1])


@given(st.floats(-50, 50))
def test_alphas_of_a_sweep(alpha: float) -> None:
    """Itself, nothing, and the other way; in order, each once, none beyond what the control takes."""
    found = alphas_of(alpha)
    assert found == sorted(set(found))
    assert all(-50 <= one <= 50 for one in found)
    assert {0.0, round(alpha, 4) + 0.0, round(-alpha, 4) + 0.0} <= set(found)


def test_alphas_of_two() -> None:
    """As the table shows them."""
    assert alphas_of(2.0) == [-2.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
