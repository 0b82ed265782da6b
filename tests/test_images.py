"""Where image features are: lies about positions, order and size are told from the truth."""

from __future__ import annotations

from dataclasses import replace

import torch

from hooked_mm.access import FieldValue, ModuleValue
from hooked_mm.batch import Batch
from hooked_mm.checks import Check
from tests.lies import Distorted, lying, report_of

FEATURES = "image features stand at image positions"


def found(checks: tuple[Check, ...], what: str = FEATURES) -> Check:
    """The one check of a name."""
    (check,) = (check for check in checks if check.what == what)
    return check


def shifted(batch: Batch) -> Batch:
    """Image positions, one too late."""
    layout = replace(batch.layout, image_index=batch.layout.image_index.roll(1, 1))
    return replace(batch, modality=batch.modality.roll(1, 1), layout=layout)


def test_image_positions_off_by_one_are_named() -> None:
    """Another picture changes a position outside, and one inside holds no feature."""
    report = report_of(lying("llava"), shifted)
    assert set(report.failed_points()) == {"hook_embed", "projector.hook_out"}
    assert "positions outside change" in found(report.checks, "another picture changes image positions only").detail
    assert "stay" in found(report.checks, "another picture changes every image position").detail


def test_a_constant_factor_is_allowed_and_told() -> None:
    """Features that enter the text times one number (a family that scales embeddings) are where they should be."""
    model = lying("llava", distorted={"projector.hook_out": lambda access: Distorted(access, lambda value: value / 3)})
    check = found(report_of(model).checks)
    assert (check.verdict, check.detail) == ("holds", "times 3")


def test_another_order_of_tokens_is_not_allowed() -> None:
    """The same features at the same positions, the first token last."""

    def turned(value: torch.Tensor) -> torch.Tensor:
        return value.roll(1, dims=-2)

    model = lying("llava", distorted={"projector.hook_out": lambda access: Distorted(access, turned)})
    assert found(report_of(model).checks).verdict == "fails"


def test_qwens_windows_are_seen_in_the_projectors_own_output() -> None:
    """Its tower puts tokens back behind the projector: before that they do not fit, nor do its patches."""
    assert found(report_of(lying("qwen2_5_vl")).checks).verdict == "holds"

    for wrong in (ModuleValue("model.visual.merger", "output"), FieldValue("model.visual", "last_hidden_state")):
        model = lying("qwen2_5_vl", distorted={"projector.hook_out": lambda access, wrong=wrong: wrong})
        assert found(report_of(model).checks).verdict == "fails"


def test_learned_positions_on_top_of_features_are_allowed() -> None:
    """OPT adds positions to the features: another picture moves both by the same."""
    assert "learned positions" in found(report_of(lying("blip-2")).checks).detail
