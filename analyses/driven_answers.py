"""What drives an answer, the picture or the text: MMVP's case study, as the LVLM-Interpret paper tells it.

Ben Melech Stan et al. 2024 (arXiv 2404.03118) look at questions of MMVP, and at how much of a token's relevancy goes to
the picture and how much to the question. Here an answer's drive is found by asking again:

| driven by | the answer is |
|---|---|
| `image` | another one when the picture is that of the pair's other question |
| `text` | the same with the own picture, with the other one, and without any |
| `unclear` | the same with both pictures, another one without any |

by how much, is |d| with d = o(own picture) - o(other picture), o = log p(one option) - log p(other option). And whether
maps tell: with R_image and R_question the sums of a map (relevancy, or the attention of all heads of all layers) over
the picture and over the question, at the row that predicts the first token by which the options differ,

    log ratio = log R_image - log R_question
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.stats import spearmanr
from torch import Tensor

from analyses.attention_views import answer_attention
from analyses.patch_maps import auroc
from analyses.relevancy import relevancies
from analyses.targets import Targets, answer_targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.intervals import middle, times_drawn

Driven = Literal["image", "text", "unclear"]
Measure = Literal["relevancy", "attention"]


def driven_by(own: str | None, other: str | None, blank: Sequence[str | None]) -> Driven:
    """What drives an answer.

    Args:
        own: The answer with the question's own picture; None for none.
        other: With that of the pair's other question.
        blank: Without a picture, in one way or several.
    """
    if own != other:
        return "image"
    return "text" if all(answer == own for answer in blank) else "unclear"


def log_odds(scores: Mapping[str, float]) -> float:
    """o of two options, of the first letter of the alphabet against the other.

    Raises:
        BadInputError: If there are not two.
    """
    if len(scores) != 2:
        raise BadInputError(f"options {sorted(scores)} have no odds; these are of two options")
    first, second = sorted(scores)
    return scores[first] - scores[second]


def decisive_targets(said: Batch, instead: Batch) -> Targets:
    """Of each sample's answer the first token by which it differs from another answer to the same question.

    Args:
        said: Prompts with the answers that are explained.
        instead: The same prompts with the other answers.

    Returns:
        One target per sample, in the batch `said`.

    Raises:
        BadInputError: If two answers are the same, or one is the other's beginning.
    """
    mine, others = answer_targets(said), answer_targets(instead)
    chosen = []
    for sample in range(len(said)):
        own, other = ((one.sample == sample).nonzero()[:, 0] for one in (mine, others))
        pairs = zip(mine.token[own].tolist(), others.token[other].tolist(), strict=False)
        place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            raise BadInputError("has two answers that differ in no token, so none of them decides", sample)
        chosen.append(int(own[place]))
    return mine.take(chosen)


def image_and_question(
    values: Float[Tensor, "n k"], image: Bool[Tensor, "n k"], question: Bool[Tensor, "n k"]
) -> Float64[Tensor, "n 2"]:
    """What a map gives to the picture and to the question.

    Args:
        values: Maps, not negative.
        image: Which of their columns are the picture's.
        question: Which are the question's.
    """
    wide = values.double().cpu()
    return torch.stack([(wide * mask.cpu()).sum(1) for mask in (image, question)], dim=1)


def shares_of(model: HookedMM, batch: Batch, targets: Targets, measure: Measure) -> Float64[Tensor, "n 2"]:
    """R_image and R_question of targets; active hooks are at work.

    Args:
        model: The model.
        batch: With answers that hold the targets.
        targets: Tokens of the answers.
        measure: `relevancy` (Chefer's rules through all layers), or `attention` (mean over heads and layers).

    Raises:
        BadInputError: If the model has no relevancy, or text and picture have no attention in common.
    """
    if measure == "relevancy":
        # Beside what cross-attention reads, R - I as it is: of that there are no shares to hold against shares of text.
        found = relevancies(model, batch, targets, normalise=batch.layout.kind != "cross")
        # Of an encoder-decoder, positions are the encoder's, where question and picture are read together.
        positions = found.positions
        question = batch.mask(role="question")[targets.sample.to(batch.role.device)]
        if found.keys is not None:
            read = torch.ones_like(found.keys, dtype=torch.bool)
            image = image_and_question(found.keys, read, ~read)[:, :1]
            if positions.shape[1] != question.shape[1]:
                raise BadInputError("the question is read apart from the picture, so their relevancies do not compare")
            return torch.cat([image, image_and_question(positions, ~question, question)[:, 1:]], dim=1)
        shown = batch.mask("image")[targets.sample.to(batch.modality.device)]
        return image_and_question(positions, shown, question)
    attention = answer_attention(model, batch)
    wanted = {(int(s), int(r)): number for number, (s, r) in enumerate(zip(targets.sample, targets.row, strict=True))}
    order = [-1] * len(targets)
    for place, key in enumerate(zip(attention.targets.sample.tolist(), attention.targets.row.tolist(), strict=True)):
        if key in wanted:
            order[wanted[key]] = place
    if min(order) < 0 or not bool(attention.groups["question"].any()):
        raise BadInputError("a target is no token of an answer, or the question is not among what text attends to")
    parts = [attention.by_head(name, share=True).double().mean((1, 2)) for name in ("image", "question")]
    return torch.stack(parts, dim=1)[order]


def log_ratio(parts: Float64[Tensor, "n 2"]) -> Float64[Tensor, " n"]:
    """log R_image - log R_question; NaN where both are zero."""
    image, question = parts.double().unbind(1)
    return (image.log() - question.log()).masked_fill((image == 0) & (question == 0), torch.nan)


def tells_apart(values: Float64[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """AUROC of values for a truth, NaN left out; NaN if all are of one kind."""
    known = ~values.isnan()
    return auroc(values[known], truth[known])


def rank_correlation(one: Float64[Tensor, " n"], other: Float64[Tensor, " n"]) -> float:
    """Spearman's rho, where both are known; NaN of fewer than three, or where one does not vary."""
    known = ~(one.isnan() | other.isnan())
    x, y = one[known].numpy(), other[known].numpy()
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def resampled(
    statistic: str, one: Float64[Tensor, " n"], other: Tensor, pair: Sequence[int], draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of two columns with its bootstrap interval over pairs, whose questions know about each other.

    Args:
        statistic: `auroc` (`tells_apart`) or `spearman` (`rank_correlation`).
        one: Values per question.
        other: Truths or values per question.
        pair: The pair of each question.
        draws: Of pairs with replacement; those without a statistic do not count.
        seed: Of the draws.

    Raises:
        BadInputError: For another statistic.
    """
    if statistic not in ("auroc", "spearman"):
        raise BadInputError(f"statistic={statistic!r}; it is 'auroc' or 'spearman'")
    measure = tells_apart if statistic == "auroc" else rank_correlation
    names = list(dict.fromkeys(pair))
    members = [[place for place, mine in enumerate(pair) if mine == name] for name in names]
    found = []
    for times in times_drawn(len(names), draws, seed):
        for row in times.long().tolist():
            rows = [place for count, own in zip(row, members, strict=True) for place in own * count]
            found.append(measure(one[rows], other[rows]))
    low, high = middle(torch.tensor(found, dtype=torch.float64)[:, None], 0.95)
    return measure(one, other), float(low), float(high)
