"""What steering does to the whole model: how far the next token's distribution moves, how odd its text becomes.

- KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, with p before and q after steering; 0 where nothing moved.
- Perplexity of a text: exp of the mean over its tokens of -log p(token | what precedes it). Of steered text under the
  unsteered model it says how odd the text is to the model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from hooked_mm.errors import BadInputError


def log_probabilities(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """log softmax in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def next_token_kl(before: Float[Tensor, "*n v"], after: Float[Tensor, "*n v"]) -> Float[Tensor, "*n"]:
    """KL(before || after) of the distributions that logits stand for, in nats.

    Args:
        before: Logits without steering.
        after: Logits with it, of the same samples.

    Returns:
        A divergence per sample, 0 at least; infinite where a token that was possible no longer is.

    Raises:
        BadInputError: If the shapes differ.
    """
    if before.shape != after.shape or not before.ndim:
        raise BadInputError(
            f"logits before are {tuple(before.shape)}, after {tuple(after.shape)}; they must be of the same samples"
        )
    old, new = log_probabilities(before), log_probabilities(after)
    # Tokens of probability 0 (logits of minus infinity) add nothing, whatever becomes of them.
    terms = torch.where(old.isneginf(), 0, old.exp() * (old - new))
    # Rounding can go below the bound that the formula has.
    return terms.sum(-1).clamp_min(0)


def token_nll(logits: Float[Tensor, "*n v"], tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-log p(token) in nats.

    Args:
        logits: Those that *predict* the tokens: of the position before each.
        tokens: Their ids.

    Raises:
        BadInputError: If there is not one distribution per token.
    """
    if logits.shape[:-1] != tokens.shape or not logits.ndim:
        raise BadInputError(
            f"logits are {tuple(logits.shape)} for tokens {tuple(tokens.shape)}; give those of the positions that "
            "predict the tokens, one for each"
        )
    return -log_probabilities(logits).gather(-1, tokens[..., None]).squeeze(-1)


def perplexity(
    logits: Float[Tensor, "*n v"], tokens: Int[Tensor, "*n"], mask: Bool[Tensor, "*n"] | None = None
) -> Float[Tensor, ""]:
    """exp of the mean of `token_nll`, in float64.

    Args:
        logits: Those that predict the tokens.
        tokens: Their ids; any valid id where the mask is off.
        mask: Which tokens count (not padding); all unless given.

    Returns:
        One number for all tokens together; NaN if none counts.

    Raises:
        BadInputError: If the shapes differ.
    """
    return counted(token_nll(logits, tokens), mask).mean().exp()


def counted(values: Float[Tensor, "*n"], mask: Bool[Tensor, "*n"] | None) -> Float[Tensor, " m"]:
    """The values under a mask, in float64."""
    if mask is not None and mask.shape != values.shape:
        raise BadInputError(
            f"the mask is {tuple(mask.shape)} for values {tuple(values.shape)}; give a truth for each value"
        )
    return (values.flatten() if mask is None else values[mask.bool()]).double()


class MeanMetric(Metric):
    """A sum and a count in float64, added up over processes."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Float[Tensor, " m"]) -> None:
        """Add values."""
        self.total += values.sum().to(self.total)
        self.count += len(values)

    def compute(self) -> Float[Tensor, ""]:
        """The mean; NaN of nothing."""
        return self.total / self.count


class NextTokenKL(MeanMetric):
    """The mean of `next_token_kl` over samples, or over positions under a mask."""

    def update(
        self, before: Float[Tensor, "*n v"], after: Float[Tensor, "*n v"], mask: Bool[Tensor, "*n"] | None = None
    ) -> None:
        """Add logits without and with steering.

        Raises:
            BadInputError: If the shapes differ.
        """
        self.add(counted(next_token_kl(before, after), mask))


class Perplexity(MeanMetric):
    """`perplexity` of all tokens together: exp of the mean over tokens, not over samples."""

    def update(
        self, logits: Float[Tensor, "*n v"], tokens: Int[Tensor, "*n"], mask: Bool[Tensor, "*n"] | None = None
    ) -> None:
        """Add tokens and the logits that predict them.

        Raises:
            BadInputError: If the shapes differ.
        """
        self.add(counted(token_nll(logits, tokens), mask))

    def compute(self) -> Float[Tensor, ""]:
        """exp of the mean; NaN of nothing."""
        return super().compute().exp()
