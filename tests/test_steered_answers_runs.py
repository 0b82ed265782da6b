"""Runs of steered answers: they go on where they were cut, and are read again only for the same question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.conditions import Above
from hooked_mm.data import Sample
from hooked_mm.errors import BadInputError, HookedMMError, StoreError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import LAST_PROMPT
from hooked_mm.reader import ModelSource
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.store_format import read_manifest
from steering.gate import Gate
from steering.setting import Setting
from steering.steered_answers import SteeredAnswers
from tests.answers_by_hand import (
    POINT,
    run,
    said,
    samples,
    some_settings,
    vector,
)


def test_a_run_keeps_the_order_of_samples_and_settings(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """Whatever batches were made of them; the data's own columns stay beside."""
    data = samples(images)
    settings = some_settings(llava, (0.5, 2.0))[:4]
    found = run(llava, data, settings, tmp_path / "a", options={"side_effects": True, "surprise": True})
    expected = said(llava, data, settings)
    assert [row["sample"] for row in found.samples] == [sample.id for sample in data]
    assert [row["prompt"] for row in found.samples] == [sample.text for sample in data]
    assert found.texts == [list(texts) for texts in zip(*(expected[sample.id] for sample in data), strict=True)]
    assert found.kl is not None
    assert found.nll is not None
    assert found.kl.shape == found.nll.shape == (5, 5)
    assert found.kl[0].tolist() == [0] * 5
    assert float(found.kl[1:].max()) > 0.01


def test_a_run_that_was_cut_off_goes_on(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path, monkeypatch: Any
) -> None:
    """What it has said is not asked again; then a complete one is read, and the model asked for nothing."""
    data, settings = samples(images), some_settings(llava, (0.5, 2.0))[:2]
    whole = run(llava, data, settings, tmp_path / "whole")
    asked: list[int] = []
    real = SteeredAnswers.represent

    def cut(self: SteeredAnswers, prepared: Any) -> Any:
        if len(asked) == cut_at:
            raise KeyboardInterrupt
        asked.extend(prepared.numbers)
        return real(self, prepared)

    monkeypatch.setattr(SteeredAnswers, "represent", cut)
    cut_at = 4
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(llava, data, settings, tmp_path / "cut")
    with pytest.raises(StoreError, match="resume=True"):
        run(llava, data, settings, tmp_path / "cut")
    cut_at = -1
    found = run(llava, data, settings, tmp_path / "cut", resume=True)
    assert sorted(asked) == list(range(5))
    assert found.texts == whole.texts
    again = run(llava, data, settings, tmp_path / "cut", resume=True)
    assert again.texts == whole.texts
    assert again.samples == whole.samples
    assert sorted(asked) == list(range(5))
    with pytest.raises(StoreError, match="complete"):
        run(llava, data, settings, tmp_path / "cut")


def reversed_vector(v: SteeringVector) -> SteeringVector:
    """Another vector of the same name, length and sum."""
    return SteeringVector(v.values.flip(0), v.hook, v.kind, v.name)


def a_gate(values: Tensor, threshold: float = 0.0, **options: Any) -> Gate:
    """A gate called "g"."""
    return Gate(Above(values, threshold, POINT, options.pop("over", "mean"), options.pop("at", LAST_PROMPT)), "g")


def test_a_complete_run_of_other_settings_is_refused(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """It names what differs: other numbers of the same name, gates, options, samples, models."""
    data = samples(images)[:2]
    v, eye = vector(llava, 3, 0), torch.eye(128)
    one = [Setting(v, 1.0, gate=a_gate(eye[0]))]
    run(llava, data, one, tmp_path / "a")
    run(llava, data, [Setting(v, 1.0, gate=a_gate(eye[0].clone()))], tmp_path / "a", resume=True)
    for other in (
        [Setting(reversed_vector(v), 1.0, gate=a_gate(eye[0]))],
        [Setting(v, 1.5, gate=a_gate(eye[0]))],
        [Setting(v, 1.0, "generated", gate=a_gate(eye[0]))],
        [Setting(v, 1.0, operation="set", gate=a_gate(eye[0]))],
        [Setting(v, 1.0)],
        [Setting(v, 1.0, gate=a_gate(eye[1]))],
        [Setting(v, 1.0, gate=a_gate(eye[0], 1.0))],
        [Setting(v, 1.0, gate=a_gate(eye[0], over="any"))],
        [Setting(v, 1.0, gate=a_gate(eye[0], at="all"))],
        [Setting(v, 1.0, gate=a_gate(eye[0]), also=(Setting(v),))],
        [*one, *one],
    ):
        with pytest.raises(StoreError, match="settings differ"):
            run(llava, data, other, tmp_path / "a", resume=True)
    with pytest.raises(StoreError, match="max_new_tokens differ"):
        run(llava, data, one, tmp_path / "a", resume=True, options={"max_new_tokens": 3})
    with pytest.raises(StoreError, match="answer_prefix, side_effects differ"):
        run(llava, data, one, tmp_path / "a", resume=True, options={"answer_prefix": "a", "side_effects": True})
    with pytest.raises(StoreError, match="data differ"):
        run(llava, data[:1], one, tmp_path / "a", resume=True)
    others = [Sample(f"other{number}", sample.images, sample.text) for number, sample in enumerate(data)]
    with pytest.raises(StoreError, match="samples differ"):
        run(llava, others, one, tmp_path / "a", resume=True)


def test_a_model_that_is_not_loaded_yet_is_known_by_its_name(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """Another one, its adapter, or another dtype is refused before it is loaded."""
    data, settings = samples(images)[:2], [Setting(vector(llava, 3, 0))]
    made = run(llava, data, settings, tmp_path / "a")
    assert run(ModelSource("small:llava"), data, settings, tmp_path / "a", resume=True).texts == made.texts
    for other, what in (
        (ModelSource("small:idefics2"), "model"),
        (ModelSource("small:llava", adapter="colour"), "adapter"),
        (ModelSource("small:llava", dtype="bfloat16"), "dtype"),
    ):
        with pytest.raises(StoreError, match=f"{what} differ"):
            run(other, data, settings, tmp_path / "a", resume=True)


def test_bad_samples_are_left_out_and_a_store_of_none_is_refused(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """With their reasons in the store; a store of something else holds no answers."""
    good, bad = samples(images)[0], Sample("bad", images[0], "   ")
    settings = [Setting(vector(llava, 3, 0))]
    found = run(llava, [bad, good], settings, tmp_path / "a")
    assert [row["sample"] for row in found.samples] == [good.id]
    assert run(llava, [bad, good], settings, tmp_path / "a", resume=True).texts == found.texts
    with pytest.raises(BadInputError, match="no steered answers"):
        run(llava, [bad], settings, tmp_path / "b")
    with pytest.raises(HookedMMError, match="bad"):
        run(llava, [bad, good], settings, tmp_path / "c", on_error="stop")
    manifest = read_manifest(tmp_path / "a")["made_by"]
    assert json.loads(json.dumps(manifest))["settings"][0]["vector"] == "v3-0"
