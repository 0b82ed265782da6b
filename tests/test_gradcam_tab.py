"""The Grad-CAM tab: plain attention and gradients, empty maps that are said to be empty, thirteen methods, stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from analyses.attribution_methods import METHODS
from analyses.gradcam_tab import ALL, GRAD_CAM, LARGEST, SLOW, make_tab
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Heat, Note, Pictures, Table
from hooked_mm.explorer.tab import View
from hooked_mm.explorer.work import Stopped, Work
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from tests.chefer_by_hand import Attentions
from tests.explored import ask, assert_same, first_values, look, made_again, told
from tests.processors import processor
from tests.tiny import picture as any_picture
from tests.tiny import tiny

TAB = make_tab([])
QUESTION = "what colour is the star ?"


@pytest.fixture(scope="module")
def asked(llava: HookedMM, images: list[Image.Image]) -> Asked:
    return told(llava, QUESTION, "a red star", images[0])


@pytest.fixture(scope="module")
def by_hand(asked: Asked) -> torch.Tensor:
    """(tokens, layers, q, k): the mean over heads of relu(gradient of the token's logit * attention)."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        small_model_path("llava"), attn_implementation="eager", dtype=torch.float32
    )
    paths = [f"model.language_model.layers.{number}.self_attn" for number in range(6)]
    first = int(asked.answer_mask[0].nonzero()[0, 0])
    found = []
    with Attentions(model, paths) as attentions:
        logits = model(**asked.batch.inputs).logits[0]
        kept = [attentions.kept[path] for path in paths]
        for number in asked.tokens:
            score = logits[first + number - 1, asked.batch.input_ids[0, first + number]]
            gradients = torch.autograd.grad(score, kept, retain_graph=True)
            pairs = zip(kept, gradients, strict=True)
            found.append(
                torch.stack([(value * gradient)[0].detach().clamp_min(0).mean(0) for value, gradient in pairs])
            )
    return torch.stack(found)


def panels(view: View, kind: type) -> list[Any]:
    return [one for one in view.panels if isinstance(one, kind)]


def test_maps_are_those_of_the_row_that_predicts_the_token(asked: Asked, by_hand: torch.Tensor) -> None:
    first, image = int(asked.answer_mask[0].nonzero()[0, 0]), asked.batch.mask("image")[0]
    for layer in (ALL, 0, 4):
        view = look(TAB, asked, layer=layer)
        for number in asked.tokens:
            own = by_hand[number, :, first + number - 1]
            expected = (own.mean(0) if layer == ALL else own[layer])[image].reshape(8, 8)
            torch.testing.assert_close(view.arrays[f"token-{number}-picture-0"], expected, rtol=1e-3, atol=1e-6)
    (heat,) = panels(view, Heat)
    rows = torch.stack([by_hand[number, :, first + number - 1] for number in asked.tokens])
    share = rows[..., image].sum(-1) / rows.sum(-1)
    torch.testing.assert_close(heat.values.float(), share, rtol=1e-3, atol=1e-5)
    assert (heat.picks, list(heat.column_values)) == ((None, "layer"), list(range(6)))


def test_the_question_at_the_last_layer_is_said_to_be_empty_and_is_no_noise(
    asked: Asked, by_hand: torch.Tensor
) -> None:
    """No row but the target's has a gradient there; stretched to its own scale, nothing would look like a finding."""
    view = look(TAB, asked, rows="question", layer=5)
    assert not view.arrays["cam"].any()
    (shown,) = panels(view, Pictures)
    assert all("empty: 0 everywhere" in one.caption for one in shown.pictures)
    (heat,) = panels(view, Heat)
    assert heat.values[:, 5].isnan().all()
    assert not heat.values[:, :5].isnan().any()
    assert any(one.text.startswith("Layer 5: ") and "maps are empty" in one.text for one in panels(view, Note))
    question = asked.batch.mask(role="question")[0]
    other = look(TAB, asked, rows="question", layer=2).arrays["cam"]
    torch.testing.assert_close(other, by_hand[:, 2][:, question].mean(1), rtol=1e-3, atol=1e-6)


def test_grad_cam_comes_first_of_all_methods(llava: HookedMM) -> None:
    (method,) = [control for control in TAB.controls(llava) if control.name == "method"]
    names = [value for _, value in method.options]  # type: ignore[union-attr]
    assert names[0] == method.value == GRAD_CAM
    assert sorted(names) == sorted(METHODS)
    assert set(SLOW) < set(METHODS)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in (GRAD_CAM, "occlusion")])
def test_every_method_is_found_again_by_its_python(asked: Asked, method: str) -> None:
    few = asked.choose([1] if method in SLOW else [1, 2])
    view = look(TAB, few, method=method, kind="log_prob", scale="common")
    assert_same(made_again(view, few), view.arrays)
    (shown,), (table,) = panels(view, Pictures), panels(view, Table)
    assert METHODS[method][1] in shown.title
    assert [row[0] for row in table.rows] == ["2 red", "3 star"][: len(few.tokens)]
    # Each token is another case.
    if method not in SLOW:
        assert not torch.equal(view.arrays["token-1-picture-0"], view.arrays["token-2-picture-0"])


def test_occlusion_of_a_later_turn_is_found_again(llava: HookedMM, images: list[Image.Image]) -> None:
    first = ask(llava, QUESTION, images[0].resize((8, 8))).conversation
    asked = ask(llava, 'what "shape" is this ?', before=first)
    view = look(TAB, asked.choose(asked.tokens[:1]), method="occlusion")
    assert_same(made_again(view, asked), view.arrays)
    assert "Turn(text=" in view.python


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_the_python_finds_the_same_arrays(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """Two turns with a picture each."""
    first = ask(small(name), QUESTION, images[0], name=name).conversation
    asked = ask(small(name), "describe the image .", images[1], name=name, before=first)
    for changed in ({}, {"layer": 3, "rows": "question", "scale": "common"}):
        view = look(TAB, asked, **changed)
        assert_same(made_again(view, asked), view.arrays)


def test_pictures_that_are_read_by_cross_attention() -> None:
    """Layers without one are refused by name; a question in an encoder has no rows that predict."""
    for family in ("mllama", "florence2"):
        model = HookedMM(tiny(family), processor(family), check=False)
        asked = told(model, "what is this ?", "the red", any_picture(40, 30), name=family)
        view = look(TAB, asked)
        assert_same(made_again(view, asked), view.arrays)
        with pytest.raises(BadInputError, match=r"layer 0 has no attention to the picture|stands in the encoder"):
            look(TAB, asked, **({"layer": 0} if family == "mllama" else {"rows": "question"}))


def test_slow_methods_are_told_pass_by_pass_and_stop_between_passes(asked: Asked) -> None:
    """Tokens they explain at a time are few; a pass after the stop does not begin, and no hook is left behind."""

    class Watched(Work):
        def step(self, told: str, done: int | None = None, total: int | None = None) -> None:
            steps.append(told)
            if len(steps) == 2:
                self.stop()
            super().step(told, done, total)

    steps: list[str] = []
    hooks = len(asked.model.hf_model._forward_pre_hooks)
    values = first_values(TAB, asked.model, method="integrated gradients")
    with pytest.raises(Stopped):
        TAB.look(asked, values, Watched())
    assert steps == [f"integrated gradients of token 1 of 3, pass {number}" for number in (1, 2)]
    assert len(asked.model.hf_model._forward_pre_hooks) == hooks
    # The model is as it was.
    assert_same(look(TAB, asked).arrays, look(TAB, asked).arrays)


def test_occlusion_of_a_huge_picture_is_refused_before_it_begins(llava: HookedMM) -> None:
    asked = told(llava, QUESTION, "red", Image.new("RGB", (LARGEST + 1, 30)))
    with pytest.raises(BadInputError, match="window by window"):
        look(TAB, asked, method="occlusion")
    (shown,) = panels(look(TAB, asked), Pictures)
    assert max(shown.pictures[0].image.size) <= 600


def test_without_a_picture_there_is_nothing_to_show(llava: HookedMM) -> None:
    (note,) = look(TAB, ask(llava, "describe the image .")).panels
    assert isinstance(note, Note)
    assert "no picture" in note.text


def test_it_opens_no_folders() -> None:
    with pytest.raises(BadInputError, match="opens no folders"):
        make_tab([Path(__file__)])
