"""Places, partners, controls and scores: against loops in float64, and where the answer is known by construction."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from concept_dict.kmeans import KMeans
from concept_dict.recovery import (
    CONTROLS,
    FORMS,
    SCORES,
    Concepts,
    HeldOut,
    match,
    moves,
    recover,
    share,
    top_by_direction,
)
from concept_dict.shift import AVERAGES, Average, Shifts, average, main_concept, movements, shift_vectors
from hooked_mm.errors import BadInputError
from tests.planted import planted

SEEDS = st.integers(0, 2**16)

DRAWN = ("random groups", "random direction", "another's")
"""Controls that are drawn by chance."""


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _placed(vectors: Tensor, mean: Tensor | None = None) -> Concepts:
    """Concepts at these vectors from the mean; of length 0, without a place."""
    start = torch.zeros(vectors.shape[1]) if mean is None else mean
    return Concepts(normalize(vectors), start, vectors.norm(dim=1), torch.zeros(0, dtype=torch.long))


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double() / (one.double().norm() * other.double().norm()))


@dataclass
class _Told:
    """A dictionary whose activations are told."""

    components_: Tensor
    mean_: Tensor
    activations: Tensor

    def transform(self, X: Tensor) -> Tensor:
        return self.activations


@given(seed=SEEDS, signed=st.booleans(), n=st.integers(0, 30))
def test_places_against_loops(seed: int, signed: bool, n: int) -> None:
    """s_k row by row; with both ends of each concept, -C behind C; rows of no concept count nowhere."""
    mean, rows = _drawn(seed, 5), _drawn(seed + 1, n, 5) * 3
    made = planted(_drawn(seed + 2, 4, 5), mean, signed)
    found = Concepts.of(made, rows, signed)
    ends = [(c, 1) for c in made.components_] + ([(c, -1) for c in made.components_] if signed else [])
    main = main_concept(torch.stack([(rows - mean) @ c * sign for c, sign in ends], dim=1).clamp_min(0))
    assert torch.equal(found.main, main)
    assert signed or n < 25 or -1 in main
    for number, (c, sign) in enumerate(ends):
        torch.testing.assert_close(found.directions[number], c * sign)
        along = [float((row - mean).double() @ (c * sign).double()) for row in rows[main == number]]
        assert float(found.sizes[number]) == pytest.approx(np.mean(along) if along else 0, rel=1e-5)
    torch.testing.assert_close(found.points, mean + found.sizes[:, None] * found.directions)


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_clusters_lie_at_their_centres(whiten: float) -> None:
    """On the rows of the fit u_k is the mean of the cluster, whitened or not; no matter what activations are."""
    rows = _drawn(0, 200, 6) * torch.tensor([9.0, 3, 1, 1, 1, 1]) + 4
    fitted = KMeans(5, whiten=whiten).fit(rows)
    found = Concepts.of(fitted, rows)
    assert torch.equal(found.main, fitted.labels_)
    means = torch.stack([rows[fitted.labels_ == number].mean(dim=0) for number in range(5)])
    torch.testing.assert_close(found.points, means, atol=2e-3, rtol=1e-3)
    far = Concepts.of(KMeans(5, whiten=whiten, activation="inverse_distance").fit(rows), rows)
    torch.testing.assert_close(far.points, found.points)
    half = Concepts.of(fitted, rows.half())
    torch.testing.assert_close(half.points, Concepts.of(fitted, rows.half().float()).points, atol=0, rtol=0)


def test_rows_behind_a_concept_give_it_no_place() -> None:
    """A size below 0 would turn the direction around: the concept has size 0, no partner, and no scores."""
    rows = torch.tensor([[-1.0, 2], [-3, 1], [0, 5]])
    told = _Told(torch.eye(2), torch.zeros(2), torch.tensor([[2.0, 1], [2, 1], [0, 1]]))
    found = Concepts.of(told, rows)
    assert found.main.tolist() == [0, 0, 1]
    assert found.sizes.tolist() == [0, 5]
    assert match(found, _placed(torch.eye(2))).tolist() == [-1, 1]


def _best(cosines: np.ndarray) -> float:
    """The largest sum over all ways to pair rows with different columns."""
    wide = cosines if cosines.shape[0] <= cosines.shape[1] else cosines.T
    few, many = wide.shape
    return max(sum(wide[i, c] for i, c in enumerate(chosen)) for chosen in itertools.permutations(range(many), few))


@given(k=st.integers(1, 4), m=st.integers(1, 4), seed=SEEDS)
def test_partners_are_the_best_of_all(k: int, m: int, seed: int) -> None:
    """Against every assignment; concepts without a place have no partner and are none; -1 where there are too few."""
    rng = np.random.default_rng(seed)
    here = torch.as_tensor(rng.random(k) < 0.8)
    there = torch.as_tensor(rng.random(m) < 0.8)
    original = _placed(_drawn(seed, k, 3) * here[:, None], _drawn(seed + 2, 3))
    tuned = _placed(_drawn(seed + 1, m, 3) * there[:, None])
    found = match(original, tuned)
    paired = np.flatnonzero(found >= 0)
    assert len(paired) == min(int(here.sum()), int(there.sum())) == len(set(found[paired]))
    assert all(here[number] and there[found[number]] for number in paired)
    if len(paired):
        cosines = np.array([[_cosine(o, t) for t in tuned.vectors[there]] for o in original.vectors[here]])
        total = sum(_cosine(original.vectors[number], tuned.vectors[found[number]]) for number in paired)
        assert total == pytest.approx(_best(cosines), abs=1e-6)


def _shifts(vectors: Tensor, counts: Tensor | None = None) -> Shifts:
    k = len(vectors)
    known = torch.full((k,), 5) if counts is None else counts
    return Shifts(vectors, known, torch.ones(k), torch.ones(k), vectors.mean(dim=0))


def _held(seed: int, n: int, d: int, k: int) -> HeldOut:
    original = _drawn(seed, n, d)
    return HeldOut(original, original + 0.5 * _drawn(seed + 1, n, d), torch.arange(n) % k, np.arange(n) // 2)


def test_moved_concepts_are_not_matched_anew() -> None:
    """Concept 0 moves onto the partner of concept 1, and 1 onto that of 0: by the old partners both are now wrong."""
    east, north = torch.eye(3)[:2]
    original, tuned = _placed(torch.stack([east, north])), _placed(torch.stack([east, north]))
    shifts = _shifts(torch.stack([north - east, east - north]))
    held = _held(0, 12, 3, 2)
    found = recover(original, tuned, shifts, {"unshifted": [None], "shifted": [shifts.vectors]}, held)
    assert found.partner.tolist() == [0, 1]
    assert found.scores["unshifted"]["cosine"].tolist() == pytest.approx([1, 1])
    assert found.scores["shifted"]["cosine"].tolist() == pytest.approx([0, 0])
    assert found.scores["shifted"]["distance"].tolist() == pytest.approx([2**0.5] * 2)


@given(seed=SEEDS, how=st.sampled_from(AVERAGES), alpha=st.sampled_from([1.0, 0.5, -2.0]))
def test_controls_are_what_they_say(seed: int, how: Average, alpha: float) -> None:
    """One vector for all; groups of the same sizes; the same norms in other directions; never one's own."""
    deltas, concept = _drawn(seed, 60, 5) + 1, torch.tensor([0] * 30 + [1] * 14 + [2] * 6 + [-1] * 10)
    shifts = shift_vectors(deltas, concept, 4, how)
    found = moves(shifts, deltas, concept, alpha, draws=3, seed=seed, how=how)
    assert set(found) == {*CONTROLS, "shifted"} == {*FORMS} - {"refitted"}
    assert {form for form, draws in found.items() if len(draws) == 3} == {*DRAWN}
    assert found["unshifted"] == [None]
    (shifted,), (everywhere,) = found["shifted"], found["global"]
    torch.testing.assert_close(shifted, alpha * shifts.vectors)
    torch.testing.assert_close(everywhere, (alpha * average(deltas, how)).expand(4, -1))
    for group, random, other in zip(*(found[form] for form in DRAWN), strict=True):
        torch.testing.assert_close(random.norm(dim=1), shifted.norm(dim=1))
        present = slice(0, 3)
        assert bool((torch.cosine_similarity(random[present], shifted[present], dim=1).abs() < 0.9999).all())
        for number in range(3):
            own = [int(torch.equal(other[number], shifted[m])) for m in range(3)]
            assert own[number] == 0
            assert sum(own) == 1
        assert not group[3].any()
        assert not torch.allclose(group[present], shifted[present])
    assert not torch.equal(found["random groups"][0], found["random groups"][1])
    again = moves(shifts, deltas, concept, alpha, draws=3, seed=seed, how=how)
    for form in DRAWN:
        assert all(torch.equal(one, two) for one, two in zip(found[form], again[form], strict=True))


@pytest.mark.parametrize("how", AVERAGES)
def test_random_groups_are_averages_of_the_same_kind_and_size(how: Average) -> None:
    """Every value is a power of two, so a mean tells which rows it is of; medians are medians."""
    deltas = (2.0 ** torch.arange(12))[:, None]
    concept = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3)
    for (group,) in (
        [m] for m in moves(shift_vectors(deltas, concept, 2, how), deltas, concept, how=how)["random groups"]
    ):
        for number, size in ((0, 5), (1, 4)):
            options = (torch.tensor(rows)[:, None] for rows in itertools.combinations(deltas[:, 0].tolist(), size))
            assert any(torch.allclose(average(rows, how), group[number]) for rows in options)


def test_one_concept_alone() -> None:
    """There is no other shift to take: its own, which gains nothing over itself."""
    deltas, concept = _drawn(0, 8, 3), torch.ones(8, dtype=torch.long)
    shifts = shift_vectors(deltas, concept, 3)
    for other in moves(shifts, deltas, concept)["another's"]:
        assert torch.equal(other[1], shifts.vectors[1])
        assert torch.equal(other[[0, 2]], shifts.vectors[[1, 1]])
    held = _held(0, 12, 3, 1)
    held = HeldOut(held.original, held.tuned, torch.ones(12, dtype=torch.long), held.sample)
    original = _placed(torch.eye(3) * torch.tensor([0.0, 1, 0])[:, None])
    found = recover(original, _placed(_drawn(1, 3, 3)), shifts, moves(shifts, deltas, concept), held)
    assert (found.partner >= 0).tolist() == [False, True, False]
    assert all(np.isfinite(own).tolist() == [False, True, False] for s in found.scores.values() for own in s.values())


def test_xl_vlms_fault_whole_matrix_normalisation() -> None:
    """Every shift keeps its own size, and alpha scales all alike: ratios are those of the movements."""
    deltas = torch.tensor([[1.0, 0], [1, 0], [0, 10], [0, 10]])
    concept = torch.tensor([0, 0, 1, 1])
    shifts = shift_vectors(deltas, concept, 2)
    assert shifts.magnitude.tolist() == [1, 10]
    for alpha in (1.0, 0.5, 3.0):
        (shifted,) = moves(shifts, deltas, concept, alpha)["shifted"]
        assert shifted.norm(dim=1).tolist() == pytest.approx([alpha, 10 * alpha])
        moved = _placed(torch.eye(2)).moved(shifted, _placed(torch.eye(2)))
        torch.testing.assert_close(moved, torch.eye(2) + alpha * shifts.vectors)


@given(seed=SEEDS, n=st.integers(1, 12), count=st.integers(1, 6))
def test_most_activating_samples_against_a_loop(seed: int, n: int, count: int) -> None:
    """Of each sample its farthest row; fewer than asked for, if there are no more."""
    rng = np.random.default_rng(seed)
    rows, directions, sample = _drawn(seed, n, 4), _drawn(seed + 1, 3, 4), rng.integers(0, 40, n)
    found = top_by_direction(directions, rows, sample, count)
    for direction, own in zip(directions.double(), found, strict=True):
        farthest: dict[int, float] = {}
        for row, number in zip(rows.double(), sample.tolist(), strict=True):
            farthest[number] = max(farthest.get(number, -np.inf), float(row @ direction))
        assert own == sorted(farthest, key=lambda number: -farthest[number])[:count]


def test_samples_without_rows_are_none() -> None:
    """Where all rows lie behind a direction, numbers that have none are not before them; equals by their number."""
    rows = torch.tensor([[-1.0], [-3], [-2], [-2]])
    assert top_by_direction(torch.ones(1, 1), rows, np.array([50, 60, 90, 70]), 3) == [[50, 70, 90]]
    assert top_by_direction(torch.ones(1, 1), rows, np.array([50, 60, 90, 70]), 9) == [[50, 70, 90, 60]]
    assert top_by_direction(torch.zeros(1, 1), rows, np.array([50, 60, 90, 70]), 2) == [[50, 60]]


def test_share_by_hand() -> None:
    """Of what is wanted; repetitions and case do not count."""
    assert share(["Red", "red", "blue"], ["RED", "green"]) == 0.5
    assert share([1, 2, 3, 4], [4, 3, 9]) == 0.5
    assert share(["red"], []) == 0
    assert np.isnan(share([], ["red"]))


def _spoken(directions: Tensor) -> list[list[str]]:
    return [[f"w{number}" for number in row.abs().argsort(descending=True)[:2].tolist()] for row in directions]


def _other_words(directions: Tensor) -> list[list[str]]:
    return [[f"w{number}" for number in row.abs().argsort()[:2].tolist()] for row in directions]


@given(seed=SEEDS, centred=st.booleans())
def test_scores_against_loops(seed: int, centred: bool) -> None:
    """Every score of every form, concept by concept, from its formula."""
    k, d, n = 3, 5, 24
    means = _drawn(seed + 9, 2, d) if centred else torch.zeros(2, d)
    original, tuned = _placed(2 * _drawn(seed, k, d), means[0]), _placed(2 * _drawn(seed + 1, k + 1, d), means[1])
    held = _held(seed + 2, n, d, k + 1)
    held = HeldOut(held.original, held.tuned, torch.where(held.concept == k, -1, held.concept), held.sample)
    deltas, concept = _drawn(seed + 4, 30, d), torch.arange(30) % k
    shifts = shift_vectors(deltas, concept, k)
    moved = moves(shifts, deltas, concept, draws=2, seed=seed)
    found = recover(original, tuned, shifts, moved, held, words=(_other_words, _spoken), samples=4)
    assert found.counts.tolist() == [10, 10, 10]
    assert found.held_out.tolist() == [6, 6, 6]
    for form, draws in moved.items():
        for number in range(k):
            target = tuned.directions[found.partner[number]] * tuned.sizes[found.partner[number]]
            wanted_samples = top_by_direction(target[None], held.tuned - means[1], held.sample, 4)[0]
            by_hand: dict[str, list[float]] = {name: [] for name in SCORES}
            for draw in draws:
                by = torch.zeros(d) if draw is None else draw[number]
                point = means[0] + original.sizes[number] * original.directions[number] + by
                start, speak, rows = (
                    (means[0], _other_words, held.original) if draw is None else (means[1], _spoken, held.tuned)
                )
                direction = point - start
                by_hand["cosine"].append(_cosine(direction, target))
                by_hand["distance"].append(float((direction - target).norm()))
                top = top_by_direction(direction[None], rows - start, held.sample, 4)[0]
                by_hand["samples"].append(len({*top} & {*wanted_samples}) / 4)
                by_hand["words"].append(len({*speak(direction[None])[0]} & {*_spoken(target[None])[0]}) / 2)
                mine = [m for m in range(n) if held.concept[m] == number]
                left = sum(float((held.tuned[m] - held.original[m] - by).square().sum()) for m in mine)
                size = sum(float((held.tuned[m] - held.original[m]).square().sum()) for m in mine)
                by_hand["explained"].append(1 - left / size)
                pairs = [_cosine(held.original[m] + by - start, held.tuned[m] - means[1]) for m in mine]
                by_hand["row_cosine"].append(float(np.mean(pairs)))
            for name, own in by_hand.items():
                assert found.scores[form][name][number] == pytest.approx(np.mean(own), abs=1e-5), (form, name)


def test_the_ceiling_is_the_partners_own_partner() -> None:
    """Found again turned a little: its cosine; a partner that did not come back has none, nor has one without."""
    tuned = _placed(torch.eye(4)[[1, 0, 2]])
    turned = _placed(torch.tensor([[1.0, 0.1, 0, 0], [0, 2, 0, 0]]))
    original = _placed(torch.stack([*torch.eye(4)[:3], torch.zeros(4)]))
    shifts, held = _shifts(torch.zeros(4, 4)), _held(0, 16, 4, 4)
    found = recover(original, tuned, shifts, {"unshifted": [None]}, held, refitted=turned)
    assert found.partner.tolist() == [1, 0, 2, -1]
    ceiling = found.scores["refitted"]
    assert set(ceiling) == {"cosine", "distance", "samples"}
    np.testing.assert_allclose(ceiling["cosine"], [1 / 1.01**0.5, 1, np.nan, np.nan], atol=1e-6)
    np.testing.assert_allclose(ceiling["distance"], [0.1, 1, np.nan, np.nan], atol=1e-6)


def test_rows_that_do_not_move() -> None:
    """No move explains all of it, any other nothing; no division by zero."""
    rows = _drawn(0, 10, 3)
    held = HeldOut(rows, rows.clone(), torch.zeros(10, dtype=torch.long), np.arange(10))
    shifts = _shifts(torch.zeros(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = {"unshifted": [None], "shifted": [torch.zeros(1, 3)], "global": [torch.ones(1, 3)]}
        scores = recover(_placed(torch.eye(3)[:1]), _placed(torch.eye(3)[:1]), shifts, moved, held).scores
    assert [scores[form]["explained"].item() for form in moved] == [1, 1, 0]
    assert scores["shifted"]["row_cosine"].item() == pytest.approx(1)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_are_scored_in_float32(kind: torch.dtype) -> None:
    """The same numbers stored wider give the same scores."""
    held = _held(3, 20, 4, 2)
    small = HeldOut((held.original * 10_000).to(kind), (held.tuned * 10_000).to(kind), held.concept, held.sample)
    wide = HeldOut(small.original.float(), small.tuned.float(), held.concept, held.sample)
    original, tuned = _placed(_drawn(0, 2, 4)), _placed(_drawn(1, 2, 4))
    shifts = shift_vectors(movements(small.original, small.tuned), held.concept, 2)
    one, two = (
        recover(original, tuned, shifts, {"unshifted": [None], "shifted": [shifts.vectors]}, h) for h in (small, wide)
    )
    for form, scores in one.scores.items():
        for name, own in scores.items():
            assert np.array_equal(own, two.scores[form][name])
            assert np.isfinite(own).all()


def test_refusals() -> None:
    """No draws, no samples."""
    shifts, held = _shifts(torch.ones(1, 3)), _held(0, 4, 3, 1)
    with pytest.raises(BadInputError, match="draws=0"):
        moves(shifts, held.original, held.concept, draws=0)
    with pytest.raises(BadInputError, match="samples=0"):
        recover(_placed(torch.eye(3)), _placed(torch.eye(3)), shifts, {"unshifted": [None]}, held, samples=0)
