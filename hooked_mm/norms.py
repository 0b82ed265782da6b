"""What a norm computes, x -> (x - mean) / scale * gain + bias, found out by running it once.

TransformerLens's points of a norm are the divisor (`hook_scale`), the quotient before the gain (`hook_normalized`) and
the output (`hook_out`). Only the last is a module's value; the others follow from the norm's input and its formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class NormFormula:
    """Formula of one norm.

    LayerNorm: scale = sqrt(var(x) + eps), centred. RMSNorm (Zhang & Sennrich 2019): scale = sqrt(mean(x^2) + eps).

    Attributes:
        centred: Whether the mean is subtracted.
        eps: What is added under the root.
        gain_offset: 1 where the stored weight is the gain minus one (Gemma), else 0.
    """

    centred: bool
    eps: float
    gain_offset: float

    def centre(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """x without its mean, in float32, where the norm takes it away."""
        x = x.float()
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """The divisor, float32."""
        return (self.centre(x).square().mean(dim=-1, keepdim=True) + self.eps).sqrt()

    def normalized(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The quotient before the gain, in the dtype of x."""
        return (self.centre(x) / self.scale(x)).to(x.dtype)

    def gain(self, norm: nn.Module) -> Float[Tensor, " d"] | float:
        """What the quotient is multiplied by, 1 for a norm without a gain."""
        weight = getattr(norm, "weight", None)
        return 1.0 if weight is None else weight + self.gain_offset

    def output(self, norm: nn.Module, normalized: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What the norm gives for this quotient."""
        bias = getattr(norm, "bias", None)
        result = normalized * self.gain(norm)
        return (result if bias is None else result + bias).to(normalized.dtype)


def find_norm_formula(norm: Any) -> NormFormula | None:
    """The formula that explains a norm module, judged by running it; None if none does.

    Args:
        norm: A module from (..., d) to (..., d): LayerNorm or any RMSNorm of transformers.
    """
    eps = next((value for name in ("eps", "variance_epsilon") if (value := getattr(norm, name, None))), None)
    weight = getattr(norm, "weight", None)
    if eps is None or (weight is None and not getattr(norm, "normalized_shape", None)):
        return None
    width = weight.shape[-1] if weight is not None else norm.normalized_shape[-1]
    if weight is not None and weight.is_meta:
        # Weights that are placed only when the norm runs can't be looked at; LayerNorm is known by its class.
        return NormFormula(True, eps, 0.0) if isinstance(norm, nn.LayerNorm) else None
    like = {"dtype": weight.dtype, "device": weight.device} if weight is not None else {}
    ramp = torch.linspace(-1.0, 2.0, width, **{**like, "dtype": torch.float32})
    probe = torch.stack([ramp, ramp.square() - 0.3]).to(**like)
    with torch.no_grad():
        truth = norm(probe).float()
        for centred in (False, True):
            for offset in (0.0, 1.0):
                formula = NormFormula(centred, eps, offset)
                guess = formula.output(norm, formula.normalized(probe)).float()
                # Rounding of the weights' dtype; another formula is off by the size of the values themselves.
                if torch.allclose(guess, truth, atol=1e-5, rtol=4 * torch.finfo(probe.dtype).eps ** 0.75):
                    return formula
    return None
