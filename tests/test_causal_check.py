"""Explanations masked in the small model, against transformers under a mask written by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from PIL import Image

from analyses.attention_graphs import head_rows
from analyses.causal_check import Checked, check, maskable, summary
from analyses.causal_explanation import Explanation, Verification, explain
from analyses.targets import answer_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

Case = tuple[Batch, int, Explanation, Checked]


@pytest.fixture(scope="module")
def case(llava: HookedMM, images: list[Image.Image]) -> Case:
    """A colour, explained by a head of a middle layer."""
    batch = llava.prepare(images[2], "what colour is the ring ?", answers=["purple"])
    targets = answer_targets(batch, [0])
    (held,) = head_rows(llava, batch, targets, 2, [3])
    told, row = explain(held.rows, held.nodes), int(targets.row[0])
    return batch, row, told, check(llava, batch, 0, row, told, budget=64)


def by_hand(model: HookedMM, batch: Batch, row: int, cut: list[int]) -> int:
    """The likeliest token with positions cut from every row of a mask of four dimensions."""
    width = batch.modality.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool).tril()
    seen[:, cut] = False
    _, cache = model.run_with_cache(batch, "blocks.0.hook_resid_pre", stop_at_layer=1)
    with torch.no_grad():
        hidden = model.hf_model.model.language_model(
            inputs_embeds=cache["blocks.0.hook_resid_pre"],
            attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None],
            position_ids=torch.arange(width)[None],
        ).last_hidden_state
        return int(model.hf_model.lm_head(hidden)[0, row].argmax())


def test_what_is_said_without_the_subset_and_without_less_of_it(llava: HookedMM, case: Case) -> None:
    """The subset changes the prediction to the word that is told; no closed smaller one does."""
    batch, row, told, found = case
    places, subset = told.nodes.positions, found.verification.subset
    assert found.base == by_hand(llava, batch, row, []) == llava.tokenizer.encode("purple")[-1]
    assert found.verification.status == "smallest"
    assert found.predicted == by_hand(llava, batch, row, [places[node] for node in subset]) != found.base
    assert len(subset) == 3
    for size in (1, 2):
        for smaller in filter(told.is_closed, combinations(told.members, size)):
            assert by_hand(llava, batch, row, [places[node] for node in smaller]) == found.base
    assert found.verification.tried <= 64


def test_a_known_prediction_is_not_run_again_and_it_can_be_ended(llava: HookedMM, case: Case) -> None:
    """Whoever counts may raise."""
    batch, row, told, found = case
    assert check(llava, batch, 0, row, told, budget=64, base=found.base) == found
    counts: list[int] = []

    def tell(done: int) -> None:
        counts.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(llava, batch, 0, row, told, tell=tell)
    assert counts == [0]
    with pytest.raises(BadInputError, match="budget=0"):
        check(llava, batch, 0, row, told, budget=0)


def test_by_the_mean_only_image_tokens_are_masked(case: Case) -> None:
    """In the explanation's order."""
    told = case[2]
    assert maskable(told) == told.members
    assert maskable(told, "mean") == [node for node in told.members if told.nodes.image[node]]


def test_one_line_says_what_was_found(case: Case) -> None:
    """With its number of tokens and the word; what was not verified is not said to be."""
    told, count = case[2], len(case[2].members)
    verified = Verification("smallest", tuple(told.members[:1]), (), 5, 0)
    assert summary(told, verified, "blue") == (
        f"1 of {count} tokens verified (smallest): without them the model predicts 'blue'"
    )
    assert "no subset" in summary(told, Verification("none", (), (), 5, 2), None)
    assert "in the budget" in summary(told, Verification("unknown", (), (), 5, 2), None)
