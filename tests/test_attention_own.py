"""Patterns of attention that computes its softmax itself: read, written, and everything as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hooked_mm.attention_own import by_interface, by_softmax, watched
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature, miniature_inputs

# Attention modules: of BERT's, MBart's and SAM's kind, and one that falls back on the eager attention of its file.
OWN = {
    "blip": "blocks.1.xattn.hook_pattern",
    "git": "blocks.1.attn.hook_pattern",
    "vision-encoder-decoder": "blocks.1.attn.hook_pattern",
    "pp_formulanet": "vision.blocks.1.attn.hook_pattern",
    "kosmos-2.5": "vision.blocks.1.attn.hook_pattern",
}


class Own(nn.Module):
    """Softmax of the input, times two."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.nn.functional.softmax(x, dim=-1)


class Spoiling(nn.Module):
    """A tap that writes zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


def test_what_a_softmax_gives_goes_through_the_tap() -> None:
    """Inside, and only there, and not when it is closed; also when a module fails."""
    module, x = Own(), torch.randn(2, 3)
    with watched([(module, Spoiling())]):
        assert not module(x).any()
        assert bool(x.softmax(dim=-1).any())
        with pytest.raises(AttributeError):
            module(None)
        assert bool(x.softmax(dim=-1).any())
    assert torch.equal(module(x), 2 * x.softmax(dim=-1))
    assert by_softmax(module)
    assert not by_interface(module)


@pytest.mark.parametrize("family", OWN)
def test_patterns_are_read_and_written(family: str) -> None:
    """Rows sum to one; logits stay, bit for bit; even attention changes them; afterwards they are as before."""
    model = HookedMM(miniature(family), check=False)
    inputs, name = miniature_inputs(model.hf_model, family=family), OWN[family]
    with torch.no_grad():
        bare = model.hf_model(**inputs).logits
    logits, cache = model.run_with_cache(inputs, name)
    assert logits is not None
    assert torch.equal(logits, bare)
    pattern = cache[name]
    assert pattern.ndim == 4
    torch.testing.assert_close(pattern.sum(dim=-1), torch.ones(pattern.shape[:-1]))
    changed = model.run_with_hooks(inputs, [(name, lambda value, hook: torch.full_like(value, 1 / value.shape[-1]))])
    assert changed is not None
    assert bool((changed - bare).abs().amax() > 1e-3)
    with torch.no_grad():
        assert torch.equal(model.hf_model(**inputs).logits, bare)
