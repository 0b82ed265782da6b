"""Rows that repeat a context, against all distances, and on the small LLaVA, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyses.contexts import ROUNDING, fingerprints, first_of_context
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset


@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 60), distinct=st.integers(1, 20), noise=st.booleans())
def test_the_first_of_each_context(seed: int, n: int, distinct: int, noise: bool) -> None:
    """Planted copies, with rounding and without, are found within their word and nowhere else."""
    rng = np.random.default_rng(seed)
    places, words = rng.integers(distinct, size=n), rng.integers(3, size=n)
    rows = rng.standard_normal((distinct, 24))[places] * (1 + 1e-6 * noise * rng.standard_normal((n, 24)))
    seen: dict[tuple[int, int], int] = {}
    expected = [
        seen.setdefault((word, place), row) for row, (word, place) in enumerate(zip(words, places, strict=True))
    ]
    assert first_of_context(fingerprints(torch.tensor(rows)), words, 1e-4).tolist() == expected


def test_one_direction_in_two_lengths_is_two_contexts() -> None:
    """Norms count; rows of norm zero are one context."""
    rows = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    assert first_of_context(fingerprints(rows), np.zeros(5, dtype=int), 1e-4).tolist() == [0, 1, 2, 0, 2]


def test_many_copies_take_no_longer() -> None:
    """Two hundred thousand copies are told apart from one other row."""
    rows = torch.ones(200_000, 4)
    rows[777, 0] = 2
    found = first_of_context(fingerprints(rows), np.zeros(200_000, dtype=int), 1e-4)
    assert np.unique(found).tolist() == [0, 777]


@pytest.mark.usefixtures("loaded")
def test_template_and_pictures_of_the_small_llava(llava: HookedMM) -> None:
    """Two questions about one picture and one about another: what stands before the first difference is one context.

    The prompts differ in length, so that rows were computed beside padding, which leaves rounding errors.
    """
    pictures = [SceneDataset(2)[index].images for index in (0, 0, 1)]
    batch = llava.prepare(pictures, ["describe the scene .", "what place is this ?", "describe only the place ."])
    _, cache = llava.run_with_cache(batch, "blocks.5.hook_resid_post")
    rows, tokens, sample, image = [], [], [], []
    for index in range(3):
        own = batch.mask()[index].nonzero()[:, 0]
        rows.append(cache["blocks.5.hook_resid_post"][index, own])
        tokens += batch.input_ids[index, own].tolist()
        sample += [index] * len(own)
        image += (batch.mask(modality="image")[index, own]).tolist()
    ids, samples, shown = np.array(tokens), np.array(sample), np.array(image)
    words = ids.copy()
    for index in range(3):
        own = np.flatnonzero(shown & (samples == index))
        words[own] = 1000 + np.arange(len(own))  # A patch position is a word of its own.
    first = first_of_context(fingerprints(torch.cat(rows)), words, ROUNDING[torch.float32])
    repeats = first != np.arange(len(words))
    assert not repeats[samples == 0].any()
    begin = int(np.flatnonzero(shown & (samples == 0))[0])
    for index, same_picture in ((1, True), (2, False)):
        own = np.flatnonzero(samples == index)
        assert repeats[own[:begin]].all()
        assert repeats[own[shown[own]]].all() == same_picture
        assert repeats[own[shown[own]]].any() == same_picture
        assert not repeats[own[-1]]
