"""Grounding of a dictionary on a store: words, samples, where in the picture, and facts where they are known."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from concept_dict.answer_rows import sample_batch
from concept_dict.cards import CardSample, ConceptCard, End, Report
from concept_dict.dictionary import ConceptDictionary
from concept_dict.grounding import STOPWORDS, top_samples, top_words
from concept_dict.metrics import Match, fact_table, match_facts
from concept_dict.pictures import Pictures, store_pictures
from concept_dict.run_table import Setting, method_settings
from concept_dict.where import WhereMap, best_way, patch_activations, patch_gradients, where_map
from hooked_mm.batch import count_positions
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM
from hooked_mm.store import ActivationStore
from hooked_mm.unembedding import Unembedding

How = Literal["auto", "positions", "gradient", "none"]
ROWS = 65_536
BATCH = 32


@dataclass(frozen=True)
class Pooled:
    """Per sample and concept the largest and the smallest activation over the sample's rows, and which rows these are.

    0 and row -1 for a sample without rows.
    """

    high: Float[np.ndarray, "samples k"]
    low: Float[np.ndarray, "samples k"]
    high_row: Int[np.ndarray, "samples k"]
    low_row: Int[np.ndarray, "samples k"]

    def scores(self, signed: bool) -> Float[np.ndarray, "samples e"]:
        """What facts are matched with: activations, of signed ones both ends (2k, see `metrics.poles`)."""
        return np.concatenate([self.high.clip(0), (-self.low).clip(0)], axis=1) if signed else self.high


def pool_store(dictionary: ConceptDictionary, store: ActivationStore) -> Pooled:
    """Activations of a store's rows, gathered by sample; reads the store piece by piece.

    Raises:
        UnknownHookError: If the store does not hold the dictionary's hook.
    """
    count, k = store.samples.num_rows, len(dictionary.concepts)
    owner = store.row_samples()
    high, low = np.full((count, k), -np.inf, np.float32), np.full((count, k), np.inf, np.float32)
    rows = np.full((2, count, k), -1)
    for part, values in store.batches(dictionary.hook, ROWS):
        activations = dictionary.transform(values[dictionary.hook].float()).cpu().numpy()
        for row, sample, found in zip(part, owner[part], activations, strict=True):
            more, less = found > high[sample], found < low[sample]
            high[sample, more], rows[0, sample, more] = found[more], row
            low[sample, less], rows[1, sample, less] = found[less], row
    return Pooled(np.where(np.isneginf(high), 0, high), np.where(np.isposinf(low), 0, low), rows[0], rows[1])


def known_facts(stores: Sequence[ActivationStore]) -> tuple[list[str], list[Bool[np.ndarray, "samples facts"]]] | None:
    """The names of all facts in the stores' columns `facts`, sorted, and per store which hold; None without them."""
    if not all("facts" in store.samples.column_names for store in stores):
        return None
    lists = [store.samples.column("facts").to_pylist() for store in stores]
    names = sorted({fact for facts in lists for found in facts for fact in found or ()})
    return names, [fact_table([found or () for found in facts], names) for facts in lists]


@dataclass(frozen=True)
class _Shown:
    """A sample of a card: its concept, its end, its activation and its row in the store."""

    concept: int
    sample: int
    row: int
    activation: float


def _chosen(pooled: Pooled, count: int, signed: bool) -> dict[tuple[int, bool], list[_Shown]]:
    """Per concept and end (True: the negative one) the samples to show, strongest first."""
    found = {}
    for negative in (False, True)[: 1 + signed]:
        values, rows = (-pooled.low, pooled.low_row) if negative else (pooled.high, pooled.high_row)
        sign = -1 if negative else 1
        for k, samples in enumerate(top_samples(values, count)):
            found[k, negative] = [_Shown(k, s, int(rows[s, k]), sign * float(values[s, k])) for s in samples]
    return found


def find_where(
    dictionary: ConceptDictionary,
    model: HookedMM,
    store: ActivationStore,
    pictures: Pictures,
    shown: Sequence[_Shown],
    how: How = "auto",
) -> tuple[dict[tuple[int, int], WhereMap], str]:
    """Where in its first picture each shown sample has the concept.

    Args:
        dictionary: The concepts.
        model: The model they are of.
        store: The samples.
        pictures: Their pictures.
        shown: Which (concept, sample) are wanted.
        how: `positions`, `gradient`, or `auto`: the first where the store's rows are of image positions that have a
            place in the picture, else the second (see `where.best_way`).

    Returns:
        (concept, sample) -> map, and what the maps are. Rows that are means over several positions have no gradient.
    """
    modality, place = (store.rows.column(name).to_pylist() for name in ("modality", "position"))
    wanted: dict[int, list[_Shown]] = {}
    for item in shown:
        wanted.setdefault(item.sample, []).append(item)
    found: dict[tuple[int, int], WhereMap] = {}
    samples = [sample for sample in wanted if pictures(sample)]
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        batch = sample_batch(model, store, pictures, part, "none" if how == "positions" else "read")
        if how == "auto":
            at_image = all(modality[item.row] == "image" for item in shown)
            how = best_way(batch, at_image)
            if how == "none":
                break
        images = [pictures(sample)[0] for sample in part]
        pairs = [(n, item) for n, sample in enumerate(part) for item in wanted[sample]]
        if how == "positions":
            layer = model.hook_points[dictionary.hook].layer
            with torch.no_grad():
                _, cache = model.run_with_cache(batch, [dictionary.hook], None if layer is None else layer + 1)
            grids = [
                patch_activations(dictionary.decomposition, cache, dictionary.hook, n)[0] for n in range(len(part))
            ]
            maps = [grids[n][..., item.concept] for n, item in pairs]
        else:
            pairs = [(n, item) for n, item in pairs if place[item.row] is not None]
            own = count_positions(batch.inputs["attention_mask"]).masked_fill(batch.inputs["attention_mask"] == 0, -1)
            at = [(n, (own[n] == place[item.row]).nonzero()[:, 0].tolist(), item.concept) for n, item in pairs]
            maps = [grid[0] for grid in patch_gradients(dictionary.decomposition, model, batch, dictionary.hook, at)]
        for (n, item), values in zip(pairs, maps, strict=True):
            found[item.concept, item.sample] = where_map(model, images[n], values)
    return found, how if found else "none"


HOW = {
    "positions": "the concept's activation at every image position",
    "gradient": "how much the concept's activation depends on every patch, to first order",
    "none": "not looked for, or this model has no patches with a place",
}


def ground(
    dictionary: ConceptDictionary,
    store: ActivationStore,
    model: HookedMM | Unembedding,
    held_out: ActivationStore | None = None,
    *,
    title: str | None = None,
    facts: Sequence[tuple[str, str]] = (),
    metrics: Mapping[str, float] | None = None,
    count: int = 6,
    words: int = 5,
    stopwords: Collection[str] = STOPWORDS,
    vocabulary: Collection[str] | None = None,
    where: How = "auto",
    seed: int = 0,
) -> tuple[Report, Match | None]:
    """Everything a person wants to see of a dictionary.

    Args:
        dictionary: The concepts.
        store: Samples to show them by; if they have facts, each concept's best fact is chosen on these.
        model: The model they are of; without a look into pictures its unembedding will do.
        held_out: Other samples, on which the best fact is scored.
        title: Of the report.
        facts: (name, value) pairs to show on top of its own.
        metrics: Scores of the dictionary to show.
        count: Samples per concept and end.
        words: Words per concept and end.
        stopwords: Words to leave out.
        vocabulary: The only words to name; all unless given.
        where: How to find the concept in the picture, see `find_where`; `none` leaves it out.
        seed: Of the shuffled labels.

    Returns:
        The report, and the match with facts if these are known in both stores: of every concept or, where activations
        are signed, of every end, the negative ones behind the positive.

    Raises:
        UnknownHookError: If a store does not hold the dictionary's hook.
        BadInputError: If counts are not positive, `where` is unknown, or a picture is missing or broken.
    """
    if where not in ("auto", "positions", "gradient", "none"):
        raise unknown("way to say where", where, ("auto", "positions", "gradient", "none"))
    if count < 1 or words < 1:
        raise BadInputError(f"count={count}, words={words}: both must be at least 1")
    signed = dictionary.signed
    pooled = pool_store(dictionary, store)
    chosen = _chosen(pooled, count, signed)
    pictures, source = store_pictures(store)
    maps: dict[tuple[int, int], WhereMap] = {}
    how: str = "none"
    if pictures is not None and where != "none":
        if isinstance(model, Unembedding):
            raise BadInputError(
                f"where={where!r} looks into pictures, which an unembedding alone can't; pass where='none', or the "
                "whole model"
            )
        shown = [item for items in chosen.values() for item in items]
        maps, how = find_where(dictionary, model, store, pictures, shown, where)
    match: Match | None = None
    names: list[str] = []
    if held_out is not None and (known := known_facts([store, held_out])) is not None:
        names, (truth, held_truth) = known
        held = pool_store(dictionary, held_out).scores(signed)
        match = match_facts(pooled.scores(signed), truth, held, held_truth, seed=seed)
    found = top_words(model, dictionary.concepts, words, stopwords, vocabulary=vocabulary)
    if signed:
        found += top_words(model, -dictionary.concepts, words, stopwords, vocabulary=vocabulary)
    texts = store.samples.column("text").to_pylist() if "text" in store.samples.column_names else None
    ids = store.samples.column("sample").to_pylist()

    def cards_of(items: Sequence[_Shown]) -> list[CardSample]:
        own = [maps[key] for item in items if (key := (item.concept, item.sample)) in maps]
        peak = max((float(np.nanmax(np.abs(m.values), initial=0)) for m in own), default=0) or None
        made = []
        for item in items:
            images = pictures(item.sample) if pictures is not None else []
            area = maps.get((item.concept, item.sample))
            drawn = area.draw(images[0], peak) if area is not None else None
            text = (texts[item.sample] if texts else None) or ids[item.sample]
            made.append(CardSample(images[0] if images else None, text, item.activation, drawn))
        return made

    def end(number: int, k: int, negative: bool) -> End:
        scored = {}
        if match:
            own = (match.held_out[number], match.shuffled[number])
            scored = {"fact": names[match.fact[number]], "held_out": float(own[0]), "shuffled": float(own[1])}
        return End(found[number], cards_of(chosen[k, negative]), **scored)

    size = len(dictionary.concepts)
    cards = [
        ConceptCard(
            k,
            end(k, k, False),
            np.where(np.abs(pooled.low[:, k]) > np.abs(pooled.high[:, k]), pooled.low[:, k], pooled.high[:, k]),
            end(size + k, k, True) if signed else None,
        )
        for k in range(size)
    ]
    scores = dict(metrics or {})
    if match:
        scores = {"held-out AUROC": float(match.held_out.mean()), "its chance": float(match.shuffled.mean()), **scores}
    about = [
        ("model", repr(model)),
        ("representations", f"{len(store)} of {store.samples.num_rows} samples at {dictionary.hook}"),
        ("decomposition", f"{dictionary.decomposition}"),
        *facts,
        ("pictures", source),
        ("in the pictures", HOW[how]),
    ]
    settings = settings_of(dictionary, store)
    return Report(title or "Concepts", about, cards, scores, settings, dictionary.concepts), match


def settings_of(dictionary: ConceptDictionary, store: ActivationStore) -> dict[str, Setting]:
    """What tells runs apart: method and its parameters, hook, model (without folder or owner), rows."""
    return {
        **method_settings(dictionary.decomposition),
        "hook": dictionary.hook,
        "model": Path(str(dictionary.made_by.get("model", ""))).name,
        "rows": len(store),
    }
