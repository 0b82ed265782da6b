"""Steering directions as formulas: what is added to an activation so that a model answers something else.

With S (n, d) the source rows and T (m, d) the target rows, representations of samples with one and the other answer:

    coarse      mean(T) - mean(S)                                  (arXiv 2501.03012, section 5)
    fine        c_j - c_i   for concepts c_i of S and c_j of T, or both of one set       (the same)
    concept     c_k
    probe       (u . coarse) u,   u the unit normal of the logistic regression that tells T from S
    principal   (u . mean(D)) u,  u the first right singular vector of the differences D (n, d) of pairs, not centred

so that alpha = 1 moves the mean of the source as far along the direction as the target's mean lies. Which rows are the
source (one answer, a random set, all) is the caller's choice. Sums are float64 and directions float32, whatever the
rows' dtype; they are in the units of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.kmeans import KMeans
from concept_dict.metrics import poles
from concept_dict.shift import main_concept
from hooked_mm.errors import BadInputError
from hooked_mm.vectors import checked

Kind = Literal["coarse", "fine", "concept", "probe", "principal", "shift"]
Make = Callable[[Tensor, Tensor], Tensor]
"""A direction (d,) of source rows (n, d) and target rows (m, d)."""

KINDS: dict[str, tuple[str, str]] = {
    "coarse": ("source and target rows", "the difference of their means"),
    "fine": ("source rows, and target rows unless pairs are within the source", "c_j - c_i for every pair of concepts"),
    "concept": ("a dictionary, or rows to learn one of", "a concept vector itself"),
    "probe": ("source and target rows", "the normal of the logistic regression that tells one from the other"),
    "principal": ("source and target rows, in pairs", "the first principal component of the pairs' differences"),
    "shift": ("what `hooked-mm shift` has kept", "how a fine-tuning moved a concept's rows"),
}
"""Kind -> what it needs, and what it is."""
assert tuple(KINDS) == get_args(Kind)

SMALL = 1e-6
"""A direction shorter than this share of what it is made of is rounding."""


def rows_of(name: str, rows: Tensor) -> Float[Tensor, "n d"]:
    """Rows as float64.

    Raises:
        BadInputError: If they are no rows, there are none, or one of them is not finite.
    """
    if isinstance(rows, Tensor) and rows.ndim == 2 and not len(rows):
        raise BadInputError(f"there are no {name} rows, so they have no mean; choose by other conditions")
    return checked(f"a set of {name} rows", rows, (2,)).detach().double()


def both_rows(source: Tensor, target: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Source and target rows as float64.

    Raises:
        BadInputError: As `rows_of`, or if their widths differ.
    """
    one, other = rows_of("source", source), rows_of("target", target)
    if one.shape[1] != other.shape[1]:
        raise BadInputError(
            f"source rows have width {one.shape[1]}, target rows {other.shape[1]}; take both from the same hook point"
        )
    return one, other


def coarse(source: Float[Tensor, "n d"], target: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """mean(T) - mean(S).

    Args:
        source: Rows with the answer to leave, or of all or random samples.
        target: Rows with the answer to get.

    Raises:
        BadInputError: For no rows, rows of two widths, or rows that are not finite.
    """
    one, other = both_rows(source, target)
    return (other.mean(dim=0) - one.mean(dim=0)).float()


def fine(
    concepts_from: Float[Tensor, "k d"], concepts_to: Float[Tensor, "l d"] | None = None
) -> tuple[Float[Tensor, "p d"], list[tuple[int, int]]]:
    """v_{i->j} = c_j - c_i for all pairs of concepts.

    Args:
        concepts_from: c_i, points among the rows: see `concept_points`.
        concepts_to: c_j, of another set of rows; the same concepts unless given, in pairs of two different ones.

    Returns:
        The vectors, and per vector its pair (i, j): i by i, and for each the j in order.

    Raises:
        BadInputError: For no concepts, concepts of two widths or that are not finite, or a single one without others.
    """
    one, other = both_rows(concepts_from, concepts_from if concepts_to is None else concepts_to)
    within = concepts_to is None
    pairs = [(i, j) for i in range(len(one)) for j in range(len(other)) if not (within and i == j)]
    if not pairs:
        raise BadInputError("one concept makes no pair; take a dictionary with more, or concepts of a target")
    sources, targets = (list(numbers) for numbers in zip(*pairs, strict=True))
    return (other[targets] - one[sources]).float(), pairs


@dataclass(frozen=True)
class ConceptPoints:
    """Where concepts lie among rows.

    Attributes:
        values: A point per concept that has rows.
        numbers: Which concepts these are; of signed ones k + i is the other end of i.
        counts: How many rows each has.
        main: Per row the number of its concept, -1 for none.
    """

    values: Float[Tensor, "m d"]
    numbers: Int[Tensor, " m"]
    counts: Int[Tensor, " m"]
    main: Int[Tensor, " n"]


def concept_points(rows: Float[Tensor, "n d"], decomposition: Decomposition) -> ConceptPoints:
    """Per concept the point that fine-grained vectors move from or to: the mean of the rows whose main concept it is.

    The concepts of a factorisation are unit directions that rows are *sums* of, no places where rows lie; c_j - c_i of
    them would have no length in the units of the rows, and would leave out what else the rows of a concept share. The
    mean of a concept's rows is such a place for every method, and with alpha = 1 the rows of i arrive, on average,
    where those of j are. For k-means, whatever its activations are, the rows of a concept are those nearest to its
    centroid: of the rows that it was fitted to, the point is the centroid itself.

    Args:
        rows: Representations.
        decomposition: Fitted to rows of this kind.

    Raises:
        BadInputError: For no rows, rows that are not finite or of another width, or if no row has a concept.
    """
    wide = rows_of("concepts'", rows)
    active = decomposition.transform(wide.float())
    if isinstance(decomposition, KMeans):
        main, k = nearest_centre(wide, decomposition), len(decomposition.components_)
    else:
        active = poles(active) if decomposition.SIGNED else active
        main, k = main_concept(active), active.shape[1]
    counts = torch.bincount(main[main >= 0], minlength=k)
    numbers = counts.nonzero()[:, 0]
    if not len(numbers):
        raise BadInputError("no row activates a concept, so concepts have no place among them; take other rows")
    values = torch.stack([wide[main == number].mean(dim=0) for number in numbers.tolist()])
    return ConceptPoints(values.float(), numbers, counts[numbers], main)


def nearest_centre(rows: Float[Tensor, "n d"], fitted: KMeans) -> Int[Tensor, " n"]:
    """Per row its cluster, in the space of the fit; activations tell it only where a centre is not the mean."""
    own = rows - fitted.mean_.to(rows)
    own = own @ fitted.whitening_.to(rows) if hasattr(fitted, "whitening_") else own
    centres = (getattr(fitted, "directions_", fitted.components_) * fitted.norms_[:, None]).to(rows)
    return torch.cdist(own, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def concept(components: Float[Tensor, "k d"], k: int) -> Float[Tensor, " d"]:
    """The vector of concept `k` itself; of a dictionary's components it has norm 1.

    Raises:
        BadInputError: If there is no such concept, or it is not finite.
    """
    found = rows_of("concept", components)
    if not 0 <= k < len(found):
        raise BadInputError(f"no concept {k}; there are {len(found)}, counted from 0")
    return found[k].float()


def probe(
    source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], strength: float = 1.0, max_iter: int = 1000
) -> Float[Tensor, " d"]:
    """The direction along which a linear probe tells target from source rows: (u . coarse) u.

    u is the unit normal of scikit-learn's L2-regularised logistic regression on standardised rows, both sets of equal
    weight, with the standardisation undone: w / sigma. It always points to the target's mean.

    Args:
        source: Rows with the answer to leave.
        target: Rows with the answer to get.
        strength: Of the fit, scikit-learn's `C`: smaller is smoother.
        max_iter: Of the solver.

    Raises:
        BadInputError: As `coarse`, for a strength that is not positive, or if the two sets can't be told apart.
    """
    if strength <= 0:
        raise BadInputError(f"strength={strength}; it must be above 0")
    one, other = both_rows(source, target)
    rows = torch.cat([one, other]).cpu().numpy()
    scaler = StandardScaler().fit(rows)
    fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=max_iter)
    fitted.fit(scaler.transform(rows), [0] * len(one) + [1] * len(other))
    normal = torch.from_numpy(fitted.coef_[0] / scaler.scale_)
    difference = (other.mean(dim=0) - one.mean(dim=0)).cpu()
    length = normal.norm()
    if float(difference @ normal) <= SMALL * float(difference.norm() * length) or not bool(length.isfinite()):
        raise BadInputError("a linear probe can't tell source from target rows; take other rows")
    normal = normal / length
    return ((difference @ normal) * normal).float().to(source.device)


def principal(differences: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The first principal component of paired differences, not centred: (u . mean(D)) u.

    Args:
        differences: Per pair its target row minus its source row.

    Raises:
        BadInputError: For no pairs, differences that are not finite, or if they have no common direction: the component
            then has no sign.
    """
    wide = rows_of("difference", differences)
    component = torch.linalg.svd(wide, full_matrices=False).Vh[0]
    length = wide.mean(dim=0) @ component
    size = float(wide.norm()) / len(wide) ** 0.5
    if abs(float(length)) <= SMALL * size:
        raise BadInputError("the pairs differ in no common direction; check which rows belong together")
    return (length * component).float()
