"""Whether a model needs an explanation's tokens: they are masked until it predicts another word.

`causal_explanation.verify` chooses which subsets are tried, `token_masking` masks them in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analyses.causal_explanation import BUDGET, Explanation, Verification, verify
from analyses.token_masking import How, check_maskable, predicted_tokens
from hooked_mm.batch import Batch
from hooked_mm.hooked import HookedMM


@dataclass(frozen=True)
class Checked:
    """What masking showed.

    Attributes:
        verification: Which subset changes the prediction, and how many were tried.
        base: The token that is predicted with nothing masked.
        predicted: That with the subset masked; None without one.
    """

    verification: Verification
    base: int
    predicted: int | None


def maskable(explanation: Explanation, how: How = "knockout") -> list[int]:
    """The members of an explanation that can be masked so, in its order: by the mean only image tokens."""
    return [node for node in explanation.members if how == "knockout" or explanation.nodes.image[node]]


def check(
    model: HookedMM,
    batch: Batch,
    sample: int,
    row: int,
    explanation: Explanation,
    *,
    how: How = "knockout",
    budget: int = BUDGET,
    at_once: int = 16,
    base: int | None = None,
    tell: Callable[[int], object] | None = None,
) -> Checked:
    """Mask closed subsets of an explanation in the model until it predicts another token.

    Args:
        model: The model.
        batch: The batch.
        sample: Its number in the batch.
        row: t, whose prediction is explained.
        explanation: Of t.
        how: See `token_masking`. By the mean, any subset of the image tokens counts.
        budget: Masked runs at the most.
        at_once: Of them in one pass.
        base: What is predicted with nothing masked; found by one more run unless given.
        tell: Called before every pass with how many masked runs were made; may raise, which ends it.

    Raises:
        UnsupportedModelError: If tokens can't be masked so in this model.
        BadInputError: For another `how`, or a budget that is not positive.
    """
    check_maskable(model, how)
    places, known = explanation.nodes.positions, dict[tuple[int, ...], int]()
    first = predicted_tokens(model, batch, sample, row, [()], how)[0] if base is None else base

    def changes(sets: Sequence[tuple[int, ...]]) -> list[bool]:
        if tell is not None:
            tell(len(known))
        chosen = [[places[node] for node in one] for one in sets]
        known.update(zip(sets, predicted_tokens(model, batch, sample, row, chosen, how, at_once), strict=True))
        return [known[one] != first for one in sets]

    closed = explanation.is_closed if how == "knockout" else None
    found = verify(maskable(explanation, how), changes, closed, budget=budget, at_once=at_once)
    return Checked(found, first, known[found.subset] if found.subset else None)


def summary(explanation: Explanation, verification: Verification, predicted: str | None) -> str:
    """One line about an explanation and its check; `predicted` is the word said without the subset."""
    count = len(explanation.members)
    if not count:
        return "nothing explains it in this head"
    if verification.verified:
        return (
            f"{len(verification.subset)} of {count} tokens verified ({verification.status}): without them the model "
            f"predicts {predicted!r}"
        )
    why = "no subset of it changes the prediction" if verification.status == "none" else "none found in the budget"
    return f"{count} tokens, not verified: {why}"
