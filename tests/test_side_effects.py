"""KL against torch.distributions and its closed form, perplexity against torchmetrics and uniform distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torchmetrics.functional.text import perplexity as torchmetrics_perplexity

from hooked_mm.errors import BadInputError
from steering.side_effects import NextTokenKL, Perplexity, next_token_kl, perplexity, token_nll

SEEDS = st.integers(0, 2**31 - 1)


@given(n=st.integers(1, 9), v=st.integers(1, 50), scale=st.sampled_from([0.1, 3.0, 100.0]), seed=SEEDS)
def test_kl_is_that_of_torch_distributions(n: int, v: int, scale: float, seed: int) -> None:
    """In float64; float32 close to it; bfloat16 logits as if they had come in float32."""
    before, after = scale * torch.randn(2, n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=before), Categorical(logits=after))
    torch.testing.assert_close(next_token_kl(before, after), expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(
        next_token_kl(before.float(), after.float()).double(), expected, atol=1e-5 * scale, rtol=1e-4
    )
    low = [logits.bfloat16() for logits in (before, after)]
    found = next_token_kl(*low)
    assert found.dtype == torch.float32
    assert torch.equal(found, next_token_kl(*(logits.float() for logits in low)))


def test_kl_by_hand() -> None:
    """A coin of 3/4 and a fair one; direction matters; equal is 0, and impossible tokens add nothing."""
    odd, fair = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert next_token_kl(odd, fair).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert next_token_kl(fair, odd).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
    assert next_token_kl(odd, odd).tolist() == [0]
    assert next_token_kl(odd, odd + 7).item() == pytest.approx(0, abs=1e-6)
    never = torch.tensor([[0.0, -math.inf]])
    assert next_token_kl(never, never).tolist() == [0]
    assert next_token_kl(never, fair).item() == pytest.approx(math.log(2))
    assert next_token_kl(fair, never).tolist() == [math.inf]


@given(n=st.integers(1, 5), length=st.integers(1, 7), v=st.integers(2, 30), seed=SEEDS)
def test_perplexity_is_that_of_torchmetrics(n: int, length: int, v: int, seed: int) -> None:
    """Of tokens under a mask; in batches of one the same, since tokens are counted and not samples."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, length, v, generator=random, dtype=torch.float64) * 3
    tokens = torch.randint(v, (n, length), generator=random)
    mask = torch.rand(n, length, generator=random) < 0.7
    mask[0, 0] = True
    expected = torchmetrics_perplexity(logits, tokens.where(mask, -1), ignore_index=-1).double()
    torch.testing.assert_close(perplexity(logits, tokens, mask), expected, atol=0, rtol=1e-9)
    metric = Perplexity()
    for row in range(n):
        metric.update(logits[row : row + 1], tokens[row : row + 1], mask[row : row + 1])
    torch.testing.assert_close(metric.compute(), expected, atol=0, rtol=1e-9)


def test_perplexity_by_hand() -> None:
    """As many as there are equally likely tokens; stays finite where softmax would underflow."""
    assert perplexity(torch.zeros(4, 17), torch.arange(4)).item() == pytest.approx(17)
    unlikely = torch.tensor([[0.0, -300.0]])
    assert token_nll(unlikely, torch.tensor([1])).item() == 300
    assert perplexity(unlikely, torch.tensor([1])).item() == pytest.approx(math.exp(300))


def test_mean_kl_in_batches_and_of_nothing() -> None:
    """The mean over samples, whatever their batches; NaN before the first."""
    before, after = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    metric = NextTokenKL()
    for part in (slice(0, 5), slice(5, 7)):
        metric.update(before[part], after[part])
    torch.testing.assert_close(metric.compute(), next_token_kl(before, after).double().mean())
    mask = torch.arange(7) < 3
    metric.reset()
    metric.update(before, after, mask)
    torch.testing.assert_close(metric.compute(), next_token_kl(before, after)[:3].double().mean())
    metric.reset()
    metric.update(before[:0], after[:0])
    assert metric.compute().isnan()
    assert perplexity(before, torch.zeros(7).long(), mask & ~mask).isnan()


def test_shapes_must_fit() -> None:
    """Logits of other samples, of other tokens, a mask of another shape."""
    with pytest.raises(BadInputError, match="same samples"):
        next_token_kl(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(BadInputError, match="predict"):
        token_nll(torch.zeros(2, 5, 3), torch.zeros(2, 4).long())
    with pytest.raises(BadInputError, match="mask"):
        perplexity(torch.zeros(2, 3), torch.zeros(2).long(), torch.ones(3).bool())
