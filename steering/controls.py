"""Controls: vectors as long as a steering vector that should not do what it does.

    random      a Gaussian direction of the same norm: what any push of this size does
    shuffled    the same recipe, from the same rows, with labels that mean nothing: what the recipe itself brings

Labels that are shuffled by plain chance keep some of the true direction: if a share p of one shuffled class and q of
the other are target rows, (q - p) coarse is left of it. They are therefore dealt: half of the source rows and half of
the target rows make each class, so that p = q and nothing is left but the noise of single rows. Where rows vary along
few directions, that noise has a cosine with the true vector all the same: it is kept with every control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.vectors import checked
from steering.directions import SMALL, Make, both_rows

CONTROLS = ("random", "shuffled")
"""Kinds of steering vectors that are controls."""

FOR = {
    "random": "what any push of this size does",
    "shuffled": "what the recipe brings when labels mean nothing",
}


def is_control(vector: SteeringVector) -> bool:
    """Whether it was made to be compared with, not to steer."""
    return vector.kind in CONTROLS


def random_like(vector: Float[Tensor, " d"], seed: int, orthogonal: bool = False) -> Float[Tensor, " d"]:
    """A direction drawn uniformly, as long as the vector.

    Args:
        vector: What it is to be compared with.
        seed: The same one draws the same direction on every machine.
        orthogonal: At right angles to the vector, so that nothing of it is left by chance.

    Raises:
        BadInputError: If the vector is no finite one, or has a single coordinate, to which nothing is orthogonal.
    """
    wide = checked("the vector", vector, (1,)).detach().double().cpu()
    drawn = torch.randn(len(wide), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if orthogonal:
        if len(wide) < 2:
            raise BadInputError("no direction is orthogonal to a vector of one coordinate; leave orthogonal out")
        unit = wide / wide.norm().clamp_min(torch.finfo(torch.float64).tiny)
        drawn = drawn - (drawn @ unit) * unit
    return (drawn * (wide.norm() / drawn.norm())).float().to(vector.device)


def deal_labels(
    source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], seed: int
) -> tuple[Float[Tensor, "h d"], Float[Tensor, "h d"]]:
    """Two classes of floor(n / 2) source and floor(m / 2) target rows each, drawn by chance; row r of both is of the
    same true class.

    The odd row of a set is in neither.

    Raises:
        BadInputError: As `coarse`, or if a set has a single row, which can't be in both.
    """
    both_rows(source, target)
    few = min(len(source), len(target))
    if few < 2:
        raise BadInputError(
            f"source and target have {len(source)} and {len(target)} rows; labels are shuffled with at least 2 of "
            "each; give more rows, or do without such controls (--controls [])"
        )
    chance = torch.Generator().manual_seed(seed)
    halves: list[list[Tensor]] = [[], []]
    for rows in (source, target):
        order = torch.randperm(len(rows), generator=chance).to(rows.device)
        half = len(rows) // 2
        halves[0].append(rows[order[:half]])
        halves[1].append(rows[order[half : 2 * half]])
    return torch.cat(halves[0]), torch.cat(halves[1])


def shuffled(
    source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], make: Make, seed: int, norm: float | None = None
) -> Float[Tensor, " d"]:
    """The same recipe on shuffled labels, as long as the true vector.

    Recipes that look at pairs of rows (`principal`) get pairs within one true class: of pairs across them, the sign
    alone would be shuffled, which a principal component does not see.

    Args:
        source: Rows with the answer to leave.
        target: Rows with the answer to get.
        make: The recipe.
        seed: Of the labels.
        norm: Length to give it; that of the vector of the true labels unless given.

    Raises:
        BadInputError: As `deal_labels`, as the recipe, or if there is no direction left to scale.
    """
    length = float(make(source, target).norm()) if norm is None else norm
    found = make(*deal_labels(source, target, seed)).double()
    own = float(found.norm())
    if own <= SMALL * length:
        raise BadInputError("with shuffled labels no direction is left; the rows are the same, take more or others")
    return (found * (length / own)).float()


def controls_of(
    vector: SteeringVector,
    source: Float[Tensor, "n d"] | None = None,
    target: Float[Tensor, "m d"] | None = None,
    make: Make | None = None,
    seeds: Sequence[int] = (0,),
    orthogonal: bool = False,
) -> list[SteeringVector]:
    """What to compare a steering vector with: per seed a random one and, of rows, one of shuffled labels.

    Args:
        vector: The true vector.
        source: Its source rows; without rows there are only random controls.
        target: Its target rows.
        make: Its recipe.
        seeds: One control of each kind per seed.
        orthogonal: Whether random ones are at right angles to the vector.

    Returns:
        Vectors of the kinds `"random"` and `"shuffled"` at the same hook, with its norm and provenance. `made_from`
        says in `control_of` whose controls they are, in `controls_for` what for, and in `cosine` how much of the vector
        they hold. Random ones of other vectors are other ones.

    Raises:
        BadInputError: If rows are given without a recipe or the other way round, and as `shuffled`.
    """
    given = [part is not None for part in (source, target, make)]
    if any(given) and not all(given):
        raise BadInputError("shuffled labels need source rows, target rows and the recipe; give all three or none")
    told = {"name": vector.name, "kind": vector.kind, "norm": vector.norm}

    def control(values: Tensor, kind: str, seed: int, **more: bool) -> SteeringVector:
        cosine = float(torch.nn.functional.cosine_similarity(values.double().cpu(), vector.values.double(), dim=0))
        about = {**vector.made_from, "control_of": told, "controls_for": FOR[kind], "control_seed": seed, **more}
        about["cosine"] = cosine
        return replace(vector, values=values, kind=kind, name=f"{kind} for {vector.name}, seed {seed}", made_from=about)

    found = []
    for seed in seeds:
        own = crc32(f"{seed} {vector.hook} {vector.kind} {vector.name}".encode())
        drawn = random_like(vector.values, own, orthogonal)
        found.append(control(drawn, "random", seed, orthogonal=orthogonal))
        if source is not None and target is not None and make is not None:
            found.append(control(shuffled(source, target, make, seed, vector.norm), "shuffled", seed))
    return found
