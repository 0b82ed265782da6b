"""The prefix probe on rows whose memory is planted, and its parts against loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from analyses.prefix_probe import PrefixProbe, Setting, partners, say, train
from analyses.prefixes import PAD, Prefixes
from hooked_mm.errors import BadInputError
from hooked_mm.extraction_job import quiet_trainer

SMALL = Setting(width=32, depth=1, hidden=32, epochs=5, batch_size=64, learning_rate=1e-2)
WORDS = 8


def sentences(n: int = 600, length: int = 4, seed: int = 0) -> dict[str, Any]:
    """Random words. Layer 0 holds the row's own word only, layer 1 the word before it and itself, layer 2 noise."""
    rng = np.random.default_rng(seed)
    said = rng.integers(WORDS, size=(n, length))
    own = np.eye(WORDS)[said]
    before = np.concatenate([np.zeros((n, 1, WORDS)), own[:, :-1]], axis=1)
    layers = [
        np.concatenate(two, axis=2) for two in ((own, 0 * own), (own, before), rng.standard_normal((2, *own.shape)))
    ]
    samples = np.repeat(np.arange(n), length)
    positions = np.tile(np.arange(length), n)
    part = np.array(["train"] * int(n * 0.7) + ["validation"] * int(n * 0.1) + ["test"] * n)[:n]
    prefixes = Prefixes.of([f"w{one}" for one in said.ravel()], samples, positions, part == "train", 2)
    rows = {name: np.flatnonzero((part[samples] == name) & (positions > 0)) for name in ("train", "validation", "test")}
    values = torch.tensor(np.stack(layers, axis=2).reshape(n * length, 3, 2 * WORDS)).float()
    return {"values": values, "samples": samples, "prefixes": prefixes, "parts": rows}


@pytest.fixture(scope="module")
def trained() -> tuple[PrefixProbe, dict[str, Any]]:
    """A probe of planted rows."""
    data = sentences()
    trainer = quiet_trainer(accelerator="cpu", devices=1, max_epochs=SMALL.epochs)
    return train(lambda rows: data["values"][rows], data["prefixes"], data["parts"], trainer, SMALL), data


def test_what_is_planted_is_remembered(trained: tuple[PrefixProbe, dict[str, Any]]) -> None:
    """One token of the prefix is in layer 1 (log 8 nats), none in the others; the mixture has it too."""
    probe, data = trained
    found = say(probe, data["parts"]["test"], data["samples"])
    blind = found.nothing.sum() / found.tokens.sum()
    assert blind == pytest.approx(math.log(WORDS), abs=0.12)
    information = found.nothing[:, None] - found.own
    assert information[:, 0].mean() < 0.15
    assert information[:, 1].mean() > 0.6 * math.log(WORDS)
    assert information[:, 2].mean() < 0.15
    assert information[:, 3].mean() > 0.5 * math.log(WORDS)


def test_another_tokens_representation_does_not_help(trained: tuple[PrefixProbe, dict[str, Any]]) -> None:
    """Given another sample's row the probe says that row's prefix, and is further off than knowing nothing."""
    probe, data = trained
    found = say(probe, data["parts"]["test"], data["samples"])
    assert found.other[:, 1].mean() > found.nothing.mean() + 0.5
    assert found.own[:, 1].mean() < found.nothing.mean() - 0.5
    assert (found.tokens == np.minimum(2, data["parts"]["test"] % 4)).all()


def test_losses_are_those_of_one_row_after_the_other(trained: tuple[PrefixProbe, dict[str, Any]]) -> None:
    """No token is seen before it is said, nor anything behind a prefix's end: against a loop without batches."""
    probe, data = trained
    rows = data["parts"]["test"][:7]
    found = say(probe, rows, data["samples"])
    for place, row in enumerate(rows):
        prefix = [token for token in data["prefixes"].batch(np.array([row]))[0].tolist() if token != PAD]
        with torch.no_grad():
            encoded = probe.encode(data["values"][[row]], torch.tensor([1]))
            total = 0.0
            for end in range(1, len(prefix) + 1):
                said = probe.embed(torch.tensor(prefix[: end - 1], dtype=torch.long))
                steps = torch.cat([0 * encoded, said]) + encoded + probe.place[:end]
                scores = probe.unembed(probe.blocks(steps[None], mask=_later(end)))
                total -= float(F.log_softmax(scores[0, -1].double(), dim=0)[prefix[end - 1]])
        assert found.own[place, 1] == pytest.approx(total, rel=1e-4)


def _later(size: int) -> torch.Tensor:
    return torch.full((size, size), -torch.inf).triu(1)


def test_the_representation_is_used_as_the_paper_says(trained: tuple[PrefixProbe, dict[str, Any]]) -> None:
    """The mixture: normalised layers by softmax weights, through two matrices with a GELU between."""
    probe, data = trained
    rows = data["values"][:5]
    weights = probe.mixture.detach().exp() / probe.mixture.detach().exp().sum()
    normal = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    mixed = (weights[:, None] * normal).sum(1)
    hidden = mixed @ probe.first[3] + probe.bias[3]
    expected = (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))) @ probe.second.weight.T + probe.second.bias
    torch.testing.assert_close(probe.encode(rows, torch.full((5,), 3)), expected)
    torch.testing.assert_close(probe.encode(rows, torch.full((5,), 4)), probe.nothing.expand(5, -1))


def test_the_best_weights_are_kept_and_the_seed_holds() -> None:
    """The same seed gives the same probe, whatever was drawn before, and leaves the global state alone."""
    data = sentences(60)
    setting = Setting(width=8, depth=1, hidden=8, epochs=3, patience=1, batch_size=16)
    made = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        trainer = quiet_trainer(accelerator="cpu", devices=1, max_epochs=3, num_sanity_val_steps=0)
        made.append(train(lambda rows: data["values"][rows], data["prefixes"], data["parts"], trainer, setting))
        assert torch.equal(before, torch.get_rng_state())
    one, other = (probe.state_dict() for probe in made)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one[name], value) for name, value in made[0].best[1].items())


def test_partners_are_of_other_samples() -> None:
    """Never a row's own; there must be two samples."""
    samples = np.repeat(np.arange(5), [1, 20, 1, 1, 1])
    found = partners(samples)
    assert (samples[found] != samples).all()
    assert (found == partners(samples)).all()
    with pytest.raises(BadInputError, match="all rows are of one sample"):
        partners(np.zeros(4, dtype=int))


def test_what_is_refused() -> None:
    """Rows without a prefix, sizes that can't be."""
    data = sentences(20)
    trainer = quiet_trainer(accelerator="cpu", devices=1, max_epochs=1)
    for wrong in (np.zeros(0, dtype=int), np.array([0, 1])):
        with pytest.raises(BadInputError, match="validation needs rows, all with a token before them"):
            train(
                lambda rows: data["values"][rows],
                data["prefixes"],
                {**data["parts"], "validation": wrong},
                trainer,
                SMALL,
            )
    with pytest.raises(BadInputError, match="must be 1 at least"):
        Setting(epochs=0)
    with pytest.raises(BadInputError, match="multiple of 4"):
        Setting(width=30)
