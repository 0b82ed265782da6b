"""Studies of models whose difference is known: planted shifts in real activations, none at all, mere noise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor
from torch.nn.functional import normalize

from concept_dict.decomposition import Decomposition
from concept_dict.gains import compare, counted, gain, relative_gain
from concept_dict.kmeans import KMeans
from concept_dict.pca import PCA
from concept_dict.recovery import CONTROLS, FORMS, SCORES, Concepts
from concept_dict.semi_nmf import SemiNMF
from concept_dict.shift import AVERAGES, Average, main_concept
from concept_dict.shift_study import Part, Settings, ShiftStudy, study
from concept_dict.top_norm import TopNorm
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.world import COLOURS
from hooked_mm.selectors import TokenOfInterest

HOOK = "blocks.3.hook_resid_post"
K = 6


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _parts(original: Tensor, tuned: Tensor, sample: np.ndarray) -> list[Part]:
    """Samples dealt into three."""
    dealt = [sample % 3 == number for number in range(3)]
    return [Part(original[torch.as_tensor(own)], tuned[torch.as_tensor(own)], sample[own]) for own in dealt]


@pytest.fixture(scope="module")
def real(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, np.ndarray]:
    """Where the small LLaVA decides on colours of 120 scenes, and the number of each row's scene."""
    extractor = Extractor(llava, HOOK, TokenOfInterest(tuple(COLOURS)), answer="given")
    store = extract(extractor, ScenesDataModule(120, seed=5), tmp_path_factory.mktemp("shift") / "store")
    names = store.rows.column("sample").to_pylist()
    _, numbers = np.unique(names, return_inverse=True)
    return store.activations(HOOK).float(), numbers


@pytest.fixture(scope="module")
def fitted(real: tuple[Tensor, np.ndarray]) -> KMeans:
    """Of a third of the samples."""
    rows, sample = real
    return KMeans(K).fit(rows[torch.as_tensor(sample % 3 == 0)])


def _planted(rows: Tensor, fitted: KMeans, noise: float) -> tuple[Tensor, Tensor]:
    """The rows of another model, and the Delta of each concept in it: of other sizes, and most of them alike."""
    drift = 20 * normalize(_drawn(1, 1, rows.shape[1]))
    sizes = torch.linspace(20, 35, K)[:, None]
    deltas = drift + sizes * normalize(_drawn(2, K, rows.shape[1]))
    main = main_concept(fitted.transform(rows))
    return rows + deltas[main] + noise * _drawn(3, *rows.shape), deltas


def _words(directions: Tensor) -> list[list[str]]:
    return [[str(number) for number in row.argsort(descending=True)[:5].tolist()] for row in directions]


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("how", AVERAGES)
def test_a_planted_shift_is_recovered(
    real: tuple[Tensor, np.ndarray], fitted: KMeans, noise: float, how: Average
) -> None:
    """Each Delta with cosine .99 and its size to 1 %; moved concepts score as found-again ones do, controls do not."""
    rows, sample = real
    tuned, deltas = _planted(rows, fitted, noise)
    _, shift, measure = _parts(rows, tuned, sample)
    made = study(fitted, shift, measure, words=(_words, _words), settings=Settings(average=how))
    assert made.empty == []
    assert made.unassigned == 0
    assert bool((torch.cosine_similarity(made.shifts.vectors, deltas, dim=1) >= 0.99).all())
    torch.testing.assert_close(made.shifts.magnitude, deltas.norm(dim=1), rtol=0.01, atol=0)
    # Consistency falls with noise: of rows Delta + e, |Delta|^2 / (|Delta|^2 + d noise^2).
    size = deltas.square().sum(dim=1)
    torch.testing.assert_close(made.shifts.pairwise, size / (size + rows.shape[1] * noise**2), atol=0.01, rtol=0)
    found = {form: {name: float(np.mean(own)) for name, own in s.items()} for form, s in made.recovery.scores.items()}
    assert set(found) == {*FORMS}
    assert set(found["shifted"]) == {*SCORES}
    assert found["shifted"]["cosine"] > found["refitted"]["cosine"] - 0.02
    assert found["shifted"]["cosine"] > 0.9
    assert found["shifted"]["explained"] > 0.99 - noise
    assert found["shifted"]["row_cosine"] > 0.99 - noise / 4
    for form in CONTROLS:
        for name in ("cosine", "samples", "explained", "row_cosine"):
            assert found["shifted"][name] > found[form][name] + 0.05, (form, name)
        assert found["shifted"]["distance"] < 0.7 * found[form]["distance"]
        comparison = compare(made.recovery, "cosine", against=form, enough=5)
        assert comparison.concepts == K
        assert comparison.low > 0
        assert comparison.improved == 1


def _same(made: ShiftStudy) -> None:
    """Nothing moved, nothing gained."""
    for name in ("vectors", "magnitude", "overall"):
        assert not getattr(made.shifts, name).any()
    assert bool(made.shifts.pairwise.isnan().all())
    assert bool(made.shifts.to_mean.isnan().all())
    for form in (*CONTROLS, "shifted"):
        for name in SCORES if "words" in made.recovery.scores["shifted"] else {*SCORES} - {"words"}:
            own, unmoved = made.recovery.scores[form][name], made.recovery.scores["unshifted"][name]
            np.testing.assert_allclose(own, unmoved, atol=1e-12)
            paired = made.recovery.partner >= 0
            assert (np.isnan(own) <= (~paired | (made.recovery.held_out == 0))).all()
            assert not np.nan_to_num(gain(made.recovery, name)).any()
            assert not np.nan_to_num(relative_gain(made.recovery, name)).any()
            found = compare(made.recovery, name, against=form, enough=1)
            assert found.improved == 0
            assert (found.mean, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)
    for found in made.correlations.values():
        assert np.isnan([found.pearson, found.low, found.high, found.spearman]).all()


@pytest.mark.parametrize(
    "method",
    [
        KMeans(K),
        KMeans(K, center=False),
        KMeans(K, whiten=0.5),
        KMeans(K, activation="inverse_distance"),
        KMeans(K, activation="cosine"),
        PCA(3),
        SemiNMF(K, whiten=0.5, max_iter=20),
        TopNorm(K),
    ],
    ids=str,
)
def test_models_that_are_the_same(real: tuple[Tensor, np.ndarray], method: Decomposition) -> None:
    """All forms score alike with dictionaries of different samples, too; not one warning."""
    rows, sample = real
    learn, shift, measure = _parts(rows, rows.clone(), sample)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = study(method, shift, measure, learn=learn, words=(_words, _words))
        _same(made)
        same = study(made.fitted, shift, measure, tuned=made.fitted)
        _same(same)
    assert {*same.fates.fate} <= {"kept", ""}
    assert same.fates.lost == [] or same.empty


def _noise(seed: int, n: int = 90, d: int = 12) -> tuple[Tensor, np.ndarray]:
    """Three clouds, two rows of each sample, each from a cloud by chance."""
    cloud = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed + 100))
    return 8 * torch.eye(d)[cloud] + _drawn(seed, n, d), np.arange(n) // 2


def test_in_sample_noise_looks_like_perfect_recovery() -> None:
    """Movements without any meaning: in sample moved centres are the fine-tuned model's, held out they gain nothing."""
    rows, sample = _noise(0, n=360)
    # Large noise for each row, drawn apart from all else: there is no shift to be found.
    tuned = rows + 1.5 * _drawn(1, *rows.shape)
    learn, shift, measure = _parts(rows, tuned, sample)
    centres = KMeans(3).fit(learn.original)
    whole = Part(rows, tuned, sample)
    clusters = KMeans(3).fit(rows)
    same_groups = KMeans(3, init=clusters.cluster_centers_).fit(tuned)
    inside = study(clusters, whole, whole, tuned=same_groups).recovery
    assert inside.scores["shifted"]["cosine"].min() > 0.9999
    assert (inside.scores["shifted"]["distance"] < 0.2 * inside.scores["unshifted"]["distance"]).all()
    assert (relative_gain(inside, "distance") > 0.8).all()
    outside = study(centres, shift, measure).recovery
    assert (relative_gain(outside, "distance") < 0.3).all()
    assert np.mean(gain(outside, "cosine")) < 0.001
    assert np.mean(outside.scores["shifted"]["explained"]) < 0.0


def test_xl_vlms_fault_crash_on_concepts_without_samples() -> None:
    """A concept that no row belongs to is listed, without a partner, and without scores; the others have theirs."""
    rows, sample = _noise(0)
    tuned = rows + torch.ones(12)
    centres = KMeans(3).fit(rows)
    far = torch.cat([centres.cluster_centers_, torch.full((1, 12), -1000.0)])
    method = KMeans(4)
    method.mean_, method.components_ = centres.mean_, normalize(far - centres.mean_)
    method.norms_ = (far - centres.mean_).norm(dim=1)
    _, shift, measure = _parts(rows, tuned, sample)
    made = study(method, shift, measure)
    assert made.empty == [3]
    assert made.recovery.partner[3] == -1
    assert (made.recovery.partner[:3] >= 0).all()
    assert made.recovery.counts[3] == made.recovery.held_out[3] == 0
    for scores in made.recovery.scores.values():
        for own in scores.values():
            assert np.isnan(own[3])
            assert np.isfinite(own[:3]).all()
    assert counted(made.recovery, 5).tolist() == [True, True, True, False]
    assert not made.shifts.vectors[3].any()


def test_all_rows_in_one_concept() -> None:
    """One concept has everything; the rest is listed."""
    rows, sample = _noise(0)
    method = KMeans(2)
    method.mean_, method.components_, method.norms_ = torch.zeros(12), torch.eye(12)[:2], torch.tensor([1.0, 1e6])
    _, shift, measure = _parts(rows, rows + 1, sample)
    made = study(method, shift, measure)
    assert made.empty == [1]
    assert made.shifts.counts.tolist() == [30, 0]
    assert np.isfinite(made.recovery.scores["shifted"]["cosine"]).tolist() == [True, False]
    assert np.isnan(made.correlations["magnitude with gain in cosine"].pearson)


@pytest.mark.parametrize(("k", "m"), [(3, 6), (6, 3)])
def test_dictionaries_of_other_sizes(k: int, m: int) -> None:
    """The smaller one's concepts all have a partner; the ceiling is that of a dictionary of the fine-tuned model's."""
    rows, sample = _noise(0)
    learn, shift, measure = _parts(rows, rows + _drawn(5, 12), sample)
    tuned = KMeans(m).fit(measure.tuned)
    made = study(KMeans(k), shift, measure, learn=learn, tuned=tuned)
    paired = made.recovery.partner >= 0
    assert paired.sum() == 3
    assert len(made.fates.fate) == m
    held = made.recovery.held_out > 0
    for form, scores in made.recovery.scores.items():
        for name, own in scores.items():
            known = paired & held if name in ("explained", "row_cosine") else paired
            assert np.isfinite(own).tolist() == known.tolist(), (form, name)
    # The partner's own settings find it again: of three clouds cut into m, which cut is not told.
    if m == 3:
        assert made.recovery.scores["refitted"]["cosine"][paired].min() > 0.95


def test_both_ends_of_signed_concepts() -> None:
    """PCA's ends are concepts of their own, labelled, with shifts apart; a fine-tuned dictionary may have none."""
    d = 8
    side = torch.where(torch.arange(120) % 2 == 0, 1.0, -1.0)
    rows = 0.3 * _drawn(0, 120, d) + 5 * side[:, None] * torch.eye(d)[0]
    moved = rows + torch.where(side[:, None] > 0, torch.eye(d)[1], 2 * torch.eye(d)[2])
    sample = np.arange(120) // 2
    _, shift, measure = _parts(rows, moved, sample)
    method = PCA(1).fit(rows)
    made = study(method, shift, measure)
    assert made.signed
    assert (made.k, [made.label(n) for n in range(2)]) == (2, ["0 +", "0 −"])
    plus = int(method.components_[0, 0] < 0)
    torch.testing.assert_close(made.shifts.vectors[plus], torch.eye(d)[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(made.shifts.vectors[1 - plus], 2 * torch.eye(d)[2], atol=1e-5, rtol=0)
    assert made.shifts.counts.tolist() == [20, 20]
    assert not study(KMeans(2).fit(rows), shift, measure).signed
    assert study(KMeans(2).fit(rows), shift, measure).label(1) == "1"
    mixed = study(method, shift, measure, tuned=KMeans(2).fit(measure.tuned))
    assert (mixed.k, len(mixed.tuned.sizes)) == (2, 2)
    assert (len(study(KMeans(2).fit(rows), shift, measure, tuned=method).tuned.sizes)) == 2


def test_the_mean_of_the_fine_tuned_model_is_that_of_the_same_samples() -> None:
    """A drift of everything moves the mean as well: nothing is gained by it, whatever samples a part has."""
    rows, sample = _noise(3)
    drift = 5 * _drawn(4, 12)
    learn, shift, measure = _parts(rows, rows + drift, sample)
    made = study(KMeans(3), shift, measure, learn=learn)
    torch.testing.assert_close(made.tuned.mean, made.original.mean + drift)
    for form in ("global", "shifted"):
        np.testing.assert_allclose(gain(made.recovery, "cosine", form), 0, atol=1e-6)
        np.testing.assert_allclose(made.recovery.scores[form]["explained"], 1, atol=1e-6)
    plain = study(KMeans(3, center=False), shift, measure, learn=learn)
    assert not plain.tuned.mean.any()
    assert (gain(plain.recovery, "cosine", "global") > 0).all()


def _numbers(made: ShiftStudy) -> list[np.ndarray]:
    scores = [own for s in made.recovery.scores.values() for own in s.values()]
    shifts = [getattr(made.shifts, name).numpy() for name in ("vectors", "counts", "pairwise", "to_mean", "overall")]
    return [*shifts, made.recovery.partner, *scores, made.fates.cosine]


def test_the_order_of_rows_does_not_matter(real: tuple[Tensor, np.ndarray], fitted: KMeans) -> None:
    """The same rows of both parts in another order: the same shifts and scores to rounding (drawn controls apart)."""
    rows, sample = real
    tuned, _ = _planted(rows, fitted, 0.3)
    parts = _parts(rows, tuned, sample)[1:]
    theirs = KMeans(K).fit(parts[1].tuned)
    orders = [torch.as_tensor(np.random.default_rng(n).permutation(len(part.original))) for n, part in enumerate(parts)]
    others = [
        Part(part.original[order], part.tuned[order], part.sample[order.numpy()])
        for part, order in zip(parts, orders, strict=True)
    ]
    one, other = study(fitted, *parts, tuned=theirs), study(fitted, *others, tuned=theirs)
    for name in ("vectors", "counts", "pairwise", "to_mean", "overall"):
        torch.testing.assert_close(getattr(one.shifts, name), getattr(other.shifts, name), atol=1e-4, rtol=1e-5)
    for form in ("unshifted", "global", "shifted"):
        for name, own in one.recovery.scores[form].items():
            np.testing.assert_allclose(own, other.recovery.scores[form][name], atol=1e-4)


def test_xl_vlms_fault_unseeded_k_means() -> None:
    """Two studies with one seed are equal in every number; another seed draws other controls."""
    rows, sample = _noise(0)
    parts = _parts(rows, rows + _drawn(1, *rows.shape), sample)
    few = Settings(enough=5)
    one, two = (study(KMeans(4, n_init=1), *parts[1:], learn=parts[0], settings=few) for _ in range(2))
    for own, again in zip(_numbers(one), _numbers(two), strict=True):
        assert np.array_equal(own, again, equal_nan=True)
    assert one.correlations == two.correlations
    assert all(found.concepts for found in one.correlations.values())
    other = study(KMeans(4, n_init=1), *parts[1:], learn=parts[0], settings=Settings(seed=1))
    drawn = [made.recovery.scores["random direction"]["cosine"] for made in (one, other)]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_xl_vlms_fault_half_precision_arithmetic(kind: torch.dtype) -> None:
    """Rows that a store holds in half precision give the numbers that the same rows give in float32."""
    rows, sample = _noise(0)
    tuned = rows * 1.2 + 3
    assert bool((rows * 3000).half().square().isinf().any())
    parts = _parts((rows * 3000).to(kind), (tuned * 3000).to(kind), sample)
    wide = [replace(part, original=part.original.float(), tuned=part.tuned.float()) for part in parts]

    def numbers(some: Sequence[Part]) -> list[Any]:
        return _numbers(study(KMeans(3), *some[1:], learn=some[0]))

    for own, expected in zip(numbers(parts), numbers(wide), strict=True):
        assert np.array_equal(own, expected, equal_nan=True)


def test_alpha_scales_moves() -> None:
    """Twice the shift of half the movement is the shift; 0 leaves `explained` at 0."""
    rows, sample = _noise(0)
    parts = _parts(rows, rows + _drawn(1, *rows.shape), sample)
    none = study(KMeans(3), *parts[1:], learn=parts[0], settings=Settings(alpha=0))
    assert none.recovery.scores["shifted"]["explained"].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    half = [Part(p.original, p.original + (p.tuned - p.original) / 2, p.sample) for p in parts]
    theirs = KMeans(3).fit(parts[2].tuned)
    one = study(KMeans(3, center=False), parts[1], parts[2], learn=parts[0], tuned=theirs)
    twice = study(
        KMeans(3, center=False), half[1], parts[2], learn=parts[0], tuned=theirs, settings=Settings(alpha=2.0)
    )
    for form in ("shifted", "global", "another's", "random direction"):
        for name, own in one.recovery.scores[form].items():
            np.testing.assert_allclose(own, twice.recovery.scores[form][name], atol=1e-4)


def test_refusals() -> None:
    """No dictionary; too few rows; rows that are not in pairs in either part; rows without a sample."""
    rows, sample = _noise(0)
    learn, shift, measure = _parts(rows, rows + 1, sample)
    with pytest.raises(NotFittedError):
        study(KMeans(3), shift, measure)
    with pytest.raises(NotFittedError):
        study(KMeans(3), shift, measure, learn=learn, tuned=KMeans(3))
    with pytest.raises(BadInputError, match="number of rows, 30"):
        study(KMeans(31), shift, measure, learn=learn)
    fitted = KMeans(3).fit(rows)
    for parts in (
        (replace(shift, tuned=shift.tuned[:-1]), measure),
        (shift, replace(measure, tuned=measure.tuned[1:])),
    ):
        with pytest.raises(BadInputError, match="not in pairs"):
            study(fitted, *parts)
    with pytest.raises(BadInputError, match="not finite"):
        study(fitted, shift, replace(measure, tuned=measure.tuned * torch.inf))
    with pytest.raises(BadInputError, match="give one number per row"):
        Part(rows, rows, sample[1:])


def test_concepts_are_placed_by_the_parts_that_are_told() -> None:
    """The original's by the part `shift`, the fine-tuned model's by `measure`; held-out rows are those of `measure`."""
    rows, sample = _noise(0)
    learn, shift, measure = _parts(rows, rows + _drawn(1, *rows.shape), sample)
    made = study(KMeans(3), shift, measure, learn=learn)
    fitted = KMeans(3).fit(learn.original)
    assert torch.equal(made.original.sizes, Concepts.of(fitted, shift.original).sizes)
    assert torch.equal(made.tuned.sizes, Concepts.of(KMeans(3).fit(measure.tuned), measure.tuned).sizes)
    held = torch.bincount(main_concept(fitted.transform(measure.original)), minlength=3)
    assert made.recovery.held_out.tolist() == held.tolist()
    assert made.recovery.counts.tolist() == torch.bincount(made.original.main, minlength=3).tolist()
