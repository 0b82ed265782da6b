"""All scores of a dictionary in one call: a table of metrics, each with what it needs and beside it its baselines.

    evidence = Evidence(Samples.of(held_out_store, hook), fitted=Samples.of(store, hook), words=words)
    evaluate(dictionary, evidence, metrics=["reconstruction", "facts"])

Scores are called `metric/score`, or `metric/score/attribute` for a part of the facts; `_random` behind a score is that
of a random dictionary (or of random words), `_shuffled` that with shuffled labels. Where activations are signed, both
ends of a concept are scored: 2k concepts, the negative ends behind the positive ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concept_dict.bert_score import BertScorer, bert_score
from concept_dict.clip_score import ClipEncoder, WordScore, active_concepts, clip_score, random_words
from concept_dict.dictionary import ConceptDictionary
from concept_dict.evidence import Case, Evidence, Matching
from concept_dict.f1 import F1Match, match_f1
from concept_dict.faithfulness import faithfulness
from concept_dict.metrics import FactMatch, by_attribute, match_facts, naming, random_concepts
from concept_dict.quality import overlap, reconstruction, stability
from hooked_mm.errors import BadInputError, unknown

Scores = dict[str, float | np.ndarray]
TOP_SAMPLES = 5
"""Most activating samples of a concept whose overlap is measured."""


def _reconstruction(case: Case) -> Scores:
    rows = case.evidence.held_out.rows
    found, random = reconstruction(case.fitted, rows), reconstruction(case.random, rows)
    return {
        "relative_error": found.relative_error,
        "relative_error_random": random.relative_error,
        "variance_explained": found.variance_explained,
        "variance_explained_random": random.variance_explained,
        "sparsity": found.sparsity,
        "dead": float(len(found.dead)),
        "dead_concepts": found.dead,
    }


def _overlap_samples(case: Case) -> Scores:
    sides = {"samples": case.pooled, "samples_random": case.pooled_random}
    return {name: overlap(active_concepts(pooled.T, TOP_SAMPLES)) for name, pooled in sides.items()}


def _overlap_words(case: Case) -> Scores:
    words = _words(case)
    options = [word for own in words for word in own] if case.evidence.vocabulary is None else case.evidence.vocabulary
    return {"words": overlap(words), "words_random": overlap(random_words(words, options, seed=case.evidence.seed))}


def _stability(case: Case) -> Scores:
    runs = case.evidence.runs or ()
    random = [
        random_concepts(run.shape[0], run.shape[1], case.evidence.seed + number) for number, run in enumerate(runs)
    ]
    return {
        "cosine": stability(runs, signed=case.signed),
        "cosine_random": stability(random, signed=case.signed),
    }


def _concepts(case: Case) -> Scores:
    match, random = case.match, match_facts(*case.matching_random, shuffles=1, seed=case.evidence.seed)
    facts = [case.facts[fact] for fact in match.fact]
    return {
        "auroc": float(match.held_out.mean()),
        "auroc_shuffled": float(match.shuffled.mean()),
        "auroc_random": float(random.held_out.mean()),
        "different_facts": float(len(set(facts))),
        "different_facts_random": float(len(set(random.fact.tolist()))),
        **{f"auroc/{name}": value for name, value in by_attribute(facts, match.held_out).items()},
        "best_fact": np.array(facts),
        "auroc_of_concepts": match.held_out,
    }


def _facts(case: Case) -> Scores:
    match, random = case.fact_match, case.fact_match_random
    return {
        "auroc": float(np.nanmean(match.held_out)),
        "auroc_shuffled": float(np.nanmean(match.shuffled)),
        "auroc_random": float(np.nanmean(random.held_out)),
        **{f"auroc/{name}": value for name, value in by_attribute(case.facts, match.held_out).items()},
        **{f"auroc_random/{name}": value for name, value in by_attribute(case.facts, random.held_out).items()},
        "fact": np.array(case.facts),
        "best_concept": match.concept,
        "auroc_of_facts": match.held_out,
    }


def _f1(case: Case) -> Scores:
    def score(parts: Matching, match: FactMatch, shuffles: int) -> F1Match:
        return match_f1(*parts, match.concept[pairs], pairs, shuffles=shuffles, seed=case.evidence.seed)

    # Which facts can be scored does not depend on the dictionary.
    pairs = np.flatnonzero(case.fact_match.concept >= 0)
    facts = [case.facts[fact] for fact in pairs]
    found, random = score(case.matching, case.fact_match, 10), score(case.matching_random, case.fact_match_random, 1)
    return {
        "f1": float(found.held_out.mean()),
        "f1_shuffled": float(found.shuffled.mean()),
        "f1_random": float(random.held_out.mean()),
        **{f"f1/{name}": value for name, value in by_attribute(facts, found.held_out).items()},
        **{f"f1_shuffled/{name}": value for name, value in by_attribute(facts, found.shuffled).items()},
    }


def _naming(case: Case) -> Scores:
    facts = [case.facts[fact] for fact in case.match.fact]
    found = naming(_words(case), facts)
    parts = {f"share/{name}": value for name, value in by_attribute(facts, found.named.astype(float)).items()}
    return {"share": found.share, "share_shuffled": found.chance, **parts}


def _words(case: Case) -> Sequence[Sequence[str]]:
    """The words, one list for each concept that is scored."""
    words, count = case.evidence.words or (), case.pooled.shape[1]
    if len(words) != count:
        ends = " (both ends of each, since activations are signed)" if case.signed else ""
        raise BadInputError(f"{len(words)} lists of words for {count} concepts{ends}; give one for each")
    return words


def _word_scores(found: dict[int, WordScore]) -> Scores:
    return {
        name: value
        for count, score in found.items()
        for name, value in (
            (f"top{count}", score.mean),
            (f"top{count}_random", score.random_mean),
            (f"top{count}_unscored", float(np.isnan(score.samples).sum())),
        )
    }


def _clip_score(case: Case) -> Scores:
    evidence, clip = case.evidence, case.evidence.clip
    assert clip is not None  # it is among the needs
    assert evidence.held_out.images is not None
    encoder = clip if isinstance(clip, ClipEncoder) else ClipEncoder(clip)
    options: Any = {"vocabulary": evidence.vocabulary, "seed": evidence.seed}
    return _word_scores(clip_score(encoder, evidence.held_out.images, case.pooled, _words(case), **options))


def _bert_score(case: Case) -> Scores:
    evidence, bert = case.evidence, case.evidence.bert
    assert bert is not None  # it is among the needs
    assert evidence.held_out.captions is not None
    scorer = bert if isinstance(bert, BertScorer) else BertScorer(bert)
    options: Any = {"vocabulary": evidence.vocabulary, "seed": evidence.seed}
    return _word_scores(bert_score(scorer, evidence.held_out.captions, case.pooled, _words(case), **options))


def _faithfulness(case: Case) -> Scores:
    evidence = case.evidence
    assert evidence.model is not None  # it is among the needs
    assert evidence.answers is not None
    found = faithfulness(
        evidence.model,
        case.dictionary.hook,
        case.fitted,
        evidence.answers,
        steps=evidence.steps,
        signed=case.signed,
        seed=evidence.seed,
    )
    return {
        **{name: curve.area for name, curve in found.items()},
        **{f"{name}_curve": curve.mean for name, curve in found.items()},
        "steps": found["delete"].steps,
        "positions": float(len(found["delete"].own)),
    }


@dataclass(frozen=True)
class Metric:
    """A function to scores, and what of `NEEDS` it can't do without."""

    function: Callable[[Case], Scores]
    needs: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    "reconstruction": Metric(_reconstruction),
    "overlap_samples": Metric(_overlap_samples),
    "overlap_words": Metric(_overlap_words, ("words",)),
    "stability": Metric(_stability, ("runs",)),
    "concepts": Metric(_concepts, ("facts",)),
    "facts": Metric(_facts, ("facts",)),
    "f1": Metric(_f1, ("facts",)),
    "naming": Metric(_naming, ("facts", "words")),
    "clip_score": Metric(_clip_score, ("words", "images", "clip")),
    "bert_score": Metric(_bert_score, ("words", "captions", "bert")),
    "faithfulness": Metric(_faithfulness, ("model", "answers")),
}
"""What can be measured: add a metric here."""


@dataclass(frozen=True)
class Need:
    """What a metric needs: whether the evidence has it, and where to get it."""

    there: Callable[[Evidence], bool]
    remedy: str


NEEDS: dict[str, Need] = {
    "words": Need(lambda e: e.words is not None, "words of the concepts; give words (see grounding.top_words)"),
    "runs": Need(
        lambda e: e.runs is not None and len(e.runs) > 1,
        "concepts of at least two fits with other seeds; give runs",
    ),
    "facts": Need(
        lambda e: e.fitted is not None and e.fitted.facts is not None and e.held_out.facts is not None,
        "facts of the samples that choose and of held-out ones; give fitted and held_out with facts (a store's column "
        "`facts`, lists of attribute=value)",
    ),
    "images": Need(lambda e: e.held_out.images is not None, "pictures of the held-out samples; give images"),
    "captions": Need(lambda e: e.held_out.captions is not None, "captions of the held-out samples; give captions"),
    "clip": Need(lambda e: e.clip is not None, "a CLIP; give clip, the folder of a local one"),
    "bert": Need(lambda e: e.bert is not None, "a BERT; give bert, the folder of a local one"),
    "model": Need(lambda e: e.model is not None, "the model itself; give model"),
    "answers": Need(
        lambda e: e.answers is not None, "positions that predict an answer; give answers (see answer_rows.stored_rows)"
    ),
}


def available(evidence: Evidence) -> list[str]:
    """The metrics for which the evidence has all that they need."""
    return [name for name, metric in METRICS.items() if all(NEEDS[need].there(evidence) for need in metric.needs)]


def evaluate(dictionary: ConceptDictionary, evidence: Evidence, metrics: Sequence[str] | None = None) -> Scores:
    """Scores of a dictionary.

    Args:
        dictionary: Fitted.
        evidence: What to score it with.
        metrics: Names of `METRICS`; all that are `available` unless given.

    Returns:
        `metric/score` -> a number, or an array (per concept, per fact, per step).

    Raises:
        BadInputError: For a metric that does not exist, or needs what the evidence lacks; before any is computed.
    """
    names = available(evidence) if metrics is None else list(metrics)
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        for need in METRICS[name].needs:
            if not NEEDS[need].there(evidence):
                raise BadInputError(f"the metric {name!r} needs {NEEDS[need].remedy}")
    case = Case(dictionary, evidence)
    return {f"{name}/{score}": value for name in names for score, value in METRICS[name].function(case).items()}
