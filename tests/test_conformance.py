"""The proof at load: every family passes, what fails is refused or withdrawn, and when the check happens."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_mm.architectures import FAMILIES
from hooked_mm.checks import Check
from hooked_mm.conformance import ConformanceReport
from hooked_mm.errors import ConformanceError, UnknownHookError
from hooked_mm.hooked import HookedMM
from hooked_mm.models import check_miniature
from hooked_mm.resolve import resolve
from hooked_mm.structure import Structure
from hooked_mm.testing.miniatures import miniature, miniature_inputs


def swapped_norms(structure: Structure) -> Structure:
    """The structure with the first and second norm of every text block exchanged."""
    blocks = [
        replace(block, parts=MappingProxyType({**block.parts, "ln1": block.parts["ln2"], "ln2": block.parts["ln1"]}))
        for block in structure.text.blocks
    ]
    return replace(structure, text=replace(structure.text, blocks=tuple(blocks)))


def sentences(report: ConformanceReport) -> set[str]:
    """Why something is not applicable."""
    return {check.detail for check in report.checks if check.verdict == "not applicable"}


@pytest.mark.oldest
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_conforms(family: str) -> None:
    """Nothing fails, hundreds of checks hold; what is not applicable follows from a kind, never from a name."""
    model, report = check_miniature(family)
    assert report.ok, str(report)
    assert sum(check.verdict == "holds" for check in report.checks) > 150
    for sentence in sentences(report):
        assert sentence
        assert not any(name.lower() in sentence.lower() for name in (family, type(model.hf_model).__name__))
    tested = {check.point for check in report.checks}
    for stream, layers in report.layers.items():
        points = [n for n, p in model.hook_points.items() if p.stream == stream and (p.layer in (*layers, None))]
        assert set(points) <= tested, f"not tested: {sorted(set(points) - tested)[:3]}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_family_conforms(family: str) -> None:
    """The full form looks at every block and every point."""
    model, report = check_miniature(family, full=True)
    assert report.ok, str(report)
    assert {check.point for check in report.checks} >= set(model.hook_names)
    stacks = model.structure.stacks
    assert report.layers == {stream: tuple(range(stack.n_layers)) for stream, stack in stacks.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "family",
    ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "mllama", "florence2"))],
)
def test_other_precisions_conform(family: str, dtype: torch.dtype) -> None:
    """Rounding of half precision is not taken for a lie."""
    model = HookedMM(miniature(family).to(dtype), strict=False)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in miniature_inputs(model.hf_model).items()}
    model.run_with_cache(inputs, "hook_embed")
    assert model.conformance is not None
    assert model.conformance.ok, str(model.conformance)


def test_a_lie_is_caught_in_half_precision_too() -> None:
    """Two norms exchanged in a bfloat16 model."""
    hf_model = miniature("llava").to(torch.bfloat16)
    model = HookedMM(hf_model, structure=swapped_norms(resolve(hf_model)), strict=False)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in miniature_inputs(hf_model).items()}
    model.run_with_cache(inputs, "hook_embed")
    assert model.conformance is not None
    assert not model.conformance.ok


def test_the_small_model_is_checked_at_load(llava: HookedMM) -> None:
    """On a picture made for it, in eight copies."""
    report = llava.conformance
    assert report is not None
    assert report.ok
    assert report.layers == {"vision": (0, 3), "text": (0, 5)}


def test_what_fails_is_refused_by_name() -> None:
    """Norms exchanged: the error names the points, says by how much, and what can be done; again at every run."""
    hf_model = miniature("llava")
    model = HookedMM(hf_model, structure=swapped_norms(resolve(hf_model)))
    inputs = miniature_inputs(hf_model)
    for run in (model.run_with_cache, model.run_with_hooks, model.generate):
        with pytest.raises(ConformanceError, match=r"(?s)blocks\.0\.ln1\..*strict=False.*check=False") as caught:
            run(inputs)
        assert not caught.value.report.ok


def test_what_fails_is_withdrawn_when_not_strict() -> None:
    """Absent from the list, in every block of the kind; asked for, the reason is given; the others work."""
    hf_model = miniature("llava")
    model = HookedMM(hf_model, structure=swapped_norms(resolve(hf_model)), strict=False)
    _, cache = model.run_with_cache(miniature_inputs(hf_model), "blocks.*.hook_resid_post")
    assert len(cache) == 4
    # Blocks 1 and 2 were not looked at; they are of the same kind.
    for layer in range(4):
        assert f"blocks.{layer}.ln1.hook_normalized" not in model.hook_names
        assert f"blocks.{layer}.hook_resid_post" in model.hook_names
    assert "vision.blocks.0.ln1.hook_normalized" in model.hook_names
    with pytest.raises(UnknownHookError, match=r"blocks\.2\.ln1\.hook_normalized.*not available, because"):
        model.run_with_cache(miniature_inputs(hf_model), "blocks.2.ln1.hook_normalized")


def test_when_the_check_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a processor on the first batch with an image, once; with check=False never."""
    seen: list[int] = []

    def note(*_: Any, **__: Any) -> ConformanceReport:
        seen.append(1)
        return ConformanceReport("checked", (), {}, ())

    monkeypatch.setattr("hooked_mm.hooked.check_conformance", note)
    hf_model = miniature("llava")
    inputs = miniature_inputs(hf_model)
    for run in ("run_with_cache", "run_with_hooks", "generate"):
        model = HookedMM(hf_model)
        seen.clear()
        model.run_with_hooks({"input_ids": torch.tensor([[1, 2, 3]])})
        assert not seen
        getattr(model, run)(inputs)
        getattr(model, run)(inputs)
        assert len(seen) == 1
    model = HookedMM(hf_model, check=False)
    model.run_with_cache(inputs)
    assert len(seen) == 1
    assert model.conformance is None


@pytest.mark.parametrize("promised", [False, True])
def test_a_point_that_is_never_reached_is_named(promised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that does not ask transformers for its function has no pattern, and none is listed; if one is
    promised all the same, the check says so. The rest is usable.
    """
    if promised:
        monkeypatch.setattr("hooked_mm.blocks.looked_into", lambda _: True)
    hf_model = miniature("llava")
    attention = hf_model.model.language_model.layers[0].self_attn

    class Own(type(attention)):  # type: ignore[misc]
        """Mean of the values before, without any pattern."""

        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            size = (*hidden_states.shape[:-1], -1, self.head_dim)
            self.q_proj(hidden_states), self.k_proj(hidden_states)
            value = self.v_proj(hidden_states).view(size).repeat_interleave(self.num_key_value_groups, dim=2)
            count = torch.arange(1, size[1] + 1).view(1, -1, 1, 1)
            return self.o_proj((value.cumsum(dim=1) / count).flatten(2)), None

    for layer in hf_model.model.language_model.layers:
        layer.self_attn.__class__ = Own
    model = HookedMM(hf_model, strict=False)
    _, cache = model.run_with_cache(miniature_inputs(hf_model))
    assert "blocks.3.attn.hook_z" in cache
    assert "blocks.1.attn.hook_pattern" not in model.hook_names
    assert model.conformance is not None
    why = model.conformance.failed_points().get("blocks.0.attn.hook_pattern", "")
    assert ("no value passes there" in why) == promised


def test_the_report_prints_as_a_table() -> None:
    """One row per property: how many points, the largest error, what fails or why it does not apply."""
    checks = (
        Check("a sum", "blocks.0.hook_resid_mid", "holds", 1e-7),
        Check("a sum", "blocks.3.hook_resid_mid", "fails", 0.5),
        Check("a norm", "ln_final.hook_out", "not applicable", None, "there is none"),
        Check("a sum", "vision.blocks.0.hook_resid_mid", "holds", 2e-7),
    )
    report = ConformanceReport("Model (kind)", checks, {"text": (0, 3)}, ("a kind",))
    assert report.table() == [
        ("text", "a sum", 2, "5.0e-01", "FAILS at blocks.3.hook_resid_mid"),
        ("text", "a norm", 1, "", "not applicable: there is none"),
        ("vision", "a sum", 1, "2.0e-07", "holds"),
    ]
    printed = str(report).splitlines()
    assert printed[0] == "Model (kind): 2 checks hold, 1 fail, 1 do not apply"
    assert "blocks looked at: text 0, 3" in printed
    assert "kind: a kind" in printed
    assert report.failed_points() == {
        "blocks.3.hook_resid_mid": "a sum does not hold (off by 5.0e-01 of the largest value)"
    }
