"""Grounding on a store: samples, activations, facts and maps are those of the store and of a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from concept_dict.answer_rows import sample_batch
from concept_dict.dictionary import ConceptDictionary
from concept_dict.evaluation import evaluate
from concept_dict.evidence import Evidence, Samples
from concept_dict.metrics import pool_samples
from concept_dict.pictures import store_pictures
from concept_dict.report import ground, known_facts, pool_store, settings_of
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import ScenesDataModule
from hooked_mm.scenes.world import COLOURS
from hooked_mm.selectors import EachOf, TokenOfInterest
from hooked_mm.store import ActivationStore
from tests.planted import dictionary

HOOK = "blocks.4.hook_resid_post"


@pytest.fixture(scope="module")
def stores(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> list[ActivationStore]:
    """Where colours are said, of two sets of scenes: captions generated."""
    folder = tmp_path_factory.mktemp("stores")
    extractor = Extractor(llava, HOOK, TokenOfInterest(tuple(COLOURS)))
    return [
        extract(extractor, ScenesDataModule(size, seed=seed, style="full"), folder / str(seed))
        for seed, size in ((0, 40), (1, 30))
    ]


@pytest.fixture(scope="module")
def fitted(stores: list[ActivationStore]) -> ConceptDictionary:
    return ConceptDictionary(
        SemiNMF(4, max_iter=20, random_state=0).fit(stores[0].activations(HOOK)), HOOK, stores[0].made_by
    )


def test_pooling_by_hand(tmp_path: Path) -> None:
    """Largest and smallest per sample with their rows; 0 and no row for a sample without any."""
    rows = [{"sample": name} for name in ("a", "a", "c", "a")]
    values = {"h": np.array([[1.0, -2.0], [3.0, -1.0], [-4.0, 0.5], [2.0, -3.0]])}
    samples = [{"sample": name, "sample_number": n} for n, name in enumerate("abc")]
    store = ActivationStore.from_arrays(tmp_path / "s", values, rows, samples, {})
    found = pool_store(dictionary("h", np.eye(2), signed=True), store)
    assert found.high.tolist() == [[3, -1], [0, 0], [-4, 0.5]]
    assert found.low.tolist() == [[1, -3], [0, 0], [-4, 0.5]]
    # Rows stand in the order of samples: the third of "a" before that of "c".
    assert found.high_row.tolist() == [[1, 1], [-1, -1], [3, 3]]
    assert found.low_row.tolist() == [[0, 2], [-1, -1], [3, 3]]


def test_cards_are_those_of_the_store(
    llava: HookedMM, stores: list[ActivationStore], fitted: ConceptDictionary
) -> None:
    """Samples, their captions and activations recomputed from the store; scores by scikit-learn on the held-out one."""
    report, match = ground(fitted, stores[0], llava, stores[1], count=3, where="none", metrics={"mine": 0.5})
    activations = fitted.transform(stores[0].activations(HOOK)).numpy()
    owner, texts = stores[0].row_samples(), stores[0].samples.column("text").to_pylist()
    assert match is not None
    assert len(report.cards) == 4
    for card in report.cards:
        pooled = [max(activations[owner == s, card.index], default=0) for s in range(40)]
        np.testing.assert_allclose(card.activations, pooled, rtol=1e-6)
        order = np.argsort(-np.array(pooled), kind="stable")[:3]
        assert [sample.text for sample in card.end.samples] == [texts[s] for s in order]
        np.testing.assert_allclose(
            [sample.activation for sample in card.end.samples], np.array(pooled)[order], rtol=1e-6
        )
        assert all(sample.image is not None and sample.where is None for sample in card.end.samples)
        held = fitted.transform(stores[1].activations(HOOK)).numpy()[:, card.index]
        rows, facts = stores[1].row_samples(), stores[1].samples.column("facts").to_pylist()
        scores = [max(held[rows == s], default=0) for s in range(30)]
        assert card.end.held_out == pytest.approx(roc_auc_score([card.end.fact in found for found in facts], scores))
        assert card.other is None
    assert report.metrics["mine"] == 0.5
    assert report.metrics["held-out AUROC"] == pytest.approx(np.mean([card.end.held_out for card in report.cards]))
    assert dict(report.facts)["pictures"] == "scenes, made again"


def test_the_batch_is_made_again(llava: HookedMM, stores: list[ActivationStore]) -> None:
    """Prompt, picture and the generated tokens: at the stored positions, the stored representations."""
    store = stores[0]
    pictures, _ = store_pictures(store)
    assert pictures is not None
    samples = [3, 17, 8]
    batch = sample_batch(llava, store, pictures, samples)
    _, cache = llava.run_with_cache(batch, [HOOK])
    owner, place = store.row_samples(), store.rows.column("position").to_pylist()
    # Answers of other lengths leave padding on the right as well, which does not move a position.
    padding = batch.inputs["attention_mask"].argmax(dim=1)
    checked = 0
    for number, sample in enumerate(samples):
        for row in np.flatnonzero(owner == sample):
            found = cache[HOOK][number, place[row] + int(padding[number])]
            torch.testing.assert_close(found, store.activations(HOOK, np.array([row]))[0], atol=2e-4, rtol=1e-4)
            checked += 1
    assert checked > 2


def test_maps_are_drawn(llava: HookedMM, stores: list[ActivationStore], fitted: ConceptDictionary) -> None:
    """Every sample has its map beside it; rows of text by gradients, unless the positions are asked for."""
    report, _ = ground(fitted, stores[0], llava, count=2)
    assert "depends on every patch" in dict(report.facts)["in the pictures"]
    assert all(sample.where is not None for card in report.cards for sample in card.end.samples)
    asked, _ = ground(fitted, stores[0], llava, count=2, where="positions")
    assert "every image position" in dict(asked.facts)["in the pictures"]
    one, other = (r.cards[0].end.samples[0].where for r in (report, asked))
    assert one is not None
    assert other is not None
    assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() > 20


def test_rows_of_image_positions_are_shown_by_positions(llava: HookedMM, tmp_path: Path) -> None:
    """A dictionary of image positions is drawn by its activations there."""
    extractor = Extractor(llava, HOOK, EachOf(modality="image"), answer="none")
    store = extract(extractor, ScenesDataModule(6), tmp_path / "s")
    made = ConceptDictionary(SemiNMF(3, max_iter=3, random_state=0).fit(store.activations(HOOK)), HOOK, store.made_by)
    report, match = ground(made, store, llava, count=2)
    assert match is None
    assert "every image position" in dict(report.facts)["in the pictures"]
    assert report.cards[0].end.fact is None


def test_signed_concepts_have_two_ends(llava: HookedMM, stores: list[ActivationStore]) -> None:
    """Words of -c_k, the samples of smallest activation with their negative numbers, most negative first; a fact."""
    rows = stores[0].activations(HOOK)
    directions = np.random.default_rng(0).standard_normal((2, 128))
    made = dictionary(HOOK, directions, mean=rows.mean(0).numpy(), signed=True, **stores[0].made_by)
    assert made.signed
    report, match = ground(made, stores[0], llava, stores[1], count=4, where="none")
    turned = dictionary(HOOK, -directions, mean=rows.mean(0).numpy(), signed=True, **stores[0].made_by)
    opposite, _ = ground(turned, stores[0], llava, stores[1], count=4, where="none")
    evidence = Evidence(Samples.of(stores[1], HOOK), fitted=Samples.of(stores[0], HOOK))
    np.testing.assert_array_equal(match.held_out, evaluate(made, evidence, ["concepts"])["concepts/auroc_of_concepts"])
    rows, facts = made.transform(stores[1].activations(HOOK)), stores[1].samples.column("facts").to_pylist()
    for card in report.cards:
        pooled = pool_samples(-rows, stores[1].row_samples(), len(facts))[:, card.index].clip(0)
        assert card.other.held_out == pytest.approx(roc_auc_score([card.other.fact in f for f in facts], pooled))
    for card, mirrored in zip(report.cards, opposite.cards, strict=True):
        assert card.other is not None
        assert (card.other.fact, card.other.held_out) == (mirrored.end.fact, mirrored.end.held_out)
        assert (card.end.fact, card.end.held_out) == (mirrored.other.fact, mirrored.other.held_out)
        assert [word.text for word in card.other.words] == [word.text for word in mirrored.end.words]
        assert [sample.text for sample in card.other.samples] == [sample.text for sample in mirrored.end.samples]
        numbers = [sample.activation for sample in card.other.samples]
        assert numbers == sorted(numbers)
        assert numbers[0] < 0
        assert numbers == [-sample.activation for sample in mirrored.end.samples]


def test_without_pictures_there_are_none(llava: HookedMM, stores: list[ActivationStore], tmp_path: Path) -> None:
    """A store of arrays from elsewhere: words, ids for captions, no pictures, and the report says so."""
    values = {HOOK: stores[0].activations(HOOK, slice(0, 9))}
    rows = [{"sample": f"s{n}"} for n in range(9)]
    store = ActivationStore.from_arrays(tmp_path / "s", values, rows, rows, {})
    made = dictionary(HOOK, np.random.default_rng(0).standard_normal((2, 128)))
    report, _ = ground(made, store, llava, count=9)
    shown = [sample for card in report.cards for sample in card.end.samples]
    assert shown
    assert all(sample.image is None and sample.where is None for sample in shown)
    assert {sample.text for sample in shown} <= {f"s{n}" for n in range(9)}
    assert dict(report.facts)["pictures"].startswith("none: ")
    assert known_facts([store]) is None


def test_settings_tell_runs_apart(stores: list[ActivationStore], fitted: ConceptDictionary) -> None:
    """Method, parameters, hook and rows, as plain values."""
    found = settings_of(fitted, stores[0])
    assert (found["method"], found["k"], found["hook"]) == ("SemiNMF", 4, HOOK)
    assert (found["rows"], found["model"], found["other"]) == (len(stores[0]), "llava", "max_iter=20")
    assert all(isinstance(value, str | bool | int | float) for value in found.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"count": 0}, "count=0"),
        ({"words": 0}, "words=0"),
        ({"where": "auot"}, "no way to say where 'auot'; nearest: auto"),
    ],
)
def test_bad_options(
    options: dict, reason: str, llava: HookedMM, stores: list[ActivationStore], fitted: ConceptDictionary
) -> None:
    """Refused at once."""
    with pytest.raises(BadInputError, match=reason):
        ground(fitted, stores[0], llava, **options)
