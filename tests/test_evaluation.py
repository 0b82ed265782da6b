"""The table of metrics: every score is that of the function it comes from; what is lacking is named with the remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from concept_dict.answer_rows import stored_rows
from concept_dict.clip_score import WordScore
from concept_dict.dictionary import ConceptDictionary
from concept_dict.evaluation import METRICS, NEEDS, available, evaluate
from concept_dict.evidence import Evidence, Samples
from concept_dict.grounding import top_words
from concept_dict.metrics import pool_samples
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from hooked_mm.errors import BadInputError
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, ScenesDataModule
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.selectors import TokenOfInterest

HOOK = "blocks.5.hook_resid_post"
WORDS = tuple(word for name in DESCRIBED for word in WORD_CLASSES[name])


@pytest.fixture(scope="module")
def made(llava: HookedMM, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConceptDictionary, Evidence]:
    """A small dictionary of the small LLaVA with all evidence but CLIP and BERT."""
    path, extractor = tmp_path_factory.mktemp("e"), Extractor(llava, HOOK, TokenOfInterest(WORDS), answer="given")
    stores = [extract(extractor, ScenesDataModule(70, seed=seed, style="full"), path / str(seed)) for seed in (0, 1)]
    fits = [NonNegativeDictionary(16, random_state=seed).fit(stores[0].activations(HOOK)) for seed in (0, 1)]
    data = SceneDataset(70, seed=1, style="full")
    rows = list(stored_rows(llava, stores[1], lambda number: data[number].images, samples=8))
    held = Samples.of(stores[1], HOOK, images=[data[number].images for number in range(70)])  # type: ignore[misc]
    evidence = Evidence(
        held,
        fitted=Samples.of(stores[0], HOOK),
        words=[[word.text for word in found] for found in top_words(llava, fits[0].components_)],
        runs=[fitted.components_ for fitted in fits],
        model=llava,
        answers=rows,
        steps=(0, 2, 5),
    )
    return ConceptDictionary(fits[0], HOOK, stores[0].made_by), evidence


@pytest.fixture(scope="module")
def scores(made: tuple[ConceptDictionary, Evidence]) -> dict[str, Any]:
    """All that can be had of it."""
    return evaluate(*made)


def test_all_that_is_available_is_measured(made: Any, scores: dict[str, Any]) -> None:
    """Without CLIP and BERT everything else; each score is a number or an array, numbers finite."""
    assert available(made[1]) == [name for name in METRICS if name not in ("clip_score", "bert_score")]
    assert {name.split("/")[0] for name in scores} == set(available(made[1]))
    for name, value in scores.items():
        assert isinstance(value, float | np.ndarray), name
        assert not isinstance(value, float) or np.isfinite(value), name


def test_concepts_beat_their_baselines(scores: dict[str, Any]) -> None:
    """On the small LLaVA every metric says more of a learnt dictionary than of a random one, or of chance."""
    for better, worse in [
        ("concepts/auroc", "concepts/auroc_shuffled"),
        ("facts/auroc", "facts/auroc_random"),
        ("facts/auroc_random", "facts/auroc_shuffled"),
        ("f1/f1", "f1/f1_random"),
        ("f1/f1", "f1/f1_shuffled"),
        ("naming/share", "naming/share_shuffled"),
        ("reconstruction/variance_explained", "reconstruction/variance_explained_random"),
        ("stability/cosine", "stability/cosine_random"),
        ("faithfulness/delete_random_order", "faithfulness/delete"),
        ("faithfulness/insert", "faithfulness/insert_random_dictionary"),
    ]:
        assert scores[better] > scores[worse] + 0.02, (better, scores[better], scores[worse])
    assert scores["concepts/auroc_shuffled"] == pytest.approx(0.5, abs=0.06)
    assert {f"facts/auroc/{name}" for name in ("colour", "shape", "size", "position", "place")} <= set(scores)


def test_steps_of_faithfulness(scores: dict[str, Any]) -> None:
    """Curves have a value for every number of concepts asked for."""
    assert scores["faithfulness/steps"].tolist() == [0, 2, 5]
    assert len(scores["faithfulness/insert_random_order_curve"]) == 3


def test_scores_recomputed(made: Any, scores: dict[str, Any]) -> None:
    """AUROC and F1 of the best concepts by scikit-learn from the dictionary and the facts alone."""
    dictionary, evidence = made
    sides = [
        pool_samples(dictionary.transform(side.rows), side.sample, side.count)
        for side in (evidence.fitted, evidence.held_out)
    ]
    aurocs, f1s = [], []
    for place, fact in enumerate(scores["facts/fact"]):
        concept = scores["facts/best_concept"][place]
        if concept < 0:
            continue
        first, second = ([fact in found for found in side.facts] for side in (evidence.fitted, evidence.held_out))
        aurocs.append(roc_auc_score(second, sides[1][:, concept]))
        assert scores["facts/auroc_of_facts"][place] == pytest.approx(aurocs[-1], abs=1e-9)
        values = np.unique(sides[0][:, concept].astype(float))
        cuts = np.array([-np.inf, *(values[1:] / 2 + values[:-1] / 2)])
        said, true = sides[0][:, [concept]] > cuts, np.array(first)[:, None]
        best = 2 * (said & true).sum(axis=0) / (said.sum(axis=0) + true.sum())
        cut = cuts[np.flatnonzero(best > best.max() - 1e-12)[-1]]
        f1s.append(f1_score(second, sides[1][:, concept] > cut))
    assert scores["facts/auroc"] == pytest.approx(np.mean(aurocs), abs=1e-9)
    assert scores["f1/f1"] == pytest.approx(np.mean(f1s), abs=1e-9)


def test_only_what_is_asked_for(made: Any) -> None:
    """In the order asked for, with the same numbers as among others."""
    found = evaluate(*made, metrics=["stability", "reconstruction"])
    assert list(dict.fromkeys(name.split("/")[0] for name in found)) == ["stability", "reconstruction"]
    assert evaluate(*made, metrics=[]) == {}


@pytest.mark.parametrize(
    ("metric", "lacking", "remedy"),
    [
        ("overlap_words", {"words": None}, "needs words of the concepts; give words"),
        ("naming", {"words": None}, "needs words of the concepts; give words"),
        ("stability", {"runs": None}, "needs concepts of at least two fits with other seeds; give runs"),
        ("facts", {"fitted": None}, "needs facts of the samples .*give fitted and held_out with facts"),
        ("clip_score", {}, "needs a CLIP; give clip, the folder"),
        ("bert_score", {}, "needs a BERT; give bert, the folder"),
        ("faithfulness", {"model": None}, "needs the model itself; give model"),
        ("faithfulness", {"answers": None}, "needs positions that predict an answer; give answers"),
    ],
)
def test_what_is_lacking_is_named(made: Any, metric: str, lacking: dict[str, Any], remedy: str) -> None:
    """The metric, what it needs, and the remedy; nothing is computed before."""
    evidence = replace(made[1], **lacking)
    assert metric not in available(evidence)
    with pytest.raises(BadInputError, match=f"the metric '{metric}' {remedy}"):
        evaluate(made[0], evidence, metrics=["reconstruction", metric])


def test_captions_and_pictures_are_needed(made: Any) -> None:
    """Of the held-out samples."""
    bare = replace(made[1], clip="c", bert="b", held_out=replace(made[1].held_out, captions=None, images=None))
    with pytest.raises(BadInputError, match="'clip_score' needs pictures of the held-out samples; give images"):
        evaluate(made[0], bare, metrics=["clip_score"])
    with pytest.raises(BadInputError, match="'bert_score' needs captions of the held-out samples; give captions"):
        evaluate(made[0], bare, metrics=["bert_score"])
    with pytest.raises(BadInputError, match="no metric 'stabilty'; nearest: stability"):
        evaluate(made[0], bare, metrics=["stabilty"])
    with pytest.raises(BadInputError, match="3 lists of words for 16 concepts"):
        evaluate(made[0], replace(bare, words=[["a"]] * 3), metrics=["overlap_words"])


def test_word_scores_are_handed_on(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIPScore and BERTScore get the held-out pictures, captions, activations and the words."""
    calls: dict[str, tuple] = {}

    def score(name: str) -> Any:
        def fake(*given: Any, **options: Any) -> dict[int, WordScore]:
            calls[name] = (*given, options)
            return {1: WordScore(np.array([0.5, np.nan]), np.array([0.25, np.nan]))}

        return fake

    for name, loader in (("clip_score", "ClipEncoder"), ("bert_score", "BertScorer")):
        monkeypatch.setattr(f"concept_dict.evaluation.{name}", score(name))
        monkeypatch.setattr(f"concept_dict.evaluation.{loader}", type(loader, (), {"__init__": lambda s, f: None}))
    evidence = replace(made[1], clip="c", bert="b", vocabulary=["x"], seed=5)
    found = evaluate(made[0], evidence, metrics=["clip_score", "bert_score"])
    for name in calls:
        assert [found[f"{name}/{part}"] for part in ("top1", "top1_random", "top1_unscored")] == [0.5, 0.25, 1.0]
        _, given, pooled, words, options = calls[name]
        held = evidence.held_out
        assert given is (held.images if name == "clip_score" else held.captions)
        assert pooled.shape == (70, 16)
        assert words is evidence.words
        assert options == {"vocabulary": ["x"], "seed": 5}
    assert len(calls) == 2


def test_every_need_is_one_of_the_table() -> None:
    """No metric needs what nobody could say how to get."""
    assert {need for metric in METRICS.values() for need in metric.needs} == set(NEEDS)


def test_signed_activations_want_words_for_both_ends(made: Any) -> None:
    """A signed dictionary is scored with 2k concepts, and says so where words are too few."""

    class Signed(NonNegativeDictionary):
        def transform(self, X: Any) -> torch.Tensor:
            return (X.float() - self.mean_) @ self.components_.T

    signed = Signed(16)
    signed.components_, signed.mean_ = made[0].concepts, made[0].decomposition.mean_
    dictionary = ConceptDictionary(signed, HOOK)
    with pytest.raises(BadInputError, match=r"16 lists of words for 32 concepts \(both ends of each"):
        evaluate(dictionary, made[1], metrics=["naming"])
    found = evaluate(
        dictionary, replace(made[1], words=[*made[1].words, *made[1].words]), metrics=["naming", "concepts"]
    )
    assert len(found["concepts/auroc_of_concepts"]) == 32
