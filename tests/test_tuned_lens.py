"""The tuned lens: the identity at first, planted drifts that it must find, gradients by finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

import analyses.tuned_lens as module
from analyses.layers import Layers
from analyses.tuned_lens import ShuffledRows, TunedLens, divergence, frozen, train
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from tests.layered import layered_store

WIDTH, WORDS = 6, 15


class Plain:
    """An unembedding without a norm, so that translators can be told from the logits."""

    def __init__(self) -> None:
        drawn = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(7))
        # Of orthonormal columns, so that no direction is harder to see than another.
        self.weight = 2 * torch.linalg.qr(drawn)[0]

    def to_logits(self, resid: Tensor, *, grad: bool = False) -> Tensor:
        with torch.set_grad_enabled(grad):
            return resid @ self.weight.T


@pytest.fixture
def drifted(tmp_path: Path) -> tuple[Layers, Tensor, Tensor]:
    """Layers whose last is an affine map of the first, and that map: h^2 = h^0 + A h^0 + b."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(600, WIDTH, generator=generator)
    weight = 0.4 * torch.randn(WIDTH, WIDTH, generator=generator)
    bias = torch.randn(WIDTH, generator=generator)
    last = first + first @ weight.T + bias
    store = layered_store(tmp_path / "store", {0: first, 1: last.clone(), 2: last}, [n // 6 for n in range(600)])
    return Layers.of_store(store), weight, bias


def test_untrained_it_is_the_logit_lens_to_the_bit(llava: HookedMM) -> None:
    """At every layer, the last one included."""
    lens = TunedLens([0, 3], 128)
    resid = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for layer in (0, 3, 6):
        assert torch.equal(lens.logits(llava, layer, resid), llava.to_logits(resid))


@pytest.mark.parametrize(("optimiser", "steps", "rate"), [("adamw", 100, 0.08), ("sgd", 100, 3.0)])
def test_a_planted_drift_is_found(drifted: Any, optimiser: Any, steps: int, rate: float) -> None:
    """A and b themselves; a layer without drift stays as it was."""
    layers, weight, bias = drifted
    lens, losses = train(layers, Plain(), steps=steps, size=300, optimiser=optimiser, rate=rate, decay=0.0)
    assert lens.layers == [0, 1]
    assert losses[-1] < 0.02 * losses[0]
    for found, planted in ((lens.weight[0], weight), (lens.bias[0], bias)):
        assert (found - planted).norm() < 0.15 * planted.norm()
    values = [layers.values(layer) for layer in (0, 2)]
    plain, target = (Plain().to_logits(value) for value in values)
    assert divergence(target, lens.logits(Plain(), 1, values[1])).mean() < 1e-3
    tuned = lens.logits(Plain(), 0, values[0])
    assert divergence(target, tuned).mean() < 0.02 * divergence(target, plain).mean()


def test_divergence_is_scipys() -> None:
    """In nats; a word that is never said adds nothing."""
    rng = np.random.default_rng(0)
    target, logits = torch.tensor(rng.standard_normal((2, 4, 9)))
    expected = [entropy(p, q) for p, q in zip(target.softmax(-1).numpy(), logits.softmax(-1).numpy(), strict=True)]
    torch.testing.assert_close(divergence(target, logits).double(), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    never = torch.full((4, 1), torch.finfo(torch.float32).min)
    silent = divergence(torch.cat([target.float(), never], 1), torch.cat([logits.float(), never], 1))
    torch.testing.assert_close(silent.double(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(divergence(target, target), torch.zeros(4))


def test_the_lens_has_the_gradient_of_finite_differences(llava: HookedMM) -> None:
    """With respect to the stream; the model's weights get none while they are frozen, and are as before afterwards."""
    generator = torch.Generator().manual_seed(2)
    resid = (3 * torch.randn(1, 128, generator=generator)).requires_grad_()
    step = torch.randn(1, 128, generator=generator)
    before = [weight.requires_grad for weight in llava.hf_model.parameters()]
    with frozen(llava):
        loss = llava.to_logits(resid, grad=True)[0, 5].square()
        loss.backward()
        weights = list(llava.hf_model.parameters())
        assert not any(weight.requires_grad or weight.grad is not None for weight in weights)
    assert [weight.requires_grad for weight in llava.hf_model.parameters()] == before
    ends = [llava.to_logits(resid.detach() + sign * 1e-2 * step)[0, 5].square() for sign in (1, -1)]
    assert resid.grad is not None
    assert float((resid.grad * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=1e-2)
    assert not llava.to_logits(resid).requires_grad


def test_the_model_may_be_loaded_where_it_is_needed_and_is_left_as_it_was(drifted: Any) -> None:
    """By a function of the device; weights that required a gradient do so again, even when a step fails."""
    layers, _, _ = drifted
    asked: list[torch.device] = []

    def load(device: torch.device) -> Plain:
        asked.append(device)
        return Plain()

    loaded, given = train(layers, load, steps=3)[0], train(layers, Plain(), steps=3)[0]
    assert asked == [torch.device("cpu")]
    assert torch.equal(loaded.weight, given.weight)

    class Fails(Plain):
        hf_model = torch.nn.Linear(2, 2)

        def to_logits(self, resid: Tensor, *, grad: bool = False) -> Tensor:
            assert not self.hf_model.weight.requires_grad
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        train(layers, Fails(), steps=3)
    assert Fails.hf_model.weight.requires_grad


def test_the_same_seed_gives_the_same_lens(drifted: Any) -> None:
    """And another order of rows another one."""
    layers, _, _ = drifted
    first, again, other = (train(layers, Plain(), steps=4, size=64, seed=seed)[0].weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_row_is_read_once_in_an_epoch_whoever_reads_it(drifted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes together see what one sees; rows that were held out are never read."""
    layers, _, _ = drifted
    rows = np.arange(0, 600, 2)

    class Share:
        rank, size = 0, 1

    def epoch(rank: int, size: int) -> list[Tensor]:
        Share.rank, Share.size = rank, size
        batches = iter(ShuffledRows(layers, rows, 60, seed=5))
        return [next(batches)[0] for _ in range(5)]

    monkeypatch.setattr(module, "Processes", Share)
    alone, shares = epoch(0, 1), [epoch(rank, 3) for rank in range(3)]
    wanted = layers.values(0, rows)
    assert torch.equal(torch.cat(alone).sort(0).values, wanted.sort(0).values)
    for place, batch in enumerate(alone):
        together = torch.cat([share[place] for share in shares])
        assert torch.equal(together.sort(0).values, batch.sort(0).values)
    assert not torch.equal(alone[0], wanted[:60])


def test_it_is_saved_without_pickles_and_read_again(tmp_path: Path) -> None:
    """Bit for bit; what does not fit is refused."""
    lens = TunedLens([0, 2], 3)
    torch.nn.init.normal_(lens.weight)
    lens.save(tmp_path, {"model": "m"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned_lens.json", "tuned_lens.safetensors"]
    again = TunedLens.load(tmp_path)
    assert again.layers == [0, 2]
    assert torch.equal(again.weight, lens.weight)
    assert not again.weight.requires_grad
    with pytest.raises(BadInputError, match="layer 1 of width 3"):
        again.translate(1, torch.ones(3))
    with pytest.raises(BadInputError, match="layer 0 of width 4"):
        again.translate(0, torch.ones(4))
    text = (tmp_path / "tuned_lens.json").read_text()
    (tmp_path / "tuned_lens.json").write_text(text.replace("2\n", "2,\n5\n", 1))
    with pytest.raises(BadInputError, match=r"for layers \[0, 2, 5\]"):
        TunedLens.load(tmp_path)


def test_nothing_to_train_on_is_refused(drifted: Any) -> None:
    """No row; one layer only; no step."""
    layers, _, _ = drifted
    with pytest.raises(BadInputError, match="no rows to train on"):
        train(layers, Plain(), np.arange(0))
    with pytest.raises(BadInputError, match="at least two layers"):
        train(Layers.of_store(layers.store, layers=[2]), Plain())
    with pytest.raises(BadInputError, match="steps=0"):
        train(layers, Plain(), steps=0)
