"""Every image-text-to-text architecture of transformers: built, resolved, proved; and never wrong with less help.

Most of it runs with the slow tests, since the whole takes minutes. What the survey says is what `docs/models.md` says.
"""

from __future__ import annotations

import functools
import random
import re
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mm.architectures import EXCEPTIONS, FAMILIES, PART_NAMES
from hooked_mm.errors import ConformanceError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.survey import ARCHITECTURES, survey_one
from hooked_mm.testing.miniatures import RECIPES, miniature, miniature_inputs
from tests.all_places import BY_HAND
from tests.families import close, raw_values
from tests.pages import DOCS

# Those that no miniature can be had of: why.
NOT_BUILT = {
    "evolla": "proteins",
    "fast_vlm": "pip install timm",
    "gemma3n": "pip install timm",
    "mistral4": "a decoder of text",
    "perception_lm": "pip install timm",
}
# Those that resolve and lack points that others of their kind have, because these would not mean their names.
PARTLY: dict[str, str] = {}
# Those that are built and have nothing that a hook point could mean: why.
REFUSED = {"inkling2": "no residual stream", "pi0": "no logits over words"}
# Those whose generation is not one position after the other, or not of the whole prompt.
GENERATES_OTHERWISE = ("blip", "diffusion_gemma")
BUILT = [family for family in ARCHITECTURES if family not in NOT_BUILT]
# The kinds that are told apart, one of each, run with every change; the others with the slow tests.
QUICK = ("aya_vision", "exaone4_5", "lfm2_vl", "idefics", "nemotron_h_omni", "glm5_next", "pix2struct", "molmo")


def slowly(families: list[str]) -> list[Any]:
    """Parameters: all but a few with the slow tests. The core families have tests of their own."""
    return [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in families]


@functools.cache
def page() -> dict[str, tuple[str, str]]:
    """Architecture -> (status, remark) as `docs/models.md` says."""
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \|.*\| ([^|]*) \|$", (DOCS / "models.md").read_text(), re.MULTILINE)
    return {family: (status, note) for family, status, note in rows}


@pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the page is of transformers 5.23.0")
def test_how_far_how_many_go() -> None:
    """Of 97, and Molmo, at least 88 are built and resolve, at least 80 conform; the page has a row for each."""
    assert len(ARCHITECTURES) == 98
    assert len(BUILT) - len(REFUSED) >= 88
    assert len(BUILT) - len(REFUSED) - len(PARTLY) >= 80
    assert set(page()) == set(ARCHITECTURES) == set(RECIPES)
    statuses = {**dict.fromkeys(BUILT, "conforms"), **dict.fromkeys(NOT_BUILT, "not built")}
    statuses |= {**dict.fromkeys(PARTLY, "partly"), **dict.fromkeys(REFUSED, "refused")}
    assert {family: status for family, (status, _) in page().items()} == statuses


@pytest.mark.parametrize("family", NOT_BUILT)
def test_what_can_not_be_built_says_why(family: str) -> None:
    """In the table, with what to install."""
    row = survey_one(family)
    assert row.status == "not built"
    assert NOT_BUILT[family] in row.note


@pytest.mark.parametrize("family", slowly([family for family in BUILT if family not in FAMILIES]))
def test_every_architecture_conforms(family: str) -> None:
    """All that applies to its kind, or a reason in the table."""
    row = survey_one(family)
    expected = "refused" if family in REFUSED else "partly" if family in PARTLY else "conforms"
    assert row.status == expected, row.note
    assert {**PARTLY, **REFUSED}.get(family, "") in row.note
    assert row.status == "refused" or row.holds > 100


@pytest.mark.parametrize("family", slowly([f for f in BUILT if f not in FAMILIES and f not in REFUSED]))
def test_every_architecture_generates_as_transformers_does(family: str) -> None:
    """Greedy tokens are those of the bare model, with a hook that changes nothing at a point of every block."""
    hf_model = miniature(family)
    inputs = miniature_inputs(hf_model, family=family)
    model = HookedMM(hf_model, check=False)
    if family in GENERATES_OTHERWISE:
        with pytest.raises(
            UnsupportedModelError, match=rf"{family} models can't generate with hooks: .+run_with_hooks"
        ):
            model.generate(inputs, 3)
        return
    options = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    with torch.no_grad():
        expected = hf_model.generate(**inputs, **options)
    with model.hooks([("blocks.*.hook_resid_post", lambda value, hook: value.clone())]):
        got = model.generate(inputs, 3, min_new_tokens=3)
    assert torch.equal(got.tokens, expected[:, -3:])


def strictly(hf_model: Any, inputs: dict[str, torch.Tensor]) -> HookedMM | None:
    """The model if every check of it holds; None if it is refused, which it is with a reason."""
    try:
        model = HookedMM(hf_model)
        model.run_with_cache(inputs, ())
    except (UnsupportedModelError, ConformanceError) as error:
        if len(str(error)) < 40:
            raise
        return None
    return model


def right_or_refused(family: str) -> str:
    """Load a miniature strictly: refused, or every point of the hand-made table that is listed holds its raw value."""
    hf_model = miniature(family)
    inputs = miniature_inputs(hf_model, family=family)
    model = strictly(hf_model, inputs)
    if model is None:
        return "refused"
    table = {name: place for name, place in BY_HAND[family]().items() if name in model.hook_names}
    expected = raw_values(hf_model, inputs, table)
    _, cache = model.run_with_cache(inputs, list(table))
    for name, value in expected.items():
        # A stack that is found in part begins at its true beginning; its layers are those of the table.
        assert close(cache[name].reshape(value.shape), value) < 1e-5, name
    return "right"


@pytest.mark.slow
def test_without_its_row_an_architecture_is_refused_or_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows deleted at once, which is every five of them: what is odd is refused, or found all the same."""
    monkeypatch.setattr("hooked_mm.skeleton.EXCEPTIONS", {})
    found = {family: right_or_refused(family) for family in EXCEPTIONS}
    assert "refused" in found.values()


@pytest.mark.slow
@settings(max_examples=25)
@given(family=st.sampled_from(sorted(set(BY_HAND) & set(BUILT))), seed=st.integers(0, 10**6))
def test_without_five_names_an_architecture_is_refused_or_right(family: str, seed: int) -> None:
    """Five names that its blocks go by, deleted from the table of names: refused, or found by what flows through."""
    draw = random.Random(seed)
    stacks = HookedMM(miniature(family), check=False).structure.stacks.values()
    used = sorted({(role, path) for s in stacks for b in s.blocks for role, path in b.parts.items() if path})
    dropped = set(draw.sample(used, min(5, len(used))))
    fewer = {role: tuple(n for n in names if (role, n) not in dropped) for role, names in PART_NAMES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hooked_mm.blocks.PART_NAMES", fewer)
        right_or_refused(family)
