"""What a head's attention says explains a prediction, and whether it does: CLEANN with its verification.

Rohekar et al. 2023 (arXiv 2310.20307), for vision-language models as LVLM-Interpret has it (arXiv 2404.03118), which
leaves the verification out. Of one head, and of t, the position that predicts the token:

1. *Nodes*: the image tokens that t attends to above a threshold, the 50 it attends to most at the most; the text behind
   the image above the threshold; and t itself.
2. *Graph*: the partial ancestral graph of the nodes, learned from their attention rows (`partial_correlation`,
   `causal_discovery`). Position is the order. Where positions see later ones (image tokens of some models see each
   other), they are of one tier, of which no order is known.
3. *Explanation*: the nodes of the PDS tree from t (`possible_d_sep`), at most three steps deep, nearest first, then by
   t's attention.
4. *Verification*: closed subsets of the explanation, of growing size, are masked in the model until it predicts
   another token. The first size at which it does gives the *smallest* subset: no smaller closed subset would do. If the
   budget ends before, subsets that grow node by node along the explanation are tried, and what changes the prediction
   is made *irreducible*: none of its tokens can be given back.

An explanation is *verified* only if some subset of it changes the prediction. If none does, it explains nothing that
the model does with these tokens, however large the attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.causal_discovery import MOST_CONDITIONS, MOST_TESTS, Learned, learn
from analyses.pag_orientation import Pag
from analyses.partial_correlation import ALPHA, SAMPLES, fisher_test
from analyses.possible_d_sep import is_closed, pds_paths
from hooked_mm.errors import BadInputError

THRESHOLD, MOST_IMAGES, DEPTH = 0.005, 50, 3
BUDGET = 200
"""Masked runs of the model for one explanation."""

Status = Literal["smallest", "irreducible", "none", "unknown"]
Changes = Callable[[Sequence[tuple[int, ...]]], Sequence[bool]]
"""For each of some sets of nodes: does masking it change the prediction?"""


@dataclass(frozen=True)
class Nodes:
    """The tokens that a graph joins, in their order; the last is t.

    Attributes:
        positions: (n,), in the batch.
        image: (n,), which are image tokens.
        weights: (n,), t's attention to them.
    """

    positions: tuple[int, ...]
    image: tuple[bool, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.positions)


def choose_nodes(
    attention: Float[Tensor, " keys"],
    image: Bool[Tensor, " keys"],
    text: Bool[Tensor, " keys"],
    row: int,
    *,
    threshold: float = THRESHOLD,
    most_images: int = MOST_IMAGES,
) -> Nodes:
    """The nodes of one head and one prediction.

    Args:
        attention: t's, over all keys.
        image: Which keys are image tokens (separators are none).
        text: Which are text that counts: behind the image.
        row: t.
        threshold: Keys with more attention are nodes.
        most_images: Of image tokens, so many at the most: those with most attention, of equal ones the first.

    Raises:
        BadInputError: If the threshold is negative, or `most_images`.
    """
    if not threshold >= 0 or most_images < 0:
        raise BadInputError(f"threshold={threshold}, most_images={most_images}; neither can be negative")
    weights = attention.detach().double().cpu()
    places = torch.arange(len(weights))
    above = (weights > threshold) & (places < row)
    seen = places[above & image.cpu()]
    best = seen[weights[seen].argsort(descending=True, stable=True)[:most_images]].tolist()
    chosen = sorted({*best, *places[above & text.cpu()].tolist()}) + [row]
    looked = image.cpu()[chosen].tolist()
    return Nodes(tuple(chosen), tuple(looked), tuple(weights[chosen].tolist()))


def tiers_of(sees: Float[Tensor, "nodes nodes"]) -> list[int]:
    """When each node comes: a new tier begins wherever no earlier node attends to it or to a later one.

    Args:
        sees: The nodes' attention to each other, in the order of positions.
    """
    later = (sees > 0).triu(1)
    begins = [not bool(later[:place, place:].any()) for place in range(len(sees))]
    return [sum(begins[: place + 1]) - 1 for place in range(len(sees))]


@dataclass(frozen=True)
class Explanation:
    """What a head's graph gives as the cause of a prediction.

    Attributes:
        nodes: The tokens.
        tiers: (n,), their order.
        learned: Their graph, numbered as they are, and what it cost.
        paths: The PDS tree: member -> a shortest PDS path from t to it.
    """

    nodes: Nodes
    tiers: tuple[int, ...]
    learned: Learned
    paths: dict[int, tuple[int, ...]]

    @property
    def pag(self) -> Pag:
        """The graph."""
        return self.learned.pag

    @property
    def root(self) -> int:
        """t's number."""
        return len(self.nodes) - 1

    def is_closed(self, members: Sequence[int]) -> bool:
        """Whether nodes are a closed set around t, as deep as its tree."""
        deepest = max(map(len, self.paths.values()), default=1) - 1
        return is_closed(self.pag, self.root, members, deepest)

    @property
    def members(self) -> list[int]:
        """The explanation: numbers of nodes, nearest to t first, then those that t attends to most."""
        return sorted(self.paths, key=lambda node: (len(self.paths[node]), -self.nodes.weights[node], node))


def explain(
    rows: Float[Tensor, "nodes keys"],
    nodes: Nodes,
    *,
    alpha: float = ALPHA,
    samples: int = SAMPLES,
    depth: int = DEPTH,
    most_conditions: int | None = MOST_CONDITIONS,
    most_tests: int = MOST_TESTS,
    tell: Callable[[int], object] | None = None,
) -> Explanation:
    """The graph of one head's nodes, and the explanation of the last of them.

    Args:
        rows: Each node's attention over all keys of the batch, nodes or not; padding has none.
        nodes: The nodes.
        alpha: Level of a test.
        samples: n of Fisher's z.
        depth: Of the PDS tree.
        most_conditions, most_tests: As in `causal_discovery.learn`.
        tell: Called before every test with how many were made; may raise, which ends the search.

    Raises:
        BadInputError: If there is not a row per node, one is zero, or a setting makes no sense.
    """
    if len(rows) != len(nodes) or depth < 1:
        raise BadInputError(f"{len(rows)} rows for {len(nodes)} nodes, depth={depth}; give a row per node, depth >= 1")
    tiers = tiers_of(rows[:, list(nodes.positions)])
    fisher, made = fisher_test(rows, alpha, samples), itertools.count()

    def test(a: int, b: int, given: tuple[int, ...]) -> bool | None:
        if tell is not None:
            tell(next(made))
        return fisher(a, b, given)

    learned = learn(len(nodes), test, tiers, most_conditions=most_conditions, most_tests=most_tests)
    return Explanation(nodes, tuple(tiers), learned, pds_paths(learned.pag, len(nodes) - 1, depth))


@dataclass(frozen=True)
class Verification:
    """What masking showed.

    Attributes:
        status: `smallest`: `subset` changes the prediction, and no smaller closed subset does. `irreducible`: it does,
            and none of its tokens can be given back, but not all smaller ones were tried. `none`: no closed subset
            does. `unknown`: none of those tried does, or `subset` does, but the budget ended before it was irreducible.
        subset: Numbers of nodes; empty if none was found.
        others: Further subsets of the same size that change the prediction, of those tried.
        tried: Masked runs made.
        size: All closed subsets up to this size were tried.
    """

    status: Status
    subset: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]
    tried: int
    size: int

    @property
    def verified(self) -> bool:
        """Whether the explanation holds a subset that changes the prediction."""
        return bool(self.subset)


@dataclass
class _Masked:
    """Runs in progress."""

    changes: Changes
    left: int
    at_once: int
    tried: int = 0

    def found(self, sets: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Those sets that change the prediction, until the budget is spent."""
        queue = iter(sets)
        while part := list(islice(queue, min(self.at_once, self.left))):
            self.left -= len(part)
            self.tried += len(part)
            yield from (one for one, changed in zip(part, self.changes(part), strict=True) if changed)


def verify(
    members: Sequence[int],
    changes: Changes,
    closed: Callable[[tuple[int, ...]], bool] | None = None,
    *,
    budget: int = BUDGET,
    at_once: int = 16,
) -> Verification:
    """Mask subsets of an explanation until the prediction changes.

    Args:
        members: The explanation, nearest to t first.
        changes: Masks sets in the model.
        closed: Which subsets count (`Explanation.is_closed`); all unless given.
        budget: Masked runs at the most. Three per member are kept for growing and shrinking, if there are as many.
        at_once: Sets masked in one pass.

    Raises:
        BadInputError: If `budget` or `at_once` is not positive.
    """
    if budget < 1 or at_once < 1:
        raise BadInputError(f"budget={budget}, at_once={at_once}; both must be at least 1")
    kept = min(3 * len(members), budget // 2)
    masked = _Masked(changes, budget - kept, at_once)
    size = 0
    for count in range(1, len(members) + 1):
        found = list(masked.found(filter(closed, combinations(members, count))))
        if found:
            return Verification("smallest", found[0], tuple(found[1:]), masked.tried, size)
        if not masked.left:
            break
        size = count
    if size == len(members):
        return Verification("none", (), (), masked.tried, size)
    masked.left += kept
    grown = next(masked.found([tuple(members[:count]) for count in range(1, len(members) + 1)]), ())
    if not grown:
        return Verification("unknown", (), (), masked.tried, size)
    # What is needed beside a token may be needless without it, so all are tried again after the last that went.
    subset, waiting, needed = list(grown), list(reversed(grown)), 0
    while needed < len(subset) and masked.left:
        node = waiting.pop(0)
        fewer = tuple(other for other in subset if other != node)
        if fewer and list(masked.found([fewer])):
            subset.remove(node)
            needed = 0
        else:
            waiting.append(node)
            needed += 1
    status: Status = "irreducible" if needed == len(subset) else "unknown"
    return Verification(status, tuple(subset), (), masked.tried, size)
