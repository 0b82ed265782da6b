"""Targets: the row that predicts a token, under padding and in answers of several tokens, and their scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from analyses.targets import NoTargetsError, Targets, answer_targets, prompt_targets, special_ids, token_ids
from hooked_mm.batch import Modality
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.world import COUNTS, Scene

ASKED = ["what place is this ?", "how many objects are there ?", "describe the scene ."]


def said_of(scenes: list[Scene]) -> list[str]:
    """The right answers to what is asked of the first two, and something of the third."""
    return [scenes[0].place, COUNTS[len(scenes[1].objects) - 1], "a big red star"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_row_is_the_position_before_the_token_whatever_the_padding(
    llava: HookedMM, scenes: list[Scene], side: str
) -> None:
    batch = llava.prepare([picture(one) for one in scenes[:3]], ASKED, answers=said_of(scenes), padding_side=side)
    found = answer_targets(batch)
    ids = batch.input_ids
    for sample, row, token in zip(found.sample.tolist(), found.row.tolist(), found.token.tolist(), strict=True):
        assert ids[sample, row + 1] == token
        assert batch.role[sample, row + 1] == 3
    first = answer_targets(batch, "first")
    assert first.row.tolist() == batch.last_prompt().tolist()
    said = [llava.tokenizer.decode([token]).strip() for token in first.token.tolist()]
    assert said == [*said_of(scenes)[:2], "a"]
    # What predicts a token is the row before it, not its own: the model is sure of it there.
    logits = llava.hf_model(**batch.inputs).logits
    at_own_position = Targets(found.sample, found.row + 1, found.token)
    assert (
        found.take([0, 1]).scores(logits, "log_prob").exp().min()
        > 10 * at_own_position.take([0, 1]).scores(logits, "log_prob").exp().max()
    )


def test_numbered_tokens_are_left_out_where_an_answer_is_shorter(llava: HookedMM, scenes: list[Scene]) -> None:
    batch = llava.prepare([picture(one) for one in scenes[:3]], ASKED, answers=said_of(scenes))
    third = answer_targets(batch, [3])
    assert third.sample.tolist() == [2]
    assert llava.tokenizer.decode(third.token.tolist()).strip() == "star"
    with pytest.raises(NoTargetsError, match="no sample has an answer"):
        answer_targets(batch, [99])
    with pytest.raises(BadInputError, match="which='last'"):
        answer_targets(batch, "last")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="no sample has an answer"):
        answer_targets(llava.prepare(picture(scenes[0]), ASKED[0]))


def test_marks_are_no_words_of_an_answer(llava: HookedMM, scenes: list[Scene]) -> None:
    """A generation ends in its end-of-sequence token."""
    batch = llava.generate(llava.prepare([picture(one) for one in scenes[:2]], ASKED[:2]), 4).batch
    assert batch is not None
    every, words = answer_targets(batch), answer_targets(batch, "all", special_ids(llava))
    assert llava.tokenizer.eos_token_id in every.token.tolist()
    assert [llava.tokenizer.decode([token]) for token in words.token.tolist()] == said_of(scenes)[:2]


def test_scores_are_the_logit_the_log_probability_and_a_difference(llava: HookedMM, scenes: list[Scene]) -> None:
    batch = llava.prepare([picture(one) for one in scenes[:2]], ASKED[:2])
    logits = torch.randn(2, batch.length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = prompt_targets(batch, [3, 1])
    rows = [logits[sample, batch.last_prompt()[sample]] for sample in range(2)]
    expected = torch.stack([rows[0][3], rows[1][1]])
    assert torch.equal(found.scores(logits), expected)
    norm = torch.stack([row.exp().sum().log() for row in rows])
    assert torch.allclose(found.scores(logits, "log_prob"), expected - norm, atol=1e-12)
    against = prompt_targets(batch, [3, 1], [0, 0])
    for kind in ("logit", "log_prob"):
        assert torch.allclose(against.scores(logits, kind), torch.stack([r[t] - r[0] for r, t in zip(rows, (3, 1))]))  # type: ignore[arg-type]  # noqa: B905
    with pytest.raises(BadInputError, match="token 3 to 9"):
        prompt_targets(batch, [3, 9]).scores(logits)
    with pytest.raises(BadInputError, match="for 2 samples"):
        prompt_targets(batch, [3])
    with pytest.raises(BadInputError, match="one length"):
        Targets(torch.arange(2), torch.arange(3), torch.arange(2))


def test_a_round_holds_one_target_of_each_sample() -> None:
    every = Targets(torch.tensor([0, 0, 0, 1, 2, 2]), torch.arange(6), torch.arange(6))
    assert [one.token.tolist() for one in every.rounds()] == [[0, 3, 4], [1, 5], [2]]


def test_ids_of_a_model_that_puts_its_image_in_front(llava: HookedMM, scenes: list[Scene]) -> None:
    batch = llava.prepare([picture(one) for one in scenes[:2]], ASKED[:2])
    assert torch.equal(token_ids(batch), batch.input_ids)
    stands = batch.modality != Modality.IMAGE
    short = torch.stack([row[keep] for row, keep in zip(batch.input_ids, stands, strict=True)])
    widened = token_ids(replace(batch, inputs={**batch.inputs, "input_ids": short}))
    assert torch.equal(widened, batch.input_ids.masked_fill(~stands, -1))
    with pytest.raises(BadInputError, match="which token stands where"):
        token_ids(replace(batch, inputs={**batch.inputs, "input_ids": short[:, 1:]}))
