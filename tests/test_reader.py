"""`Reader`: whatever leaves something of a data set in a store runs, resumes and is refused as an extraction is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError, StoreError, UnsupportedModelError
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.loading import Prepared
from hooked_mm.pair_extraction import Once
from hooked_mm.reader import Extracted, ModelSource, Reader, sample_rows
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.unembedding import Unembedding


class Lengths(Reader):
    """Leaves the number of positions of every prompt."""

    def __init__(self, model: HookedMM | ModelSource, factor: int = 1) -> None:
        super().__init__(model)
        self.factor = factor

    def made_by(self) -> dict[str, Any]:
        return {**self.whose(), "factor": self.factor}

    def represent(self, prepared: Prepared) -> Extracted:
        if prepared.batch is None:
            return Extracted(skipped=prepared.skipped)
        lengths = prepared.batch.inputs["attention_mask"].sum(dim=1).tolist()
        return Extracted(samples=sample_rows(prepared, length=[self.factor * n for n in lengths]))


@pytest.mark.usefixtures("loaded")
def test_a_reader_of_ones_own_fills_a_store(llava: HookedMM, tmp_path: Path) -> None:
    """Neither rows nor activations are needed; samples stand in the data set's order, the model in the manifest."""
    data = SceneDataset(5)
    store = extract(Lengths(ModelSource("small:llava")), SampleDataModule(data, batch_size=2), tmp_path / "store")
    alone = [llava.prepare(data[i].images, data[i].text).length for i in range(5)]
    assert store.samples.column("length").to_pylist() == alone
    assert store.samples.column("sample").to_pylist() == data.ids()
    assert len(store) == 0
    assert store.made_by["family"] == "llava"


def test_a_cut_off_run_goes_on_only_with_the_same_settings(llava: HookedMM, tmp_path: Path) -> None:
    """What was done is kept; another setting is refused and named."""

    class Breaks(SceneDataset):
        def __getitem__(self, index: int) -> Sample:
            if index == 20:
                raise RuntimeError("cut off")
            return super().__getitem__(index)

    options: dict[str, Any] = {"seconds_per_shard": 0}
    # Sixteen samples are a window here: the first is done when the second can not be read.
    broken = SampleDataModule(Breaks(40), batch_size=1)
    with pytest.raises(RuntimeError, match="cut off"):
        extract(Lengths(llava), broken, tmp_path / "store", **options)
    whole = SampleDataModule(SceneDataset(40), batch_size=1)
    whole.describe = broken.describe  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="factor differ"):
        extract(Lengths(llava, factor=2), whole, tmp_path / "store", resume=True)
    assert extract(Lengths(llava), whole, tmp_path / "store", resume=True).samples.num_rows == 40


def test_columns_that_a_reader_writes_can_not_be_the_data_sets(llava: HookedMM, tmp_path: Path) -> None:
    """Neither the store's own names nor those of the reader."""
    for name in ("prompt", "length"):
        data = SampleDataModule([Sample("a", None, "what is this ?", columns={name: 1})])
        with pytest.raises(BadInputError, match=name):
            extract(Lengths(llava), data, tmp_path / name)


def test_words_alone_or_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unembedding of a shipped model, with its adapter too; the whole where the ends can't be had alone."""
    found = ModelSource("small:llava", dtype="float32", adapter="colours").words("cpu")
    assert isinstance(found, Unembedding)
    assert found.cfg.family == "llava"
    monkeypatch.setattr(ModelSource, "load", lambda self, device: ("loaded", self.id, device))
    monkeypatch.setattr(Unembedding, "from_pretrained", refuse)
    assert ModelSource("small:llava").words("cpu") == ("loaded", "small:llava", "cpu")


def refuse(*_: Any, **__: Any) -> None:
    raise UnsupportedModelError("not apart")


def test_a_model_that_is_there_decodes_words_itself(llava: HookedMM) -> None:
    """Nothing is read again."""
    once = Once("small:llava", dtype="float32")
    assert isinstance(once.words("cpu"), Unembedding)
    once.loaded.append(llava)
    assert once.words("cpu") is llava


@pytest.mark.usefixtures("loaded")
def test_random_weights_are_a_model_of_their_own(llava: HookedMM, tmp_path: Path) -> None:
    """Named so in tables and in the manifest, also where words alone are asked for; no adapter goes with them."""
    source = ModelSource("small:llava", random_weights=1)
    assert source.name == "small:llava, random weights"
    assert ModelSource("x", adapter="y").name == "x + y"
    weight = source.words("cpu").to_logits(torch.eye(llava.cfg.d_model))
    assert torch.equal(weight, source.load("cpu").to_logits(torch.eye(llava.cfg.d_model)))
    assert not torch.allclose(weight, llava.to_logits(torch.eye(llava.cfg.d_model)))
    store = extract(Lengths(source), SampleDataModule(SceneDataset(1)), tmp_path / "store")
    assert store.made_by["random_weights"] == 1
    assert "random_weights" not in Lengths(llava).made_by()
    with pytest.raises(BadInputError, match="random_weights=0 and adapter='place': an adapter belongs to trained"):
        ModelSource("small:llava", adapter="place", random_weights=0)
