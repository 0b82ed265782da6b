"""Side effects of steered answers, from separate passes of transformers in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hooked_mm.data import Sample
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import BatchMaker
from steering.setting import Setting
from steering.steered_answers import SteeredAnswers
from tests.answers_by_hand import (
    LAYERS,
    NEW,
    plain_hook,
    run,
    samples,
    vector,
)


def own_log_probabilities(model: HookedMM, sample: Sample, text: str) -> tuple[Tensor, int]:
    """log p in float64 of the tokens of an answer and its end, of one sample in one pass of transformers; the prompt's
    length."""
    inputs = dict(model.prepare([sample.images], [sample.text]).inputs)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = model.hf_model.generation_config.eos_token_id
    ids = [*ids, ends[0] if isinstance(ends, list) else ends][:NEW]
    new = torch.tensor([ids])
    count = inputs["input_ids"].shape[1]
    longer = {name: inputs[name] for name in inputs if inputs[name].shape[:2] != (1, count)}
    longer |= {
        "input_ids": torch.cat([inputs["input_ids"], new], dim=1),
        "attention_mask": torch.ones(1, count + len(ids), dtype=torch.long),
    }
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new)], dim=1)
    with torch.no_grad():
        logits = model.hf_model(**longer).logits[0, count - 1 : -1].double()
    return logits.log_softmax(-1)[torch.arange(len(ids)), new[0]], count


def check_side_effects(model: HookedMM, name: str, data: Sequence[Sample]) -> None:
    """kl and nll of every answer, from separate passes of transformers in float64."""
    settings = [Setting(vector(model, 3, 1), 0.5), Setting(vector(model, 1, 2), 1.0), Setting(vector(model, 3, 1), 0.0)]
    reader = SteeredAnswers(model, settings, max_new_tokens=NEW, side_effects=True, surprise=True, rows=11)
    rows = {
        row["sample"]: row for row in reader.represent(BatchMaker(list(data), model, "none")(range(len(data)))).samples
    }
    for sample in data:
        row = rows[sample.id]
        inputs = dict(model.prepare([sample.images], [sample.text]).inputs)
        before: Tensor | None = None
        for place, setting in enumerate((Setting(), *settings)):
            steer, alpha = setting.vector, setting.alpha

            def push(value: Tensor, steer: Any = steer, alpha: float = alpha) -> Tensor:
                return value if steer is None else torch.cat([value[:, :-1], value[:, -1:] + alpha * steer.values], 1)

            with torch.no_grad(), plain_hook(model, name, 0 if steer is None else steer.layer or 0, push):
                own = model.hf_model(**inputs).logits[0, -1].double().log_softmax(-1)
            before = own if before is None else before
            expected = float((before.exp() * (before - own)).sum())
            assert row["kl"][place] == pytest.approx(expected, rel=1e-3, abs=1e-5), (sample, place)
            text = row["text"] if not place else row["steered"][place - 1]
            spelt = own_log_probabilities(model, sample, text)[0]
            assert row["nll"][place] == pytest.approx(-float(spelt.mean()), rel=1e-3, abs=1e-4), (sample, text)
        assert row["kl"][0] == 0
        assert row["kl"][3] == pytest.approx(0, abs=1e-6)
    assert max(max(row["kl"]) for row in rows.values()) > 0.01


def test_side_effects_are_measured_where_they_are_asked_for(
    llava: HookedMM, images: list[Image.Image], tmp_path: Path
) -> None:
    """One, the other, both or none: with the same numbers, and the same answers."""
    data, settings = samples(images)[:2], [Setting(vector(llava, 3, 1), 2.0)]
    found = {
        (kl, nll): run(llava, data, settings, tmp_path / f"{kl}{nll}", options={"side_effects": kl, "surprise": nll})
        for kl in (False, True)
        for nll in (False, True)
    }
    both = found[True, True]
    assert both.kl is not None
    assert both.nll is not None
    for (kl, nll), one in found.items():
        assert one.texts == both.texts
        assert (one.kl is not None, one.nll is not None) == (kl, nll)
        assert one.kl is None or torch.allclose(one.kl, both.kl)
        assert one.nll is None or torch.allclose(one.nll, both.nll)


def test_side_effects_are_those_of_separate_passes(llava: HookedMM, images: list[Image.Image]) -> None:
    """How far the next token's distribution moves, and how odd the unsteered model finds what is said."""
    check_side_effects(llava, "llava", samples(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYERS))
def test_side_effects_on_every_small_model(name: str, images: list[Image.Image]) -> None:
    """Pictures whose inputs have other names are there in the second pass too."""
    check_side_effects(HookedMM.small(name, check=False), name, samples(images))
