"""What drives an answer: classes, odds and shares by hand, and planted models that look or do not look."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from analyses.driven_answers import (
    decisive_targets,
    driven_by,
    image_and_question,
    log_odds,
    log_ratio,
    rank_correlation,
    resampled,
    shares_of,
    tells_apart,
)
from analyses.relevancy import relevancies
from analyses.targets import answer_targets
from analyses.token_ablation import Fill, replace_tokens
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.pairs import scene_pair
from tests.processors import processor
from tests.tiny import tiny


@pytest.mark.parametrize(
    ("own", "other", "blank", "kind"),
    [
        ("a", "b", ("a",), "image"),
        ("a", "b", ("b", "b"), "image"),
        ("a", None, (), "image"),
        ("a", "a", ("a", "a"), "text"),
        ("a", "a", ("a", "b"), "unclear"),
        ("a", "a", (None,), "unclear"),
    ],
)
def test_answers_are_told_apart_by_what_changes_them(
    own: str, other: str | None, blank: tuple[str | None, ...], kind: str
) -> None:
    """The other picture, or none."""
    assert driven_by(own, other, blank) == kind


def test_odds_are_of_two_options() -> None:
    """Of the first letter of the alphabet, in whatever order they come."""
    assert log_odds({"b": -1.0, "a": -3.0}) == -2.0
    with pytest.raises(BadInputError, match="have no odds"):
        log_odds({"a": 0.0, "b": 0.0, "c": 0.0})


def test_the_decisive_token_is_the_first_that_differs(llava: HookedMM) -> None:
    """Behind a common beginning; `top left` and `top right` differ in the second word."""
    pair = scene_pair("test", 0, "position")
    shown, asked = [picture(pair.one)] * 2, ["where is it", "where is the star ?"]
    said = llava.prepare(shown, asked, answers=["top left", "red"])
    instead = llava.prepare(shown, asked, answers=["top right", "blue"])
    targets = decisive_targets(said, instead)
    words = llava.tokenizer.convert_ids_to_tokens(targets.token.tolist())
    assert words == ["left", "red"]
    assert targets.sample.tolist() == [0, 1]
    ids = said.input_ids[torch.arange(2), targets.row + 1]
    assert torch.equal(ids, targets.token)
    with pytest.raises(BadInputError, match="differ in no token"):
        decisive_targets(said, said)


def test_shares_are_sums_over_the_picture_and_the_question(llava: HookedMM) -> None:
    """Of attention by hand; what relevancy gives to either adds up to at most one."""
    pairs = [scene_pair("test", number, "colour") for number in range(3)]
    shown, asked = [picture(pair.one) for pair in pairs], [pair.question for pair in pairs]
    said = llava.prepare(shown, asked, answers=[pair.answers[0] for pair in pairs])
    targets = decisive_targets(said, llava.prepare(shown, asked, answers=[pair.answers[1] for pair in pairs]))
    _, cache = llava.run_with_cache(said, "blocks.*.attn.hook_pattern")
    rows = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(6)]).mean((0, 2))
    expected = [
        [float(rows[sample, targets.row[sample]][mask[sample]].sum()) for mask in masks]
        for masks in [(said.mask("image"), said.mask(role="question"))]
        for sample in range(3)
    ]
    np.testing.assert_allclose(shares_of(llava, said, targets, "attention"), expected, atol=1e-5)
    parts = shares_of(llava, said, targets, "relevancy")
    given = relevancies(llava, said, targets).positions
    for sample, names in enumerate(said.tokens):
        words = pairs[sample].question.split()
        start = next(n for n in range(len(names)) if names[n : n + len(words)] == words)
        image = [n for n, name in enumerate(names) if name == "<image>"]
        both = [float(given[sample, image].sum()), float(given[sample, start : start + len(words)].sum())]
        np.testing.assert_allclose(parts[sample], both, atol=1e-6)
    assert (parts > 0).all()
    assert (parts.sum(1) <= 1 + 1e-6).all()
    with llava.hooks(replace_tokens(["hook_embed"], None, Fill("zero"))):
        assert not torch.allclose(shares_of(llava, said, targets, "relevancy"), parts, atol=1e-2)


def test_a_ratio_beside_cross_attention_does_not_hang_on_the_scale_of_logits(unchecked: None) -> None:
    """Both sides grow with the gradient: a question's shares, which do not, are nothing to hold amounts against."""
    model = HookedMM(deepcopy(tiny("mllama")), processor("mllama"), check=False)
    shown = picture(scene_pair("test", 0, "colour").one)
    batch, found = model.prepare([shown], ["what is this ?"], answers=["red"]), []
    for _ in range(2):
        model.hf_model.get_submodule(model.structure.unembed).weight.mul_(1e-2)
        found.append(log_ratio(shares_of(model, batch, answer_targets(batch, "first"), "relevancy")))
    torch.testing.assert_close(*found, rtol=0, atol=0.02)


def test_ratios_are_logarithms() -> None:
    """A picture that gets nothing is at minus infinity; where neither gets any there is no ratio."""
    values = torch.tensor([[0.2, 0.1, 0.4, 0.3]])
    image = torch.tensor([[True, True, False, False]])
    parts = image_and_question(values, image, torch.tensor([[False, False, True, False]]))
    assert float(log_ratio(parts)[0]) == pytest.approx(math.log(0.3 / 0.4))
    found = log_ratio(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    assert found[0] == -torch.inf
    assert found[1].isnan()


def test_rankings_are_those_of_others() -> None:
    """scikit-learn's AUROC, scipy's rho; what is not known is left out."""
    rng = np.random.default_rng(0)
    x, y, truth = rng.standard_normal(30), rng.standard_normal(30), rng.random(30) < 0.4
    one, other = torch.from_numpy(x.copy()), torch.from_numpy(y + x)
    assert tells_apart(one, torch.from_numpy(truth)) == pytest.approx(roc_auc_score(truth, x))
    assert rank_correlation(one, other) == pytest.approx(spearmanr(x, y + x).statistic)
    one[3] = torch.nan
    keep = np.arange(30) != 3
    assert tells_apart(one, torch.from_numpy(truth)) == pytest.approx(roc_auc_score(truth[keep], x[keep]))
    assert rank_correlation(one, other) == pytest.approx(spearmanr(x[keep], (y + x)[keep]).statistic)
    assert math.isnan(rank_correlation(one, torch.zeros(30, dtype=torch.float64)))
    assert math.isnan(tells_apart(one, torch.ones(30, dtype=torch.bool)))


def test_intervals_are_over_pairs() -> None:
    """Two questions of a pair that are copies of each other are worth one."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal(40))
    y = x + torch.from_numpy(rng.standard_normal(40))
    single = resampled("spearman", x, y, range(40), 200)
    doubled = resampled("spearman", x.repeat(2), y.repeat(2), [*range(40), *range(40)], 200)
    alone = resampled("spearman", x.repeat(2), y.repeat(2), range(80), 200)
    assert single[0] == pytest.approx(doubled[0])
    assert doubled[1:] == pytest.approx(single[1:])
    assert alone[2] - alone[1] < 0.85 * (doubled[2] - doubled[1])
    assert resampled("auroc", x, x > 0, range(40), 20) == (1, 1, 1)
    with pytest.raises(BadInputError, match="it is 'auroc' or 'spearman'"):
        resampled("pearson", x, y, range(40))
