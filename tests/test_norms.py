"""What norms do, measured by running them: against PyTorch's and transformers' norms in float64."""

from __future__ import annotations

from typing import Any

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
from hooked_mm.norms import (
    NormFormula,
    apply_norm,
    at_least_float32,
    find_norm_formula,
    norm_gain,
    norm_of,
    norm_scale,
)

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


class Plain(nn.Module):
    """A module with a `weight` that is not a norm."""

    def __init__(self, *shape: int, eps: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        if eps is not None:
            self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return x * self.weight


@given(st.sampled_from(sorted(KINDS)), st.integers(3, 24), st.sampled_from([torch.float32, torch.float64]))
def test_the_quotient_and_the_formula_give_the_output(kind: str, d: int, dtype: torch.dtype) -> None:
    """`output` of n(x), computed by hand, is what the module returns, in the quotient's dtype; Gemma's weight lacks 1;
    a gain changed afterwards is the one used.
    """
    module = made(kind, d).to(dtype)
    formula = find_norm_formula(module)
    assert formula is not None
    assert formula.gain_offset == (1.0 if kind == "gemma" else 0.0)
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    wide = x - x.mean(dim=-1, keepdim=True) if KINDS[kind][1] else x
    quotient = (wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()).to(dtype)
    for _ in range(2):
        got = formula.output(module, quotient)
        assert got.dtype == dtype
        assert torch.allclose(got, module(x.to(dtype)), atol=2e-5)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
    half = formula.output(module, quotient.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_formulas_that_differ_in_their_gain_alone_are_equal() -> None:
    """Gemma's and Llama's norms divide alike."""
    assert find_norm_formula(made("gemma", 8)) == find_norm_formula(made("llama", 8)) == NormFormula(False, 1e-6)
    assert find_norm_formula(made("layer", 8)) == NormFormula(True, 1e-6)


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.Embedding(5, 8),
        nn.Conv2d(3, 8, 2),
        nn.GroupNorm(2, 8),
        nn.BatchNorm1d(8),
        Plain(8),
        Plain(8, eps=1e-6),
        Odd(),
        OlmoLayerNorm(8),
        None,
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_norm_has_no_formula(module: Any) -> None:
    """Projections, embeddings, other norms, a gain alone, a norm without a named eps: None, and no error."""
    assert find_norm_formula(module) is None


def test_weights_that_are_nowhere() -> None:
    """On the meta device a LayerNorm is known by its class, any other norm is not known."""
    with torch.device("meta"):
        layer, rms, llama = nn.LayerNorm(8, eps=1e-3), nn.RMSNorm(8, eps=1e-3), LlamaRMSNorm(8)
    assert find_norm_formula(layer) == NormFormula(True, 1e-3)
    assert find_norm_formula(rms) is None
    assert find_norm_formula(llama) is None


def test_a_norm_that_is_almost_one_is_refused() -> None:
    """A LayerNorm whose output is squashed, or which mixes in a little of its input, has no formula."""
    for change in (lambda x, y: torch.tanh(y), lambda x, y: y + 0.01 * x, lambda x, y: y.clamp(-2, 2)):
        norm = made("layer", 16)
        plain = norm.forward
        norm.forward = lambda x, plain=plain, change=change: change(x, plain(x))  # type: ignore[method-assign]
        assert find_norm_formula(norm) is None
    assert find_norm_formula(made("layer", 16)) is not None
