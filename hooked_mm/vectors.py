"""What interventions and conditions share about vectors: checking, normalising, spreading over positions, printing."""

from __future__ import annotations

from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.errors import BadInputError
from hooked_mm.value_layout import Layout


def checked(name: str, value: Any, dims: tuple[int, ...]) -> Tensor:
    """`value` as a floating tensor (the same one, with its gradients, if it is one) of an allowed number of dimensions.

    Raises:
        BadInputError: If it is no array of numbers, has other dimensions, is empty, or holds NaN or infinity.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInputError(f"{name} must be an array of numbers; got {type(value).__name__} ({error})") from None
    if tensor.is_complex() or tensor.ndim not in dims or not tensor.numel():
        wanted = " or ".join(map(str, dims))
        raise BadInputError(f"{name} must be real numbers in {wanted} dimensions; got shape {tuple(tensor.shape)}")
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    if not bool(tensor.isfinite().all()):
        raise BadInputError(f"{name} holds NaN or infinite numbers")
    return tensor


def checked_number(name: str, value: Any) -> float | Tensor:
    """A number, or a tensor (samples,) with one per sample.

    Raises:
        BadInputError: As `checked`.
    """
    tensor = checked(name, value, (0, 1))
    return float(tensor) if tensor.ndim == 0 else tensor


def wide(value: Tensor) -> Tensor:
    """The value in at least float32, in which sums over a vector are computed."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def unit(name: str, value: Any) -> Float[Tensor, "*b d"]:
    """A direction (d,) or one per sample (samples, d), of length 1.

    Raises:
        BadInputError: If it is no vector, or zero.
    """
    vector = wide(checked(name, value, (1, 2)))
    norm = vector.norm(dim=-1, keepdim=True)
    if not bool((norm > 0).all()):
        raise BadInputError(f"{name} has length 0, so it has no direction")
    return vector / norm


def one_direction(name: str, value: Any) -> Float[Tensor, " d"]:
    """A direction (d,) of length 1, not one per sample.

    Raises:
        BadInputError: If it is no vector, or zero.
    """
    return unit(name, checked(name, value, (1,)))


def orthonormal(name: str, value: Any) -> Float[Tensor, "*b k d"]:
    """An orthonormal basis of the span of directions: (d,) or (k, d), or (samples, k, d) with a span per sample.

    Computed in float64 by singular values; where directions depend on each other, the superfluous rows are zero.

    Raises:
        BadInputError: If a direction is zero, or if it is no array of vectors.
    """
    given = checked(name, value, (1, 2, 3))
    rows = given[None] if given.ndim == 1 else given
    norm = rows.double().norm(dim=-1, keepdim=True)
    if not bool((norm > 0).all()):
        raise BadInputError(f"{name} has a direction of length 0")
    _, sizes, basis = torch.linalg.svd(rows.double() / norm, full_matrices=False)
    tolerance = sizes[..., :1] * max(rows.shape[-2:]) * torch.finfo(wide(given).dtype).eps
    return (basis * (sizes > tolerance)[..., None]).to(wide(given).dtype)


class Spread:
    """Lays vectors and numbers of an intervention along the positions of a value (rows, positions[, heads], d)."""

    def __init__(self, value: Tensor, layout: Layout) -> None:
        self.value, self.layout = value, layout

    def vector(self, name: str, vector: Tensor, own: int = 1) -> Tensor:
        """A vector (d,), or (samples, d), to broadcast with the value; `own` dimensions belong to the vector itself.

        Raises:
            BadInputError: If its length is not the value's, or there is not one per sample.
        """
        if vector.shape[-1] != self.value.shape[-1]:
            raise BadInputError(
                f"{name} has length {vector.shape[-1]}, but the vectors at {self.layout.name!r} have length "
                f"{self.value.shape[-1]}"
            )
        return self._lay(name, vector, own).to(self.value.device)

    def number(self, name: str, number: float | Tensor) -> float | Tensor:
        """A number as it is, one per sample to broadcast with the value.

        Raises:
            BadInputError: If there is not one per sample.
        """
        if not isinstance(number, Tensor):
            return number
        return self._lay(name, number[:, None], 1).to(self.value.device)

    def _lay(self, name: str, values: Tensor, own: int) -> Tensor:
        if values.ndim == own:
            return values
        spread = self.layout.pick(values, name)
        return spread[:, :, None] if self.value.ndim == 4 else spread


def shown(item: Any) -> str:
    """One line for a frozen dataclass: fields that differ from their default, tensors by shape and norm."""
    parts: list[str] = []
    for field in fields(item):
        value = getattr(item, field.name)
        default = field.default is not MISSING and not isinstance(value, Tensor) and value == field.default
        if default or not field.repr:
            continue
        text = show(value)
        parts.append(text if field.name == "point" and not parts else f"{field.name}={text}")
    return f"{type(item).__name__}({', '.join(parts)})"


def show(value: Any) -> str:
    """A short text for one field."""
    if isinstance(value, Tensor):
        return f"<{'x'.join(map(str, value.shape))} of norm {float(value.detach().float().norm()):.4g}>"
    if callable(value) and not isinstance(value, Enum):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
