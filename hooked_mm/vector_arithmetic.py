"""Steering vectors added, scaled, made orthogonal to others or of a given length; what comes out tells what went in.

    both = added([sea, red], weights=[1.0, 0.5])     # the same as sea + 0.5 * red
    sea = orthogonal_to(sea, [beach, snow])          # what of it is not in the span of the others
    sea = with_norm(sea, beach.norm)

Sums are taken in float64 and kept as float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.vectors import checked, orthonormal

if TYPE_CHECKING:
    from hooked_mm.steering_vector import SteeringVector


def scaled(v: SteeringVector, factor: float) -> SteeringVector:
    """factor v.

    Raises:
        BadInputError: If the factor is no finite number.
    """
    number = _number("factor", factor)
    return _made(v.values.double() * number, f"{number:g} * {_called(v)}", "scaled", [v], factor=number)


def added(vs: Sequence[SteeringVector], weights: Sequence[float] | None = None) -> SteeringVector:
    """sum_i weights_i v_i.

    Args:
        vs: Vectors of one hook of one model.
        weights: One per vector; None for ones.

    Raises:
        BadInputError: If there are none, weights are not one per vector, or vectors do not belong together.
    """
    if not vs:
        raise BadInputError("no vectors to add; give at least one")
    numbers = [1.0] * len(vs) if weights is None else [_number("weights", weight) for weight in weights]
    if len(numbers) != len(vs):
        raise BadInputError(f"{len(numbers)} weights for {len(vs)} vectors; give one per vector")
    _check_alike(vs)
    total = sum(number * v.values.double() for number, v in zip(numbers, vs, strict=True))
    assert isinstance(total, Tensor)
    terms = [f"{number:g} * {_called(v)}" if number != 1 else _called(v) for number, v in zip(numbers, vs, strict=True)]
    return _made(total, " + ".join(terms), "added", vs, weights=numbers)


def orthogonal_to(v: SteeringVector, others: Sequence[SteeringVector]) -> SteeringVector:
    """v - B^T B v, where B is an orthonormal basis of the span of `others`: what of v is none of them.

    Raises:
        BadInputError: If there are no others, one of them is zero, or vectors do not belong together.
    """
    if not others:
        raise BadInputError("no vectors to be orthogonal to; give at least one")
    _check_alike([v, *others])
    # As float32, which the values are: what differs from the span by rounding alone is no direction of its own.
    basis = orthonormal("others", torch.stack([other.values for other in others])).double()
    rest = v.values.double()
    rest = rest - (rest @ basis.T) @ basis
    name = f"{_called(v)} without {', '.join(map(_called, others))}"
    return _made(rest, name, "orthogonal_to", [v, *others])


def with_norm(v: SteeringVector, norm: float) -> SteeringVector:
    """norm v / |v|.

    Raises:
        BadInputError: If v is zero, or the norm is negative or no finite number.
    """
    number = _number("norm", norm)
    if number < 0:
        raise BadInputError(f"norm={number}; a length is not negative, scale by a negative factor instead")
    length = v.values.double().norm()
    if float(length) == 0:
        raise BadInputError(f"the steering vector {_called(v)} is zero, so no length makes it one of norm {number}")
    return _made(v.values.double() * (number / length), v.name, "with_norm", [v], norm=number)


def _number(name: str, value: Any) -> float:
    return float(checked(name, value, (0,)))


def _called(v: SteeringVector) -> str:
    """A short name; a sum's in brackets, so that what is made of it reads right."""
    name = v.name or v.kind or v.hook
    return f"({name})" if " + " in name else name


def _check_alike(vs: Sequence[SteeringVector]) -> None:
    for other in vs[1:]:
        vs[0].check_alike(other)


def _shared(values: Iterable[Any], otherwise: Any = None) -> Any:
    """What all have in common, if they do."""
    known = list(values)
    return known[0] if known and all(value == known[0] for value in known) else otherwise


def _made(
    values: Float[Tensor, " d"], name: str, operation: str, parts: Sequence[SteeringVector], **settings: Any
) -> SteeringVector:
    """A vector that knows what it was made of; it says of itself what its parts have in common."""
    # Known to be of one model (`check_alike`), whose name not every part may know.
    model, revision = (next(filter(None, (getattr(v, key) for v in parts)), None) for key in ("model", "revision"))
    told = [
        {"name": v.name, "kind": v.kind, "norm": v.norm, "positions": v.positions, "made_from": v.made_from}
        for v in parts
    ]
    return replace(
        parts[0],
        values=values,
        kind=_shared((v.kind for v in parts), "mixed"),
        name=name,
        positions=_shared(v.positions for v in parts),
        model=model,
        revision=revision,
        adapter=_shared(v.adapter for v in parts),
        made_from={"operation": operation, **settings, "parts": told},
    )
