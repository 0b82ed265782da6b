"""The command: scores are means over samples of what the ledgers say; planted massive activations are told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.attention_sinks import KEYS, QUERIES, attention_ledgers
from analyses.model_samples import Samples
from analyses.result import Result
from analyses.sinks_command import VISUAL, common_dimensions, main, visual_scores
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.tensor_folder import read_json, read_tensors

MODEL = ["--model.id", "small:llava", "--model.dtype", "float32", "--draws", "20", "--layers", "[1, 3]"]
DATA = ["--data", "ScenesDataModule", "--data.task", "questions", "--data.size", "2", "--data.batch_size", "8"]


@pytest.mark.usefixtures("loaded")
def test_scores_are_means_over_samples(llava: HookedMM, tmp_path: Path) -> None:
    """Of every layer and head; arrays with their intervals beside them; no massive activations in the small model."""
    out = tmp_path / "out"
    main([*MODEL, *DATA, "--answer", "given", "--output", str(out)])
    samples = Samples(llava, ScenesDataModule(task="questions", size=2, batch_size=8), "given")
    budgets = []
    for _, batch in samples:
        ledgers = attention_ledgers(llava, batch, [1, 3])
        budgets.append(torch.stack([ledger.budget() for ledger in ledgers.values()], dim=1))
    every = torch.cat(budgets)
    result = Result.load(out)
    for query in ("answer", "question"):
        for place, key in enumerate(KEYS):
            own = result.of(f"share of attention from {query}", key)
            expected = every[:, :, :, QUERIES.index(query), place].mean((0, 2))
            assert [one.value for one in own] == pytest.approx(expected.tolist(), abs=1e-6)
            assert all(one.samples == len(every) and one.low <= one.value + 1e-9 for one in own)
    about = read_json(out, "budget", "budget", "")
    saved = read_tensors(out, "budget", about)
    assert torch.allclose(saved["budget/mean"].double(), every.mean(0), atol=1e-5)
    assert saved["sinks/high"].shape == (2, 4, 4)
    assert about["keys"] == list(KEYS)
    assert about["layers"] == [1, 3]
    assert not result.of(VISUAL[0])
    assert any("no visual sinks" in note for note in result.notes)
    assert (out / "heads.png").stat().st_size > 5000


def test_visual_sinks_are_counted_and_their_attention_compared(llava: HookedMM, images: list[Image.Image]) -> None:
    """Two of 64 image tokens are made loud where the first position is, and one head looks at nothing else."""
    batch = llava.prepare(images[:2], ["what colour is the star ?", "star ?"])
    places = (batch.modality == 2).long().argmax(1)[:, None] + torch.tensor([5, 9])
    first = (batch.modality != 0).long().argmax(1)[:, None]

    def loud(value: Tensor, hook: Any) -> Tensor:
        changed = value.clone()
        changed[torch.arange(2)[:, None], torch.cat([places, first], 1), 11] = 500.0
        return changed

    with llava.hooks([("blocks.1.hook_resid_pre", loud)]):
        dimensions = common_dimensions(llava, batch, [1], 3.0)
        ledgers = attention_ledgers(llava, batch, [1])
        found = visual_scores(llava, batch, ledgers, dimensions, 3.0)
    assert dimensions == [11]
    assert found.shape == (2, 1, 2)
    assert found[:, 0, 0].tolist() == [2 / 64] * 2
    for sample in range(2):
        alpha = ledgers[1].alpha()[sample].mean(0)
        image = (batch.modality[sample] == 2).nonzero()[:, 0].tolist()
        own = places[sample].tolist()
        others = [float(alpha[place]) for place in image if place not in own]
        expected = float(alpha[own].mean()) / (sum(others) / 62)
        assert float(found[sample, 0, 1]) == pytest.approx(expected, rel=1e-6)
    bare = visual_scores(llava, batch, ledgers, [11], 11.0)
    assert not bare[:, :, 0].any()
    assert bare[:, :, 1].isnan().all()


@pytest.mark.usefixtures("loaded")
def test_a_model_without_such_attention_is_refused(tmp_path: Path) -> None:
    """The small LLaVA has no cross-attention."""
    with pytest.raises(BadInputError, match="has no xattn patterns"):
        main([*MODEL, *DATA, "--part", "xattn", "--output", str(tmp_path)])
