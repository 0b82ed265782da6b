"""Sums, multiples and parts of steering vectors against numpy, and what is written down of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mm.errors import BadInputError
from hooked_mm.steering_vector import SteeringVector
from hooked_mm.vector_arithmetic import added, orthogonal_to, scaled, with_norm

HOOK = "blocks.1.hook_resid_post"
SEEDS = st.integers(0, 10_000)
FACTORS = st.floats(-8, 8)


def vector(seed: int = 0, name: str = "sea", width: int = 24, **options: object) -> SteeringVector:
    """A seeded vector of the model `m`."""
    values = torch.tensor(np.random.default_rng(seed).normal(size=width))
    told = {"model": "org/m", "revision": "r1", "positions": "last", "made_from": {"seed": seed}, **options}
    return SteeringVector(values, HOOK, "coarse", name, **told)  # type: ignore[arg-type]


def numbers(v: SteeringVector) -> np.ndarray:
    """Its values in float64."""
    return v.values.double().numpy()


@given(st.lists(st.tuples(SEEDS, FACTORS), min_size=1, max_size=5))
def test_sums_are_those_of_numpy(terms: list[tuple[int, float]]) -> None:
    """Weighted or not."""
    vs, weights = [vector(seed) for seed, _ in terms], [factor for _, factor in terms]
    table = np.stack([numbers(v) for v in vs])
    np.testing.assert_allclose(numbers(added(vs, weights)), np.array(weights) @ table, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(numbers(added(vs)), table.sum(axis=0), rtol=1e-6, atol=1e-6)


@given(SEEDS, SEEDS, FACTORS)
def test_operators_do_what_the_functions_do(one: int, two: int, factor: float) -> None:
    """`2 * v`, `v * 2`, `-v`, `v + w`, `v - w`."""
    v, w = vector(one), vector(two, "snow")
    x, y = numbers(v), numbers(w)
    for made, expected in (
        (factor * v, factor * x),
        (v * factor, factor * x),
        (scaled(v, factor), factor * x),
        (-v, -x),
        (v + w, x + y),
        (v - w, x - y),
        (2 * v - w, 2 * x - y),
    ):
        np.testing.assert_allclose(numbers(made), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError):
        _ = v + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        _ = "2" * v  # type: ignore[operator]


@given(SEEDS, st.integers(1, 4), st.booleans())
def test_the_orthogonal_part_is_the_residual_of_least_squares(seed: int, count: int, dependent: bool) -> None:
    """Also where one of the others depends on the rest; nothing of them is left."""
    v, others = vector(seed), [vector(seed + 1 + number) for number in range(count)]
    others += [others[0] + 3 * others[-1]] if dependent else []
    table = np.stack([numbers(other) for other in others]).T
    solution = np.linalg.lstsq(table, numbers(v), rcond=1e-6)[0]
    rest = orthogonal_to(v, others)
    np.testing.assert_allclose(numbers(rest), numbers(v) - table @ solution, atol=1e-5)
    assert np.abs(table.T @ numbers(rest)).max() < 1e-5
    # Of a vector in the span nothing is left.
    assert orthogonal_to(2 * others[0], others).norm < 1e-5


@given(SEEDS, st.floats(0, 100))
def test_a_vector_of_a_given_norm_points_as_before(seed: int, norm: float) -> None:
    """Its length is the one asked for."""
    v = vector(seed)
    made = with_norm(v, norm)
    assert made.norm == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(numbers(made) * v.norm, norm * numbers(v), rtol=1e-5, atol=1e-6)
    assert made.name == v.name


def test_what_comes_out_tells_what_went_in(tmp_path: Path) -> None:
    """Operation, settings and parts, through a folder; what the parts agree on is said of the whole."""
    v, w = vector(1), vector(2, "snow", positions="all", model="elsewhere/m", revision=None)
    made = 0.5 * (v - w)
    assert made.name == "0.5 * (sea + -1 * snow)"
    assert (made.hook, made.kind, made.model, made.revision, made.positions) == (HOOK, "coarse", "org/m", "r1", None)
    made.save(tmp_path)
    told = SteeringVector.load(tmp_path).made_from
    assert (told["operation"], told["factor"]) == ("scaled", 0.5)
    inner = told["parts"][0]["made_from"]
    assert (inner["operation"], inner["weights"]) == ("added", [1.0, -1.0])
    assert [part["name"] for part in inner["parts"]] == ["sea", "snow"]
    assert [part["made_from"] for part in inner["parts"]] == [{"seed": 1}, {"seed": 2}]
    assert inner["parts"][1]["norm"] == pytest.approx(w.norm)
    mixed = added([v, replace(v, kind="probe", model=None)])
    assert (mixed.kind, mixed.model, mixed.positions) == ("mixed", "org/m", "last")
    assert orthogonal_to(v, [w]).made_from["operation"] == "orthogonal_to"
    assert with_norm(v, 3).made_from["norm"] == 3.0


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (vector(width=25), "width 24 and 25"),
        (replace(vector(), hook="blocks.2.hook_resid_post"), "hook .*blocks.1.* and .*blocks.2"),
        (vector(model="org/n"), "model 'org/m' and 'org/n'"),
        (vector(revision="r2"), "revision 'r1' and 'r2'"),
    ],
)
def test_vectors_that_do_not_belong_together_are_refused(other: SteeringVector, named: str) -> None:
    """Wherever two meet; the error names what differs."""
    for act in (lambda: vector() + other, lambda: vector() - other, lambda: orthogonal_to(vector(), [other])):
        with pytest.raises(BadInputError, match=named):
            act()
    with pytest.raises(BadInputError, match=named):
        added([vector(1), vector(2), other])


def test_what_makes_no_sense_is_refused() -> None:
    """Nothing to add, weights of another number, zero vectors, lengths below zero, no numbers."""
    zero = 0 * vector()
    for act, named in (
        (lambda: added([]), "no vectors to add"),
        (lambda: added([vector()], [1, 2]), "2 weights for 1 vectors"),
        (lambda: orthogonal_to(vector(), []), "no vectors to be orthogonal to"),
        (lambda: orthogonal_to(vector(), [zero]), "others has a direction of length 0"),
        (lambda: with_norm(zero, 1), "is zero, so no length"),
        (lambda: with_norm(vector(), -1), "norm=-1"),
        (lambda: scaled(vector(), float("nan")), "factor holds NaN"),
    ):
        with pytest.raises(BadInputError, match=named):
            act()
