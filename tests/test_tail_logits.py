"""Logits from the first target's row on are those of the whole pass."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from analyses.tail_logits import tail_logits, tail_options
from analyses.targets import answer_targets
from hooked_mm.hooked import HookedMM


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_all_logits(llava: HookedMM, images: list[Image.Image], side: str) -> None:
    """With answers of several lengths and under hooks; a model that knows no such option makes all of them."""
    batch = llava.prepare(
        images[:2], ["what place is this ?", "where is the star ?"], ["sea", "top left"], padding_side=side
    )
    targets = answer_targets(batch)
    hooks = [("blocks.2.hook_resid_post", lambda value, hook: value * 1.1)]
    whole = llava.run_with_hooks(batch, hooks)
    assert whole is not None
    logits, own = tail_logits(llava, batch, targets, hooks)
    assert logits.shape[1] == batch.length - int(targets.row.min()) < 12
    torch.testing.assert_close(own.scores(logits), targets.scores(whole), rtol=0, atol=1e-4)


def test_a_forward_without_the_option_is_left_alone(
    llava: HookedMM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an encoder-decoder, for instance."""
    batch = llava.prepare(images[:1], "what place is this ?", ["sea"])
    targets = answer_targets(batch)
    real = llava.hf_model.forward
    monkeypatch.setattr(llava.hf_model, "forward", lambda **inputs: real(**inputs))
    assert tail_options(llava, batch, targets) == {}
    logits, own = tail_logits(llava, batch, targets)
    assert logits.shape[1] == batch.length
    assert own.row.tolist() == targets.row.tolist()
