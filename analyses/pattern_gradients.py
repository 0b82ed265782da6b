"""Attention weighted by what it does for a target: Abar = mean over heads of relu(dl/dA * A).

Chefer et al. 2021 (arXiv 2103.15679), eq. 5. One forward pass serves all targets of a batch, and one backward pass one
target of each sample: samples have no part in each other, so the gradient of a sum of one score per sample is to each
sample that of its own score. Gradients are those of one target alone, never added up over the tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.targets import Kind, Targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.norms import at_least_float32

Tell = Callable[[int, int], None]
"""Is called in front of every backward pass: so many lie behind, of so many."""


@dataclass(frozen=True)
class Round:
    """What one backward pass gives: of each sample at most one target.

    Attributes:
        places: (m,), the numbers of its targets among all.
        targets: The targets themselves.
        weighted: Name of a pattern -> Abar (rows, q, k), None where the targets do not depend on it; all rows of the
            pattern, in execution order.
        reached: Name of a pattern -> (rows, q), whether a row of attention has any gradient: whether the targets depend
            on what it reads.
    """

    places: Int[Tensor, " m"]
    targets: Targets
    weighted: dict[str, Float[Tensor, "rows q k"] | None]
    reached: dict[str, Bool[Tensor, "rows q"]]


def weighted_attention(
    pattern: Float[Tensor, "... heads q k"], gradient: Float[Tensor, "... heads q k"]
) -> Float[Tensor, "... q k"]:
    """Abar = mean_h relu(dl/dA * A), in at least float32.

    Args:
        pattern: A, softmaxed attention.
        gradient: Of the score with respect to it.
    """
    return (at_least_float32(pattern) * at_least_float32(gradient)).relu().mean(dim=-3)


def places_by_round(targets: Targets) -> list[Int[Tensor, " m"]]:
    """The numbers of the targets that each backward pass serves."""
    numbers = torch.arange(len(targets))
    # Rounds keep what a target carries, so one that carries its number says which it is.
    return [one.row for one in Targets(targets.sample.cpu(), numbers, numbers).rounds()]


class PatternGradients:
    """Attention patterns of one forward pass, and their gradients target by target.

    Args:
        model: The model.
        batch: What it runs on, with the answers whose tokens are explained.
        targets: The tokens.
        points: Names of patterns, `blocks.3.attn.hook_pattern`; only these are kept and differentiated.
        kind: What a score is: the token's logit or log-probability.

    Attributes:
        patterns: Name -> (rows, heads, q, k), in execution order.
        scores: (n,), of the targets.

    Raises:
        BadInputError: If a target lies outside the logits, or there is nothing to explain.
    """

    def __init__(
        self, model: HookedMM, batch: Batch, targets: Targets, points: Sequence[str], kind: Kind = "logit"
    ) -> None:
        if not len(targets) or not points:
            raise BadInputError(f"{len(targets)} targets and {len(points)} patterns were given; at least one of each")
        with torch.enable_grad():
            logits, cache = model.run_with_cache(batch, list(points), grad=True)
            assert logits is not None
            self._scores = targets.scores(logits, kind)
        self.targets = targets
        self.patterns = {name: cache[name] for name in cache}
        self.scores = self._scores.detach().cpu()

    def rounds(self, tell: Tell | None = None) -> Iterator[Round]:
        """One backward pass after the other; the graph is gone after the last."""
        every, values = places_by_round(self.targets), list(self.patterns.values())
        for number, places in enumerate(every):
            if tell is not None:
                tell(number, len(every))
            total = self._scores[places.to(self._scores.device)].sum()
            last = number + 1 == len(every)
            gradients = torch.autograd.grad(total, values, retain_graph=not last, allow_unused=True)
            # Runs keep gradients with their values, which would hold every one of them twice.
            for value in values:
                value.grad = None
            found: dict[str, Tensor | None] = {
                name: None if gradient is None else weighted_attention(value.detach(), gradient)
                for (name, value), gradient in zip(self.patterns.items(), gradients, strict=True)
            }
            reached = {
                name: torch.zeros_like(value[:, 0, :, 0], dtype=torch.bool)
                if gradient is None
                else (gradient != 0).any(dim=-1).any(dim=1)
                for (name, value), gradient in zip(self.patterns.items(), gradients, strict=True)
            }
            del gradients
            yield Round(places, self.targets.take(places), found, reached)
