"""Deletion and insertion: a linear toy in closed form, areas by hand, and a model in which one token decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from analyses.deletion_curves import Curves, at_tokens, auc, deletion_curves, growing_sets, orders_of
from analyses.targets import Targets, prompt_targets
from analyses.token_ablation import Fill, token_features
from analyses.token_sets import random_orders
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM


@pytest.fixture(scope="module")
def batch(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Two questions of different lengths."""
    return llava.prepare(images[:2], ["what place is this ?", "what colour is the star ?"])


@pytest.fixture(scope="module")
def weights() -> Tensor:
    """What each of 64 tokens is worth in the linear toy, per sample."""
    return torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0)) / 30


def linear(weights: Tensor) -> list[Any]:
    """Hooks by which the small LLaVA's logit of token 5 is a sum over image tokens of products with the weights."""
    seen: dict[str, Tensor] = {}

    def remember(value: Tensor, hook: Any) -> None:
        chosen = hook.batch.mask("image")
        sample = [int(length == 6) for length in hook.batch.mask(role="question").sum(1).tolist()]
        seen["logit"] = (value[chosen].reshape(len(value), 64, 128) * weights[sample]).sum((1, 2))

    def answer(value: Tensor, hook: Any) -> Tensor:
        changed = value.clone()
        changed[:, -1, 5] = seen["logit"]
        return changed

    return [("blocks.0.hook_resid_pre", remember), ("hook_logits", answer)]


def test_a_linear_model_has_its_closed_form(llava: HookedMM, batch: Batch, weights: Tensor) -> None:
    """Zeroed tokens lose what they are worth: curves, areas and normalised areas by hand, in float64."""
    targets = prompt_targets(batch, [5, 5])
    tokens, values = token_features(llava, batch)
    worth = (values * weights).sum(2).double().numpy()
    orders = torch.cat([orders_of(torch.from_numpy(worth)[None], tokens.real), random_orders(tokens.real, 2, seed=4)])
    with llava.hooks(linear(weights)) as model:
        made = deletion_curves(model, batch, targets, orders, tokens, steps=7, fill=Fill("zero"), kind="logit", size=5)
    counts = [int(np.floor(step * 64 / 7 + 0.5)) for step in range(8)]
    x = np.array(counts) / 64
    for sample in range(2):
        np.testing.assert_allclose(made.shares[:, sample], x)
        for number in range(3):
            gone = np.cumsum([0.0, *worth[sample][orders[number, sample].numpy()]])[counts]
            y = worth[sample].sum() - gone
            np.testing.assert_allclose(made.deletion[number, :, sample], y, atol=1e-4)
            np.testing.assert_allclose(made.insertion[number, :, sample], gone, atol=1e-4)
            area = sum((b - a) * (u + v) / 2 for a, b, u, v in zip(x, x[1:], y, y[1:], strict=False))
            np.testing.assert_allclose(made.auc("deletion")[number, sample], area, atol=1e-4)
            if y[0] > 0.01:
                np.testing.assert_allclose(
                    made.normalised("deletion")[number, sample], area / y[0], atol=1e-3 / abs(y[0])
                )
            else:
                assert made.normalised("deletion")[number, sample].isnan()
    # No order takes faster than that of what tokens are worth.
    assert (made.auc("deletion")[0] < made.auc("deletion")[1:]).all()
    assert (made.auc("insertion")[0] > made.auc("insertion")[1:]).all()


def test_where_one_token_decides_curves_are_steps(llava: HookedMM, batch: Batch) -> None:
    """Planted: only token 37 counts. First in the order, all is lost with the first step; last, with the last one."""
    seen: dict[str, Tensor] = {}
    _, values = token_features(llava, batch)

    def remember(value: Tensor, hook: Any) -> None:
        tokens = value[hook.batch.mask("image")].reshape(len(value), 64, 128)
        seen["there"] = (tokens[:, None, 37] - values[None, :, 37].to(tokens)).norm(dim=2).min(1).values < 1e-4

    def answer(value: Tensor, hook: Any) -> Tensor:
        changed = torch.zeros_like(value)
        changed[:, -1, 5] = torch.where(seen["there"], 50.0, -50.0)
        return changed

    targets = prompt_targets(batch, [5, 5])
    tokens, _ = token_features(llava, batch)
    first = torch.zeros(2, 64)
    first[:, 37] = 1
    orders = orders_of(torch.stack([first, -first]), tokens.real)
    with llava.hooks([("blocks.0.hook_resid_pre", remember), ("hook_logits", answer)]) as model:
        made = deletion_curves(model, batch, targets, orders, tokens, steps=16)
    step = torch.zeros(17, dtype=torch.float64)
    step[0] = 1
    late = torch.ones(17, dtype=torch.float64)
    late[-1] = 0
    for sample in range(2):
        torch.testing.assert_close(made.deletion[:, :, sample], torch.stack([step, late]), rtol=0, atol=1e-6)
        torch.testing.assert_close(made.insertion[:, :, sample], 1 - torch.stack([step, late]), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        made.normalised("deletion")[:, 0], torch.tensor([1 / 32, 31 / 32], dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_areas_are_sums_of_trapezia() -> None:
    """By hand, with steps of different width; a straight line is normalised to a half."""
    x = torch.tensor([[0.0], [0.2], [1.0]])
    y = torch.tensor([[[1.0], [0.5], [0.1]]])
    assert float(auc(x, y)) == pytest.approx(0.2 * 0.75 + 0.8 * 0.3)
    line = torch.tensor([[[0.9], [0.8], [0.4]]], dtype=torch.float64)
    made = Curves(x.double(), line, line.flip(1))
    assert float(made.normalised("deletion")) == pytest.approx((0.2 * 0.85 + 0.8 * 0.6 - 0.4) / 0.5)
    assert made.normalised("deletion", least=0.6).isnan().all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_sets_grow_from_none_to_all(one: int, other: int, steps: int, seed: int) -> None:
    """Each step takes what the one before took and more, in the order, of each sample's own tokens only."""
    real = torch.arange(max(one, other)) < torch.tensor([[one], [other]])
    orders = random_orders(real, 2, seed)
    gone, shares = growing_sets(orders, real.sum(1), steps)
    assert gone.shape == (steps + 1, 2, 2, max(one, other))
    assert not gone[0].any()
    assert torch.equal(gone[-1], real.expand(2, -1, -1))
    assert not (gone[:-1] & ~gone[1:]).any()
    assert shares[0].tolist() == [0, 0]
    assert shares[-1].tolist() == [1, 1]
    for sample, count in enumerate((one, other)):
        taken = [int(step * count / steps + 0.5) for step in range(steps + 1)]
        for number in range(2):
            for step, size in enumerate(taken):
                own = set(gone[step, number, sample].nonzero()[:, 0].tolist())
                assert own == set(orders[number, sample, :size].tolist())


def test_orders_fall_with_the_map_and_ties_are_no_merit() -> None:
    """Largest first; equal values in a random order that seeds and keys decide; padding last, even behind -inf."""
    real = torch.ones(3, 50, dtype=torch.bool)
    real[2, 3:] = False
    maps = torch.zeros(2, 3, 50)
    maps[0] = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    maps[0, 2, :3] = torch.tensor([-torch.inf, 1.0, 2.0])
    maps[:, 2, 3:] = torch.inf
    orders = orders_of(maps, real)
    assert torch.equal(orders[0, :2], maps[0, :2].argsort(dim=1, descending=True))
    assert orders[0, 2, :3].tolist() == [2, 1, 0]
    flat = orders[1, 0]
    assert flat.tolist() != list(range(50))
    assert sorted(flat.tolist()) == list(range(50))
    assert torch.equal(orders_of(maps, real)[1], orders[1])
    assert not torch.equal(orders_of(maps, real, seed=1)[1, 0], flat)
    maps[1, 1, 4] = torch.nan
    with pytest.raises(BadInputError, match="no attribution"):
        orders_of(maps, real)
    with pytest.raises(BadInputError, match=r"\(maps, 3, 50\)"):
        orders_of(maps[0], real)


def test_maps_over_positions_become_maps_over_tokens(llava: HookedMM, batch: Batch) -> None:
    """One map per target; of a sample its own positions."""
    tokens, _ = token_features(llava, batch)
    targets = Targets(torch.tensor([1, 0, 1]), torch.tensor([70, 70, 71]), torch.tensor([3, 4, 5]))
    maps = torch.arange(2 * 3 * batch.length).reshape(2, 3, batch.length).double()
    found = at_tokens(maps, tokens, targets)
    for number, sample in enumerate([1, 0, 1]):
        assert torch.equal(found[:, number], maps[:, number, batch.mask("image")[sample]])
    with pytest.raises(BadInputError, match="one value per position"):
        at_tokens(maps[:, :2], tokens, targets)
    with pytest.raises(BadInputError, match="steps=0"):
        growing_sets(random_orders(tokens.real, 1), tokens.counts, 0)
