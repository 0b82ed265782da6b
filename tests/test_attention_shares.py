"""Shares of attention, added up while the model runs: the same as of rows that transformers itself returns."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses import attention_shares as module
from analyses.attention_shares import AttentionShares, attention_shares, picture_columns
from analyses.targets import answer_targets
from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.small import small_model_path
from tests.processors import processor
from tests.tiny import tiny

ASKED, SAID = ["what colour is the star ?", "star ?"], ["a red star", "red"]


@pytest.fixture(scope="module")
def answered(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Two questions of different lengths, one padded."""
    return llava.prepare(images[:2], ASKED, answers=SAID)


@pytest.fixture(scope="module")
def found(llava: HookedMM, answered: Batch) -> AttentionShares:
    return attention_shares(llava, answered)


@pytest.fixture(scope="module")
def plain(answered: Batch) -> list[Tensor]:
    """Per layer (b, heads, q, k), as transformers returns it."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        small_model_path("llava"), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return list(model(**answered.inputs, output_attentions=True).attentions)


def test_shares_are_those_of_the_rows_that_transformers_returns(
    answered: Batch, found: AttentionShares, plain: list[Tensor]
) -> None:
    """Every layer, the first one among them, every head, every token; summed up by hand."""
    targets, count = answer_targets(answered), 0
    assert found.targets.row.tolist() == targets.row.tolist()
    for place, (sample, row) in enumerate(zip(targets.sample.tolist(), targets.row.tolist(), strict=True)):
        image = answered.modality[sample] == Modality.IMAGE
        question = [key for key in range(answered.length) if answered.role[sample, key] == Role.QUESTION]
        for layer in range(6):
            for head in range(4):
                own = plain[layer][sample, head, row]
                share = found.by_head("image")[place, layer, head]
                assert float(share) == pytest.approx(float(own[image].sum()), abs=1e-5)
                expected = sum(float(own[key]) for key in question) / len(question)
                mean = found.by_head("question", share=False)[place, layer, head]
                assert float(mean) == pytest.approx(expected, abs=1e-6)
                count += 1
    assert count == 4 * 6 * 4


def test_every_row_is_shared_out_wholly(found: AttentionShares) -> None:
    total = sum(found.shares.values())
    assert isinstance(total, Tensor)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert torch.allclose(found.by_layer().sum(1), torch.ones(6, dtype=torch.float64), atol=1e-5)


def test_of_the_answer_only_what_was_said_before_is_there_to_attend_to(found: AttentionShares) -> None:
    """The first token has none, the second one, the third two: the mean is over those."""
    assert found.counts["answer"].tolist()[:3] == [0, 1, 2]
    assert found.by_head("answer")[0].isnan().all()
    share, mean = found.by_head("answer")[2], found.by_head("answer", share=False)[2]
    assert torch.allclose(mean, share / 2)


def test_rows_are_held_a_few_at_a_time(
    llava: HookedMM, answered: Batch, found: AttentionShares, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LVLM-Interpret's fault: all attention of all tokens and layers at once. What is seen at once is one layer's
    rows, and no more than a chunk of them; the numbers are the same.
    """
    seen = []
    real = module.each_row

    def watched(model: HookedMM, batch: Batch, rows: Tensor, visit: module.Any, *given: object, **more: object) -> None:
        def visited(layer: int, start: int, pattern: Tensor) -> None:
            seen.append((layer, tuple(pattern.shape)))
            visit(layer, start, pattern)

        real(model, batch, rows, visited, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "each_row", watched)
    monkeypatch.setattr(module, "CHUNK", 2)
    again = attention_shares(llava, answered)
    assert {shape for _, shape in seen} == {(2, 4, 2, answered.length), (2, 4, 1, answered.length)}
    assert len(seen) == 6 * 2
    for name, value in found.shares.items():
        assert torch.allclose(again.shares[name], value, atol=1e-6)


def test_columns_of_ones_own_and_refusals(llava: HookedMM, answered: Batch, found: AttentionShares) -> None:
    mask = torch.zeros(len(found.targets), answered.length, dtype=torch.bool)
    mask[:, 40] = True
    own = attention_shares(llava, answered, columns={"mine": mask})
    assert own.by_layer().shape == (6, len(found.shares) + 1)
    assert float(own.shares["mine"].max()) > 0
    with pytest.raises(BadInputError, match="they are a mask of"):
        attention_shares(llava, answered, columns={"mine": mask[:1]})
    with pytest.raises(BadInputError, match="no columns 'picture'"):
        found.by_head("picture")
    with pytest.raises(BadInputError, match="no xattn patterns"):
        attention_shares(llava, answered, part="xattn")


def test_pictures_are_told_apart(llava: HookedMM, images: list[Image.Image]) -> None:
    """Two samples of two pictures, one padded: to each token its own, which lie one behind the other."""
    batch = llava.prepare([images[:2], images[2:4]], ASKED, answers=SAID)
    targets = answer_targets(batch)
    found = picture_columns(batch, targets)
    assert list(found) == ["picture 1", "picture 2"]
    for place, sample in enumerate(targets.sample.tolist()):
        keys = (batch.modality[sample] == Modality.IMAGE).nonzero()[:, 0].tolist()
        assert found["picture 1"][place].nonzero()[:, 0].tolist() == keys[:64]
        assert found["picture 2"][place].nonzero()[:, 0].tolist() == keys[64:]
    model = HookedMM(tiny("mllama"), processor("mllama"), check=False)
    crossed = model.prepare(images[:1], "what is this ?", answers=["red"])
    assert picture_columns(crossed, answer_targets(crossed), "xattn") == {}


def test_cross_attention_has_keys_of_the_picture_alone(images: list[Image.Image]) -> None:
    model = HookedMM(tiny("mllama"), processor("mllama"), check=False)
    batch = model.prepare(images[:1], "what is this ?", answers=["red"])
    crossed = attention_shares(model, batch)
    assert crossed.part == "xattn"
    # The gate's row of a text that sees the picture is shared out wholly among its keys.
    assert torch.allclose(crossed.shares["image"], torch.ones_like(crossed.shares["image"]), atol=1e-5)
    assert crossed.by_head("question").isnan().all()
    assert (attention_shares(model, batch, part="attn").by_head("question") > 0).all()
