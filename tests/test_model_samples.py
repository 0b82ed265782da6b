"""Samples in batches for analyses that need the model: bad ones are listed, answers given or generated."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from analyses.model_samples import Samples, loaded, samples_of
from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.reader import ModelSource


@pytest.fixture(scope="module")
def data(images: list[Image.Image]) -> SampleDataModule:
    """Five samples, the second without its picture."""
    samples = [Sample(f"s{n}", images[n], "what place is this ?", "forest") for n in range(5)]
    samples[1] = Sample("s1", Path("lost.png"), "what place is this ?", "forest")
    return SampleDataModule(samples, batch_size=2)


@pytest.mark.parametrize("answer", ["given", "generated", "none"])
def test_batches_hold_the_good_samples_in_order(llava: HookedMM, data: SampleDataModule, answer: Any) -> None:
    """With their pictures; the bad one is listed with the reason."""
    samples = Samples(llava, data, answer, 3)
    found = [([sample.id for sample in part], batch) for part, batch in samples]
    assert [ids for ids, _ in found] == [["s0"], ["s2", "s3"], ["s4"]]
    for _, batch in found:
        assert bool(batch.mask(role="answer").any()) == (answer != "none")
    assert all(isinstance(sample.images, Image.Image) for part, _ in samples for sample in part)
    assert samples.notes()[0].startswith("2 samples were left out (s1: ")
    with pytest.raises(BadInputError, match="s1"):
        list(Samples(llava, data, answer, on_error="stop"))


def test_options_name_model_and_samples(
    llava: HookedMM, data: SampleDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a device that there is not is refused."""
    monkeypatch.setattr(ModelSource, "load", lambda source, device: (source.id, device))
    made = Namespace(model=ModelSource("x"), data=data, device="cpu", answer="given", max_new_tokens=2, on_error="stop")
    assert loaded(made) == ("x", torch.device("cpu"))
    assert samples_of(made, llava) == Samples(llava, data, "given", 2, "stop")
    with pytest.raises(BadInputError, match="device='abacus'"):
        loaded(Namespace(model=ModelSource("x"), device="abacus"))
