"""What norms do, measured by running them: against PyTorch's and transformers' norms in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from hooked_mm.errors import UnsupportedModelError
from hooked_mm.norms import NormFormula, apply_norm, at_least_float32, norm_gain, norm_of, norm_scale

KINDS = {
    "layer": (lambda d, eps: nn.LayerNorm(d, eps=eps), True),
    "layer without gain": (lambda d, eps: nn.LayerNorm(d, eps=eps, elementwise_affine=False), True),
    "cohere": (lambda d, eps: CohereLayerNorm(d, eps=eps), True),
    "rms": (lambda d, eps: nn.RMSNorm(d, eps=eps), False),
    "llama": (lambda d, eps: LlamaRMSNorm(d, eps), False),
    "gemma": (lambda d, eps: GemmaRMSNorm(d, eps), False),
}


def made(kind: str, d: int, eps: float = 1e-6) -> nn.Module:
    """A norm with gain (and bias) that are not those of a fresh one."""
    module = KINDS[kind][0](d, eps)
    generator = torch.Generator().manual_seed(d)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(d, generator=generator) * 0.5
    return module


@given(st.sampled_from(sorted(KINDS)), st.integers(3, 40), st.sampled_from([1e-6, 1e-5, 1e-2]), st.floats(1e-3, 50))
def test_formula_gain_and_bias_give_the_module_itself(kind: str, d: int, eps: float, size: float) -> None:
    """gain * n(x) + bias is what the module returns, for small and large streams; the formula is the known one."""
    module = made(kind, d, eps)
    formula = norm_of(module, d)
    assert formula == NormFormula(KINDS[kind][1], eps)
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(1)) * size + size / 3
    gain, bias = norm_gain(module, d)
    ours = apply_norm(x[None].double(), norm_scale(x.double(), formula), formula)[0] * gain + bias
    with torch.no_grad():
        assert torch.allclose(module(x).double(), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_half_precision_norms_are_measured_too(kind: str) -> None:
    """bfloat16 weights: the same formula, gain and bias within the weights' own rounding."""
    module = made(kind, 24)
    gain, bias = norm_gain(module, 24)
    half = module.to(torch.bfloat16)
    assert norm_of(half, 24).centred == KINDS[kind][1]
    rounded_gain, rounded_bias = norm_gain(half, 24)
    assert torch.allclose(rounded_gain, gain, atol=1e-2, rtol=1e-2)
    assert torch.allclose(rounded_bias, bias, atol=1e-2, rtol=1e-2)


def test_the_gain_is_what_the_formula_says_not_the_weight() -> None:
    """Gemma multiplies by 1 + weight, Llama by weight, a LayerNorm without gain by one."""
    gemma, llama = made("gemma", 8), made("llama", 8)
    assert torch.allclose(norm_gain(gemma, 8)[0], 1 + gemma.weight.detach().double(), atol=1e-5)
    assert torch.allclose(norm_gain(llama, 8)[0], llama.weight.detach().double(), atol=1e-5)
    assert torch.allclose(norm_gain(made("layer without gain", 8), 8)[0], torch.ones(8).double(), atol=1e-5)


@given(st.integers(1, 5), st.booleans())
def test_shares_add_up_to_the_normalised_whole(count: int, centred: bool) -> None:
    """Closed form: the scale of the whole makes the norm linear; PyTorch's own norms judge."""
    parts = torch.randn(count, 2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    whole, formula = parts.sum(0), NormFormula(centred, 1e-5)
    shares = apply_norm(parts, norm_scale(whole, formula), formula)
    expected = nn.functional.layer_norm(whole, (16,)) if centred else nn.functional.rms_norm(whole, (16,), eps=1e-5)
    assert torch.allclose(shares.sum(0), expected, atol=1e-12)


class Odd(nn.Module):
    """Divides by the largest element: no formula of ours."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return x / (x.abs().amax(-1, keepdim=True) + self.eps)


def test_what_is_no_known_norm_is_refused() -> None:
    """Another formula, an eps that is not the one named, and no eps at all."""
    with pytest.raises(UnsupportedModelError, match="Odd acts neither as LayerNorm nor as RMSNorm with eps=1e-06"):
        norm_of(Odd(), 8)
    wrong = LlamaRMSNorm(8, 1e-5)
    wrong.eps = 1e-6
    del wrong.variance_epsilon
    wrong.forward = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    with pytest.raises(UnsupportedModelError, match="with eps=1e-06"):
        norm_of(wrong, 8)
    with pytest.raises(UnsupportedModelError, match="OlmoLayerNorm has none of the attributes variance_epsilon"):
        norm_of(OlmoLayerNorm(8), 8)


def test_half_precision_is_widened_and_only_it() -> None:
    """bfloat16 and float16 become float32; float32 and float64 stay, without a copy."""
    assert at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    double = torch.ones(2, dtype=torch.float64)
    assert at_least_float32(double) is double
