"""The hallucination score of the logit lens: does the model see what is said to be in the picture?

Jiang et al. 2024 (arXiv 2410.02762). With p^l_i(c) the lens's probability of a word c behind l blocks at
image position i (`segmentation.word_maps`),

    score(c) = 1 - max over l and i of p^l_i(c)

is large for what is not there. How well it tells the absent from the present is an AUROC over all (picture, word); its
interval is drawn over pictures, since words of one picture are no samples of their own.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mm.errors import BadInputError


def hallucination_scores(confidence: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
    """1 - the largest probability of each word over layers and image positions.

    Raises:
        BadInputError: If a value is no probability.
    """
    if bool(((confidence < 0) | (confidence > 1 + 1e-6)).any()):
        raise BadInputError("confidence has values outside 0 to 1; give probabilities, not logits")
    return 1 - confidence


def clustered_auroc(
    scores: Float[Tensor, "n w"], truth: Bool[Tensor, "n w"], *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """AUROC over all entries, ties half, with its percentile bootstrap interval over rows (Efron 1979).

    With n_i times row i in a draw, AUROC = sum of n_i n_j over pairs (true in i, false in j) in which the true entry
    has the larger score, divided by that of all such pairs.

    Args:
        scores: Per picture and word; NaN leaves an entry out.
        truth: What the larger scores should be.
        draws: Number of resamples.
        seed: Of the draws.
        level: Share of the draws that the interval holds.

    Returns:
        Estimate, low, high; NaN where all entries are of one kind.

    Raises:
        BadInputError: If the two differ in shape, there are no rows, or `draws` or `level` are out of range.
    """
    if scores.shape != truth.shape or scores.ndim != 2 or not len(scores):
        raise BadInputError(
            f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} must both be (pictures, words)"
        )
    if draws < 1 or not 0 < level < 1:
        raise BadInputError(f"draws={draws}, level={level}; draws must be 1 at least, the level between 0 and 1")
    wide = scores.detach().double().cpu()
    row = torch.arange(len(wide))[:, None].expand(wide.shape)
    known = ~wide.isnan()
    order = wide[known].argsort(stable=True)
    values, owner = wide[known][order], row[known][order]
    positive = truth.cpu()[known][order].double()
    # Entries of equal score share a step of the curve.
    step = torch.cat([torch.zeros(1, dtype=torch.long), (values[1:] != values[:-1]).long().cumsum(0)])[: len(values)]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(wide), (draws, len(wide)), generator=generator)
    times = torch.ones(1 + draws, len(wide), dtype=torch.float64)
    times[1:] = torch.zeros(draws, len(wide), dtype=torch.float64).scatter_add_(1, drawn, times[1:])
    found = torch.cat([_auroc(part[:, owner], positive, step) for part in times.split(max(1, 2**23 // len(owner)))])
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = found[1:].nanquantile(tails).tolist()
    return float(found[0]), low, high


def _auroc(weights: Float[Tensor, "draws e"], positive: Float[Tensor, " e"], step: Tensor) -> Float[Tensor, " draws"]:
    """Of entries in the order of their scores, each counted as often as its weight says."""
    steps = int(step[-1]) + 1
    at = step.expand_as(weights)
    true, false = (
        torch.zeros(len(weights), steps, dtype=torch.float64).scatter_add_(1, at, weights * kind)
        for kind in (positive, 1 - positive)
    )
    below = false.cumsum(1) - false / 2
    return (true * below).sum(1) / (true.sum(1) * false.sum(1))
