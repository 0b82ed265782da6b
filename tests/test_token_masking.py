"""Masked tokens, against transformers' own attention under a mask written by hand."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from analyses.token_masking import check_maskable, masked_predictions
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.testing.miniatures import miniature

QUESTIONS = ["what colour is the star ?", "how many objects are there ?"]


@pytest.fixture(scope="module")
def asked(llava: HookedMM, images: list[Image.Image]) -> Batch:
    """Two questions of different lengths."""
    return llava.prepare(images[:2], QUESTIONS)


def by_hand(model: HookedMM, batch: Batch, sample: int, embeds: Tensor, cut: list[int]) -> Tensor:
    """Log-probabilities at the last position, from embeddings and a mask of four dimensions."""
    real = batch.inputs["attention_mask"][sample].bool()
    width = len(real)
    seen = torch.ones(width, width, dtype=torch.bool).tril() & real[None]
    seen[:, cut] = False
    # A row with nothing left reads nothing in either; no real row here is one.
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        hidden = model.hf_model.model.language_model(
            inputs_embeds=embeds[sample : sample + 1],
            attention_mask=mask,
            position_ids=(real.long().cumsum(0) - 1).clamp_min(0)[None],
        ).last_hidden_state
        return model.hf_model.lm_head(hidden)[0, -1].log_softmax(-1)


@pytest.fixture(scope="module")
def embeds(llava: HookedMM, asked: Batch) -> Tensor:
    """What enters the first block."""
    _, cache = llava.run_with_cache(asked, "blocks.0.hook_resid_pre", stop_at_layer=1)
    return cache["blocks.0.hook_resid_pre"]


@pytest.mark.parametrize("sample", [0, 1])
def test_knockout_is_a_mask_over_the_keys(llava: HookedMM, asked: Batch, embeds: Tensor, sample: int) -> None:
    """Of image tokens, of text, of none; several sets in one pass; whichever sample."""
    images = asked.mask(modality="image")[sample].nonzero()[:, 0].tolist()
    row = int(asked.last_prompt()[sample])
    sets = [[], images[:1], images[20:30], [row - 1, row - 2], images]
    found = masked_predictions(llava, asked, sample, row, sets)
    for number, own in enumerate(sets):
        torch.testing.assert_close(
            found.log_probs[number], by_hand(llava, asked, sample, embeds, own), atol=2e-4, rtol=0
        )
    assert found.token.tolist() == found.log_probs.argmax(1).tolist()
    # The sets do something.
    assert float((found.log_probs[1:] - found.log_probs[0]).abs().amax(1).min()) > 1e-4


def test_the_mean_of_image_tokens(llava: HookedMM, asked: Batch, embeds: Tensor) -> None:
    """Stands at the tokens that are masked, and nowhere else."""
    images = asked.mask(modality="image")[1].nonzero()[:, 0]
    row = int(asked.last_prompt()[1])
    chosen = images[5:25]
    found = masked_predictions(llava, asked, 1, row, [chosen.tolist()], how="mean")
    changed = embeds.clone()
    changed[1, chosen] = embeds[1, images].mean(0)
    torch.testing.assert_close(found.log_probs[0], by_hand(llava, asked, 1, changed, []), atol=2e-4, rtol=0)


def test_neither_padding_nor_company_matters(llava: HookedMM, images: list[Image.Image]) -> None:
    """The same sample alone, padded on the right, and beside a longer one."""
    told = []
    for batch in (
        llava.prepare(images[:1], QUESTIONS[:1]),
        llava.prepare(images[:2], QUESTIONS),
        llava.prepare(images[:2], QUESTIONS, padding_side="right"),
    ):
        own = batch.mask(modality="image")[0].nonzero()[:, 0]
        row = int(batch.last_prompt()[0])
        told.append(masked_predictions(llava, batch, 0, row, [own[10:20].tolist(), [row - 3]]).log_probs)
    for other in told[1:]:
        torch.testing.assert_close(other, told[0], atol=2e-4, rtol=0)


def test_what_can_not_be_masked_is_refused(llava: HookedMM, asked: Batch) -> None:
    """The row itself, positions that do not exist, text by a mean of image tokens, another way."""
    row = int(asked.last_prompt()[0])
    for places, why in (([row], "all but the row"), ([len(asked.tokens[0])], "positions"), ([-1], "positions")):
        with pytest.raises(BadInputError, match=why):
            masked_predictions(llava, asked, 0, row, [places])
    with pytest.raises(BadInputError, match="image tokens only"):
        masked_predictions(llava, asked, 0, row, [[row - 1]], how="mean")
    with pytest.raises(BadInputError, match="'knockout' or 'mean'"):
        masked_predictions(llava, asked, 0, row, [[]], how="zero")  # type: ignore[arg-type]
    assert len(masked_predictions(llava, asked, 0, row, []).token) == 0


@pytest.mark.usefixtures("unchecked")
def test_models_whose_structure_does_not_allow_it() -> None:
    """Where tokens are passed on without attention, cutting attention would silently do nothing."""
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        check_maskable(HookedMM(miniature("florence2")))
    mixed = HookedMM(miniature("qwen3_5"))
    with pytest.raises(UnsupportedModelError, match=r"layers \[.*\] of this model have no attention pattern"):
        check_maskable(mixed)
    check_maskable(mixed, "mean")
