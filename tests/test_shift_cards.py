"""What cards of a shift say is what was scored: words, samples, numbers, and the concepts that have no card."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from concept_dict.kmeans import KMeans
from concept_dict.pca import PCA
from concept_dict.recovery import along, top_by_direction
from concept_dict.shift_cards import ShiftReport, build_report
from concept_dict.shift_study import Part, ShiftStudy, study
from hooked_mm.errors import BadInputError
from tests.shifts import SAMPLES, decode, made_up, part, told, with_enough

TEXTS = tuple([f"{name} {number}" for number in range(SAMPLES)] for name in ("before", "after"))


@pytest.fixture(scope="module")
def made() -> tuple[ShiftStudy, Part]:
    """Of k-means with four concepts."""
    return made_up()


def _report(study: ShiftStudy, measure: Part) -> ShiftReport:
    return build_report(study, measure, decoders=(decode, decode), texts=TEXTS, count=3)


def test_samples_are_those_that_were_scored(made: tuple[ShiftStudy, Part]) -> None:
    """Overlaps counted again from the cards' samples are those of the study, of either form of every concept."""
    study, measure = made
    for card in _report(study, measure).cards:
        original, shifted, tuned = ({s.text.split()[1] for s in form.samples} for form in card.forms)
        scores = study.recovery.scores
        assert len(original & tuned) / 3 == pytest.approx(scores["unshifted"]["samples"][card.index])
        assert len(shifted & tuned) / 3 == pytest.approx(scores["shifted"]["samples"][card.index])


def test_words_are_those_that_were_scored(made: tuple[ShiftStudy, Part]) -> None:
    """The same of words; those of the fine-tuned form are marked in the others."""
    study, measure = made
    for card in _report(study, measure).cards:
        original, shifted, tuned = ({word.text for word in form.words} for form in card.forms)
        scores = study.recovery.scores
        assert len(original & tuned) / 3 == pytest.approx(scores["unshifted"]["words"][card.index])
        assert len(shifted & tuned) / 3 == pytest.approx(scores["shifted"]["words"][card.index])
        assert [form.shared for form in card.forms] == [tuned, tuned, frozenset()]


def test_how_far_samples_lie_by_hand(made: tuple[ShiftStudy, Part]) -> None:
    """In float64: the farthest row of the first sample from the mean of its model, with what that model said."""
    study, measure = made
    card = _report(study, measure).cards[0]
    first = card.forms[1].samples[0]
    assert first.text.startswith("after ")
    direction = (study.original.points[0] + study.shifts.vectors[0] - study.tuned.mean).double()
    mine = measure.tuned[measure.sample == int(first.text.split()[1])].double()
    far = (mine - study.tuned.mean.double()) @ (direction / direction.norm())
    assert first.activation == pytest.approx(float(far.max()), rel=1e-5)
    assert card.forms[0].samples[0].text.startswith("before ")


def test_numbers(made: tuple[ShiftStudy, Part]) -> None:
    """Of scores that are easy to count with; a concept without a partner has two forms and no scores."""
    known = with_enough(replace(made[0], recovery=told(made[0])), 20)
    cards = _report(known, made[1]).cards
    first = dict(cards[0].numbers)
    assert (first["rows"], first["held-out rows"], first["cosine"]) == ("30", "20", "0.100 → 0.500")
    assert (first["T-overlap"], first["distance"]) == ("0.100 → 0.500", "0.100 → 0.500")
    assert first["partner"] == f"2, {known.fates.fate[2]}"
    assert "in means" not in first
    assert "fewer than 20 rows" in dict(cards[2].numbers)["in means"]
    last = cards[3]
    assert [form.name for form in last.forms] == ["original", "shifted"]
    assert dict(last.numbers)["partner"] == "none"
    assert "cosine" not in dict(last.numbers)
    assert last.title == f"concept 3: {', '.join(word.text for word in last.forms[0].words)}"


def test_cosines_of_rows(made: tuple[ShiftStudy, Part]) -> None:
    """Of each held-out row's movement with its concept's shift, one by one in float64."""
    study, measure = made
    main = study.fitted.transform(measure.original).argmax(dim=1)
    for card in _report(study, measure).cards:
        moved = (measure.tuned - measure.original)[main == card.index].double()
        vector = study.shifts.vectors[card.index].double()
        expected = [float(row @ vector / row.norm() / vector.norm()) for row in moved]
        assert card.cosines == pytest.approx(expected, abs=1e-5)


def test_concepts_without_rows_are_listed() -> None:
    """They have no card."""
    report = _report(*made_up(empty=True))
    assert report.empty == ["0"]
    assert [card.label for card in report.cards] == ["1", "2", "3"]
    assert report.names is not None
    assert report.names[0] == ""


def test_new_and_lost(made: tuple[ShiftStudy, Part]) -> None:
    """New ones, ones that are no concept's partner, and lost ones, with words of the model that has them."""
    found, measure = made
    fates = replace(
        found.fates, fate=["new", "kept", "kept", "specialised"], lost=[1], cosine=np.array([0.25, 1, 1, 1])
    )
    # Partners are 2, 0 and 1: 3 is nobody's.
    report = _report(replace(found, recovery=told(found), fates=fates), measure)
    assert [(one.label, one.why.split(";")[0]) for one in report.new] == [
        ("0", "new"),
        ("3", "specialised, no partner"),
    ]
    assert report.new[0].why.endswith("cosine 0.250")
    assert [one.words for one in report.new] == decode(found.tuned.vectors[[0, 3]])
    assert [(one.label, one.words) for one in report.lost] == [("1", decode(found.original.vectors[[1]])[0])]


def test_both_ends_of_a_signed_method() -> None:
    """Cards by the names of the ends; those without rows are listed."""
    report = _report(*made_up(PCA(2)))
    assert {card.label for card in report.cards} | {*report.empty} == {"0 +", "1 +", "0 −", "1 −"}
    assert report.settings["method"] == "PCA"


def test_identical_models() -> None:
    """Cards as ever; the shift of every row is 0, and so is its cosine."""
    report = _report(*made_up(same=True))
    assert len(report.cards) == 4
    assert all((card.cosines == 0).all() for card in report.cards)
    assert all(dict(card.numbers)["magnitude"] == "0.000" for card in report.cards)


def test_fewer_concepts_in_the_fine_tuned_model() -> None:
    """Those that are left over have no partner, and their cards say so."""
    parts = [part(seed) for seed in (1, 2, 3)]
    tuned = KMeans(2, random_state=0).fit(parts[2].tuned)
    report = build_report(study(KMeans(4, random_state=0), parts[1], parts[2], learn=parts[0], tuned=tuned), parts[2])
    assert sorted(len(card.forms) for card in report.cards) == [2, 2, 3, 3]
    assert sum("no partner" in dict(card.numbers).get("in means", "") for card in report.cards) >= 2


def test_pictures_and_texts(made: tuple[ShiftStudy, Part]) -> None:
    """The first picture of a sample, by its number; without words, pictures and texts cards have what there is."""
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    report = build_report(*made, pictures=lambda number: [first, second] if number % 2 else [])
    for card in report.cards:
        for form in card.forms:
            assert form.words == []
            for sample in form.samples:
                assert (sample.image is first) == bool(int(sample.text.removeprefix("sample ")) % 2)
    assert report.cards[0].title == "concept 0"
    assert report.names is None
    with pytest.raises(BadInputError, match=r"count=0"):
        build_report(*made, count=0)
    with pytest.raises(BadInputError, match="29 texts of the fine-tuned model, but rows of sample 29"):
        build_report(*made, texts=(TEXTS[0], TEXTS[1][:-1]))


def test_settings_and_facts(made: tuple[ShiftStudy, Part]) -> None:
    """What runs compare by, and what stands on top: what is not known is left out."""
    report = build_report(*made, hook="blocks.1", models=("a", "b"), facts=[("own", "fact")])
    expected = {"method": "KMeans", "k": 4, "alpha": 1.0, "average": "mean", "hook": "blocks.1", "fine-tuned": "b"}
    assert expected.items() <= report.settings.items()
    assert ("representations", "blocks.1") in report.facts
    assert report.facts[-1] == ("own", "fact")
    assert "representations" not in dict(build_report(*made).facts)
    assert (
        dict(report.facts)["rows"]
        == "60 to shift by (0 more activate no concept), 60 of other samples (30) to measure on"
    )


def test_samples_without_rows_are_nowhere() -> None:
    """Where numbers of samples have gaps, no sample without rows is among the most activating, whatever the sign."""
    rows, sample = -torch.eye(3) - 1, np.array([7, 2, 7])
    present, pooled = along(torch.tensor([[2.0, 0, 0]]), rows, sample)
    assert present.tolist() == [2, 7]
    assert pooled[:, 0].tolist() == [-1, -1]
    rows[1, 0] = -0.5
    assert top_by_direction(normalize(torch.ones(1, 3)), rows, sample, 10) == [[2, 7]]
