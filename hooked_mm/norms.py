"""What a norm does, found by running it: which formula, which gain; its divisor and its shares.

Notation: x (..., d), s (..., 1) the divisor, g and β (d,) gain and bias.

    RMSNorm    n(x) = x / s                 s = sqrt(mean(x²) + eps)
    LayerNorm  n(x) = (x - mean(x)) / s     s = sqrt(var(x) + eps)        (var over d, divided by d)
    output     g ⊙ n(x) + β

Norms are told apart by what they do, not by class: Gemma's gain is 1 + weight, and Cohere's LayerNorm names its eps as
RMSNorms do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mm.errors import UnsupportedModelError
from hooked_mm.weights import device_of, weight_of


@dataclass(frozen=True)
class NormFormula:
    """What a norm does before its gain.

    Attributes:
        centred: Whether it subtracts the mean (LayerNorm).
        eps: What is added under its root.
        gain_offset: What its weight lacks to be the gain: 1 for Gemma.
    """

    centred: bool
    eps: float
    gain_offset: float = field(default=0.0, compare=False)

    def output(self, module: Any, quotient: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """g ⊙ n(x) + β for a quotient n(x), with the module's present gain and bias, in the quotient's dtype."""
        weight, bias = (
            None if value is None else value.to(quotient.device)
            for value in (weight_of(module), weight_of(module, "bias"))
        )
        result = quotient if weight is None else quotient * (weight + self.gain_offset)
        return (result if bias is None else result + bias).to(quotient.dtype)


def at_least_float32(value: Tensor) -> Tensor:
    """Half precision becomes float32: sums of dozens of components need it."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def norm_scale(x: Float[Tensor, "... d"], formula: NormFormula) -> Float[Tensor, "... 1"]:
    """A norm's divisor s for a stream, in at least float32."""
    wide = centre(x, formula)
    return (wide.square().mean(dim=-1, keepdim=True) + formula.eps).sqrt()


def apply_norm(
    parts: Float[Tensor, "c ... d"], scale: Float[Tensor, "... 1"], formula: NormFormula
) -> Float[Tensor, "c ... d"]:
    """Each component's share of n(x), the gain left out, in at least float32; `scale` is that of the whole stream."""
    return centre(parts, formula) / scale


def centre(x: Float[Tensor, "... d"], formula: NormFormula) -> Float[Tensor, "... d"]:
    """x as the norm divides it, in at least float32."""
    wide = at_least_float32(x)
    return wide - wide.mean(dim=-1, keepdim=True) if formula.centred else wide


def find_norm_formula(module: Any) -> NormFormula | None:
    """The formula of any module's, None if it is no LayerNorm or RMSNorm in what it does."""
    weight = getattr(module, "weight", None)
    shape = weight.shape if weight is not None else getattr(module, "normalized_shape", None)
    if not shape:
        return None
    if device_of(module).type == "meta":
        # Weights that are nowhere: it can neither be run nor looked at.
        return NormFormula(True, module.eps) if isinstance(module, nn.LayerNorm) else None
    try:
        return norm_of(module, shape[-1])
    except (UnsupportedModelError, TypeError, RuntimeError, ValueError):
        # One that takes more than a stream (a gate besides) is none of the two, either.
        return None


def _run_norm(module: nn.Module, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The norm as it is on a float64 probe, which is narrowed as far as the module needs."""
    weight = next(module.parameters(), None)
    if weight is not None and weight.dtype != torch.float64:
        # PyTorch's own refuse other dtypes than their weights', transformers' RMSNorms compute in float32.
        x = x.to(weight.dtype if isinstance(module, nn.LayerNorm | nn.RMSNorm) else torch.float32)
    with torch.no_grad():
        return module(x.to(device_of(module))).to("cpu", torch.float64)


def norm_of(module: nn.Module, d: int) -> NormFormula:
    """The formula of a norm module, found by running it; only eps is read from its attributes.

    Args:
        module: A norm over the last dimension.
        d: Its width.

    Raises:
        UnsupportedModelError: If the module is neither a LayerNorm nor an RMSNorm in what it does, whatever its name.
    """
    return _measure(module, d)[0]


def norm_gain(module: nn.Module, d: int) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Gain g and bias β of a norm module, by what it does: `weight`, `1 + weight` or none at all.

    Args:
        module: As in `norm_of`.
        d: As in `norm_of`.

    Returns:
        Two (d,) float64 tensors on the CPU.
    """
    return _measure(module, d)[1:]


def _measure(module: nn.Module, d: int) -> tuple[NormFormula, Tensor, Tensor]:
    eps = next((e for n in ("variance_epsilon", "eps", "epsilon") if (e := getattr(module, n, None)) is not None), None)
    if eps is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has none of the attributes variance_epsilon, eps, epsilon, so its formula is not "
            "known; pass apply_ln=False and normalise by your own formula"
        )
    # ±1: no element is zero before or after centring, so that every gain can be read off.
    x = torch.ones(d, dtype=torch.float64)
    x[1::2] = -1
    up, down, shifted = _run_norm(module, torch.stack([x, -x, x + 3]))
    # A gain rounded to half precision limits what can be told apart.
    coarse = next((p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()), False)
    tolerance = (2e-2 if coarse else 1e-4) * float((up - down).abs().max().clamp_min(1e-6))
    formula = NormFormula(bool((shifted - up).abs().max() <= tolerance), float(eps))
    bias = (up + down) / 2
    gain = (up - down) / 2 / apply_norm(x[None], norm_scale(x, formula), formula)[0]
    # What was measured is as narrow as the probe; the weights are exact where they explain it.
    weight, offset = weight_of(module), weight_of(module, "bias")
    missing = 0.0
    if weight is not None:
        stored = weight.to("cpu", torch.float64)
        missing = next((m for m in (0.0, 1.0) if (stored + m - gain).abs().max() <= tolerance * 3), 0.0)
        gain = stored + missing
    bias = bias if offset is None else offset.to("cpu", torch.float64)
    formula = NormFormula(formula.centred, formula.eps, missing)
    # The judge: an ordinary vector, and one so small that eps matters.
    probe = torch.linspace(-2, 3, d, dtype=torch.float64).sin() + 0.5
    probes = torch.stack([probe, probe * max(float(eps), 1e-12) ** 0.5])
    expected = apply_norm(probes, norm_scale(probes, formula), formula) * gain + bias
    if (_run_norm(module, probes) - expected).abs().max() > tolerance * 3:
        raise UnsupportedModelError(
            f"{type(module).__name__} acts neither as LayerNorm nor as RMSNorm with eps={eps}, so the share of "
            "a component is not known; pass apply_ln=False and normalise by your own formula"
        )
    return formula, gain, bias
