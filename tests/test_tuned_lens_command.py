"""The command for the tuned lens: it scores samples that it did not train on, beside the plain lens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from analyses.layers import Layers
from analyses.result import Result
from analyses.tuned_lens import TunedLens
from analyses.tuned_lens_command import compared, main
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from hooked_mm.store import ActivationStore


@pytest.fixture(scope="module")
def store(llava: HookedMM, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Two layers of the positions of twelve samples, the earlier one moved by a planted vector."""
    batch = llava.prepare(images[:12], "what place is this ?")
    names = ["blocks.2.hook_resid_post", "blocks.5.hook_resid_post"]
    _, cache = llava.run_with_cache(batch, names)
    places = batch.mask().nonzero().tolist()
    kinds = ["pad", "text", "image"]
    rows = [{"sample": f"s{n}", "position": p, "modality": kinds[batch.modality[n, p]]} for n, p in places]
    samples = [{"sample": f"s{n}", "sample_number": n} for n in range(12)]
    values = {name: cache[name][batch.mask()] for name in names}
    # The small model's own layers are so alike that a lens has little to learn.
    first = values[names[0]]
    values[names[0]] = first + first.std() * torch.randn(128, generator=torch.Generator().manual_seed(0))
    made_by = {"model": str(small_model_path("llava"))}
    return ActivationStore.from_arrays(tmp_path_factory.mktemp("store") / "rows", values, rows, samples, made_by)


def test_both_lenses_are_compared_with_the_models_words(llava: HookedMM, store: ActivationStore) -> None:
    """In bits, per sample, on the rows asked for; translators that are the identity change nothing."""
    layers = Layers.of_store(store).of("text")
    rows = np.flatnonzero(layers.samples < 2)
    sums, counts = compared(layers, llava, TunedLens([3], 128), rows, size=5)
    assert counts.tolist() == [len(rows) // 2] * 2 + [0] * 10
    said = llava.to_logits(layers.values(6, rows)).double().log_softmax(-1)
    seen = llava.to_logits(layers.values(3, rows)).double().log_softmax(-1)
    far = (said.exp() * (said - seen)).sum(-1) / math.log(2)
    same = (said.argmax(-1) == seen.argmax(-1)).double()
    for name in ("logit lens", "tuned lens"):
        found = sums["bits from the model's words", name][:2, 0]
        torch.testing.assert_close(found, far.reshape(2, -1).sum(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(sums["same most probable word as the model", name][:2, 0], same.reshape(2, -1).sum(1))


def test_the_command_trains_saves_and_scores(llava: HookedMM, store: ActivationStore, tmp_path: Path) -> None:
    """The tuned lens is nearer to the model's words than the plain one, on held-out samples; it can be read again."""
    out = tmp_path / "out"
    few = ["--store", str(store.path), "--modalities", "[image, text]", "--steps", "60", "--batch", "256"]
    main([*few, "--rate", "0.005", "--draws", "20", "--output", str(out)])
    result = Result.load(out)
    (plain,), (tuned,) = (
        result.of(f"bits from the model's words, {name}", "image") for name in ("logit lens", "tuned lens")
    )
    assert tuned.value < 0.8 * plain.value
    assert (tuned.rows, tuned.samples, tuned.layer) == (3 * 64, 3, 3)
    lens = TunedLens.load(out / "lens")
    assert lens.layers == [3]
    assert lens.weight.abs().max() > 0
    with pytest.raises(BadInputError, match="one part would be empty"):
        main([*few, "--held_out", "0.01", "--output", str(tmp_path / "none")])
