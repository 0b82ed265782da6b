"""The explorer's tab of concepts: which fire for a question, where in its pictures, and what each of them is.

Concepts are those of a dictionary that the one who starts the page opened, or are learnt on the spot: of this
conversation's own positions, or of made scenes (`on_the_spot`). Only what was computed of made scenes is kept from one
look to the next.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from concept_dict.dictionary import ConceptDictionary
from concept_dict.explain import Fired, Firing, fire, made_selectors, rows_to_look_at, token_activations
from concept_dict.grounding import top_words
from concept_dict.on_the_spot import (
    KINDS,
    SELECTORS,
    SceneRows,
    Shown,
    Step,
    knows_scenes,
    learnt_here,
    learnt_on_scenes,
    scene_activations,
    scene_rows,
    strongest_scenes,
)
from concept_dict.opened_dictionaries import OpenedDictionary, Samples, open_dictionaries
from hooked_mm.drawing import enlarge
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.panels import Facts, Note, Panel, Picture, Pictures, Table, Words
from hooked_mm.explorer.tab import Choice, Control, Number, View
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM
from hooked_mm.selectors import Selector

T = TypeVar("T")

HERE = "here"
MADE = {"scenes image": "image", "scenes words": "words"}
"""Choice -> which rows of made scenes."""
LABELS = {
    HERE: "learnt on this conversation's own positions",
    "scenes image": "learnt on made scenes: their pictures",
    "scenes words": "learnt on made scenes: what is said of them",
}
MAPS = {"positions": "activation at every patch", "gradient": "patches that the activation depends on"}

MOST_CONCEPTS = 50
MOST_SCENES = 200
FIRING, DRAWN, WORDS = 12, 4, 4
"""Concepts that are listed, that have maps, and words of each."""
MOST_MAPS = 12
LONG = 10
"""Words of the chosen concept."""
MOST_TOKENS = 160
SAMPLES = 6
KEPT = 6
"""Results of made scenes that are kept."""
SIDE = 192


@dataclass(frozen=True)
class Chosen:
    """A dictionary, what is known of its samples, and the lines that find it again as `dictionary`.

    `samples`: of its folder; `scenes`: of made scenes; with the lines that find their activations as `shown` (samples,
    concepts).
    """

    dictionary: ConceptDictionary
    label: str
    lines: Sequence[str]
    samples: Samples | None = None
    scenes: SceneRows | None = None
    scene_lines: Sequence[str] = ()


class ConceptsTab:
    """Concepts."""

    name, title, order = "concepts", "Concepts", 60
    about = (
        "Which concepts of a dictionary fire for this question, and where in the pictures. Click one for its words, "
        "the samples that activate it most, and its activation at every token."
    )

    def __init__(self, folders: Sequence[Path]) -> None:
        self._opened = {f"opened {n}": one for n, one in enumerate(open_dictionaries(folders))}
        self._kept: OrderedDict[Any, Any] = OrderedDict()

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """Dictionary, and what it is learnt with; concept."""
        opened = [(one.label, value) for value, one in self._opened.items()]
        options = [*opened, *((label, value) for value, label in LABELS.items())]
        last = model.cfg.n_layers - 1
        own = "For a dictionary that is learnt here."
        first = opened[0][1] if opened else "scenes words" if knows_scenes(model) else HERE
        return [
            Choice("dictionary", "Dictionary", options, first),
            Number("layer", "Layer", 0, last, max(0, round(0.85 * last)) if last > 7 else last, info=own),
            Choice("kind", "Kind", [(kind, kind) for kind in KINDS], next(iter(KINDS)), own),
            Number("count", "Concepts", 2, MOST_CONCEPTS, 26 if knows_scenes(model) else 12, info=own),
            Number("scenes", "Made scenes", 8, MOST_SCENES, 24, 8, "To learn from, and to show concepts by."),
            Choice("concept", "Concept", [], None, "The strongest unless chosen.", changing=True),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """The firing concepts with their maps, and one of them closely."""
        model = asked.model
        chosen = self._dictionary(asked, values, work)
        dictionary = chosen.dictionary
        wanted = _wanted(values)
        notes: list[Panel] = []
        if wanted is not None and wanted >= len(dictionary.concepts):
            size = len(dictionary.concepts)
            notes.append(Note(f"There is no concept {wanted} among these {size}: the strongest is shown.", "warning"))
            wanted = None
        work.step("looking for concepts")
        picks = rows_to_look_at(dictionary, model, asked.batch, asked.tokens)
        also = [] if wanted is None else [wanted]
        fired = fire(
            dictionary, model, asked.batch, picks, asked.images, count=FIRING, words=WORDS, drawn=DRAWN, also=also
        )
        close = wanted if wanted is not None else next((one.concept for one in fired.firings), 0)
        firing = next((one for one in fired.firings if one.concept == close), None)
        sign = -1 if firing is not None and firing.activation < 0 else 1
        work.step("reading the tokens")
        tokens = token_activations(dictionary, model, asked.batch)[:, close]
        arrays = {"concepts": dictionary.concepts, "activations": fired.activations, "tokens": tokens}
        for one in fired.firings:
            arrays |= {f"map of {one.concept} in {n}": torch.from_numpy(m.values) for n, m in enumerate(one.where)}
        shown, pooled = self._samples(chosen, close, sign, model)
        if pooled is not None:
            arrays["samples"] = pooled
        panels = [
            *notes,
            Facts(_facts(chosen, fired, len(picks))),
            _table(fired, values),
            *_maps(asked, fired, values),
            *_closely(model, dictionary, close, sign, firing),
            *_words(asked, tokens, close),
            *_shown(shown, close),
        ]
        python = _python(chosen, close, sign, also, pooled is not None)
        return View(panels, python, arrays, {"concept": _options(model, dictionary, values)})

    def _dictionary(self, asked: Asked, values: Mapping[str, Any], work: Work) -> Chosen:
        """The dictionary that was chosen."""
        model, name, count, kind = asked.model, values["dictionary"], int(values["count"]), values["kind"]
        if name in self._opened:
            return self._of_folder(self._opened[name], asked, int(values["scenes"]), work)
        hook = f"blocks.{int(values['layer'])}.hook_resid_post"
        if name == HERE:
            found = learnt_here(model, asked.batch, hook, kind, count, _telling(work, "learning concepts"))
            lines = [f"dictionary = learnt_here(model, batch, {hook!r}, {kind!r}, {count})"]
            return self._with_scenes(Chosen(found, LABELS[HERE], lines), asked, int(values["scenes"]), work)
        if name not in MADE:
            raise unknown("dictionary", str(name), [*self._opened, *LABELS])
        selectors = (SELECTORS[MADE[name]],)
        rows, line = self._rows(asked, hook, selectors, int(values["scenes"]), work)
        key = (asked.name, hook, selectors, int(values["scenes"]), kind, count)
        told = _telling(work, "learning concepts of scenes")
        found = self._keep(key, lambda: learnt_on_scenes(model, rows, kind, count, told))
        lines = [line, f"dictionary = learnt_on_scenes(model, scenes, {kind!r}, {count})"]
        return Chosen(found, LABELS[name], lines, None, rows, ("shown = scene_activations(dictionary, scenes, sign)",))

    def _of_folder(self, opened: OpenedDictionary, asked: Asked, count: int, work: Work) -> Chosen:
        work.step("reading the dictionary")
        opened.dictionary.check_model(asked.model)
        lines = [f"dictionary = ConceptDictionary.load({str(opened.folder)!r})", "dictionary.check_model(model)"]
        work.step("reading its samples")
        samples = opened.samples
        if samples is None:
            return self._with_scenes(Chosen(opened.dictionary, opened.label, lines), asked, count, work)
        where = opened.dictionary.made_by.get("where") or {}
        read = [
            f"store = ActivationStore.open({str(samples.folder)!r}).where(**{dict(where)!r})",
            "pooled = pool_store(dictionary, store)",
            "shown = torch.from_numpy(pooled.high if sign > 0 else -pooled.low)",
        ]
        return Chosen(opened.dictionary, opened.label, lines, samples, None, read)

    def _with_scenes(self, chosen: Chosen, asked: Asked, count: int, work: Work) -> Chosen:
        """With made scenes to show its concepts by, if the model knows such and its rows can be found in them."""
        if not knows_scenes(asked.model) or not chosen.dictionary.made_by.get("selectors"):
            return chosen
        try:
            selectors = tuple(made_selectors(chosen.dictionary.made_by).values())
            rows, line = self._rows(asked, chosen.dictionary.hook, selectors, count, work)
        except BadInputError:
            # Scenes only illustrate; the concepts are there without.
            return chosen
        read = (line, "shown = scene_activations(dictionary, scenes, sign)")
        return Chosen(chosen.dictionary, chosen.label, chosen.lines, None, rows, read)

    def _rows(
        self, asked: Asked, hook: str, selectors: tuple[Selector, ...], count: int, work: Work
    ) -> tuple[SceneRows, str]:
        """Rows of made scenes, kept; and the line that finds them again."""
        key = (asked.name, hook, repr(selectors), count)
        told = _telling(work, "looking at made scenes")
        rows = self._keep(key, lambda: scene_rows(asked.model, hook, selectors, count, told))
        named = next((name for name, one in SELECTORS.items() if (one,) == selectors), None)
        of = f"[SELECTORS[{named!r}]]" if named else "list(made_selectors(dictionary.made_by).values())"
        return rows, f"scenes = scene_rows(model, {hook!r}, {of}, {count})"

    def _keep(self, key: Any, make: Callable[[], T]) -> T:
        """What was made for a key, made once while it is among the last that were asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        found: T = self._kept[key]
        return found

    def _samples(self, chosen: Chosen, concept: int, sign: int, model: HookedMM) -> tuple[list[Shown], Tensor | None]:
        """The samples that activate a concept most, and its activation for all of them."""
        if chosen.samples is not None:
            pooled = chosen.samples.pooled
            every = pooled.high if sign > 0 else -pooled.low
            return chosen.samples.strongest(concept, SAMPLES, sign), torch.from_numpy(every[:, concept].copy())
        if chosen.scenes is None:
            return [], None
        activations = scene_activations(chosen.dictionary, chosen.scenes, sign)
        return strongest_scenes(activations, concept, SAMPLES), torch.from_numpy(activations[:, concept].copy())


def _telling(work: Work, what: str) -> Step:
    return lambda done, total: work.step(what, done, total)


def _facts(chosen: Chosen, fired: Fired, rows: int) -> list[tuple[str, Any]]:
    made = chosen.dictionary
    return [
        ("dictionary", chosen.label),
        ("method", type(made.decomposition).__name__),
        ("concepts", len(made.concepts)),
        ("point", made.hook),
        ("positions looked at", rows),
        ("maps", MAPS.get(fired.how, "none")),
    ]


def _named(words: Sequence[Any]) -> str:
    return ", ".join(word.text for word in words) or "(no whole word)"


def number_of(concept: int, values: Mapping[str, Any]) -> str:
    """A concept as the control has it: its number, and of which dictionary, as another's has nothing to do with it."""
    name = values["dictionary"]
    of = {HERE: ("layer", "kind", "count")} | dict.fromkeys(MADE, ("layer", "kind", "count", "scenes"))
    return " ".join([f"{concept} of {name}", *(str(values[one]) for one in of.get(name, ()))])


def _wanted(values: Mapping[str, Any]) -> int | None:
    """The concept that was chosen; None where none was, or one of another dictionary.

    Raises:
        BadInputError: If it is none at all.
    """
    given = values["concept"]
    if given is None:
        return None
    found = re.match(r"(\d{1,4}) of ", given) if isinstance(given, str) else None
    if found is None:
        raise BadInputError(f"no concept {str(given)[:80]!r}; click one, or choose it from the list")
    number = int(found[1])
    return number if given == number_of(number, values) else None


def _table(fired: Fired, values: Mapping[str, Any]) -> Panel:
    if not any(one.activation for one in fired.firings):
        return Note("No concept fires at the positions that were looked at.")
    rows = [(one.concept, one.activation, one.at, _named(one.words)) for one in fired.firings]
    picks = [{"concept": number_of(one.concept, values)} for one in fired.firings]
    return Table(("concept", "activation", "at", "words"), rows, "Concepts that fire", picks)


def _maps(asked: Asked, fired: Fired, values: Mapping[str, Any]) -> list[Panel]:
    """Where the strongest fire; of many pictures the first ones, and said so."""
    found = [(one, n) for one in fired.firings for n in range(len(one.where))]
    if not found:
        if not asked.images:
            return []
        return [Note("This model's pictures have no patches whose place is known, so there are no maps.")]
    made = [
        Picture(
            f"{one.concept}: {_named(one.words[:2])} ({one.activation:.3g})",
            one.where[n].draw(asked.images[n], side=SIDE),
            {"concept": number_of(one.concept, values)},
        )
        for one, n in found[:MOST_MAPS]
    ]
    panels: list[Panel] = [Pictures(made, f"Where in the pictures: {MAPS[fired.how]}", SIDE)]
    if len(found) > MOST_MAPS:
        panels.append(Note(f"{MOST_MAPS} of {len(found)} maps are shown."))
    return panels


def _closely(
    model: HookedMM, dictionary: ConceptDictionary, concept: int, sign: int, firing: Firing | None
) -> list[Panel]:
    """The words of the chosen concept, with their probabilities and logits."""
    direction = sign * dictionary.concepts[[concept]]
    words = top_words(model, direction, LONG)[0]
    title = f"Concept {concept}{', its negative end' if sign < 0 else ''}: what it decodes to"
    fires = firing is not None and firing.activation != 0
    panels: list[Panel] = [] if fires else [Note(f"Concept {concept} does not fire here.")]
    if not words:
        return [*panels, Note(f"Concept {concept} decodes to no whole word.")]
    rows = [(word.text, word.probability, float(np.log(max(word.probability, 1e-45)))) for word in words]
    return [*panels, Table(("word", "probability", "log probability"), rows, title)]


def _words(asked: Asked, tokens: Tensor, concept: int) -> list[Panel]:
    """The activation at each token of the text."""
    side = asked.answer_batch
    places = (~tokens.isnan()).nonzero()[:, 0].tolist()
    shown = places[-MOST_TOKENS:]
    decode = asked.model.tokenizer.decode
    words = [(decode([int(side.input_ids[0, at])]), float(tokens[at])) for at in shown]
    panels: list[Panel] = [Words(words, f"Activation of concept {concept} at each token")]
    if len(shown) < len(places):
        panels.append(Note(f"The last {MOST_TOKENS} of {len(places)} tokens are shown."))
    return panels


def _shown(shown: Sequence[Shown], concept: int) -> list[Panel]:
    if not shown:
        return []
    made = [
        Picture(f"{one.activation:.3g}: {one.text}"[:160], enlarge(one.image.convert("RGB"), SIDE)) for one in shown
    ]
    return [Pictures(made, f"Samples that activate concept {concept} most", SIDE)]


def _options(model: HookedMM, dictionary: ConceptDictionary, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All concepts, to choose from."""
    return [
        (f"{k}: {_named(words)}", number_of(k, values))
        for k, words in enumerate(top_words(model, dictionary.concepts[:MOST_CONCEPTS], 2))
    ]


def _python(chosen: Chosen, concept: int, sign: int, also: Sequence[int], samples: bool) -> str:
    """The lines that find the arrays again."""
    used = [*chosen.lines, *(chosen.scene_lines if samples else ())]
    text = "\n".join(used)
    imports = {
        "ConceptDictionary": "from concept_dict.dictionary import ConceptDictionary",
        "made_selectors": "from concept_dict.explain import made_selectors",
        "learnt_here": "from concept_dict.on_the_spot import learnt_here",
        "learnt_on_scenes": "from concept_dict.on_the_spot import learnt_on_scenes",
        "SELECTORS": "from concept_dict.on_the_spot import SELECTORS",
        "scene_rows": "from concept_dict.on_the_spot import scene_rows",
        "scene_activations": "from concept_dict.on_the_spot import scene_activations",
        "pool_store": "from concept_dict.report import pool_store",
        "ActivationStore": "from hooked_mm.store import ActivationStore",
    }
    lines = [
        "from concept_dict.explain import fire, rows_to_look_at, token_activations",
        *(line for name, line in imports.items() if f"{name}(" in text or f"{name}." in text or f"{name}[" in text),
        "import torch",
        "",
        f"concept, sign = {concept}, {sign}",
        *chosen.lines,
        "picks = rows_to_look_at(dictionary, model, batch, tokens)",
        f"fired = fire(dictionary, model, batch, picks, images, count={FIRING}, words={WORDS}, drawn={DRAWN}, "
        f"also={list(also)!r})",
        "for one in fired.firings:",
        "    print(one.concept, one.activation, one.at, [word.text for word in one.words])",
        "arrays = {",
        "    'concepts': dictionary.concepts,",
        "    'activations': fired.activations,",
        "    'tokens': token_activations(dictionary, model, batch)[:, concept],",
        "}",
        "for one in fired.firings:",
        "    for n, found in enumerate(one.where):",
        "        arrays[f'map of {one.concept} in {n}'] = torch.from_numpy(found.values)",
    ]
    if samples:
        lines += [*chosen.scene_lines, "arrays['samples'] = torch.as_tensor(shown)[:, concept]"]
    return "\n".join(lines)


def make_tab(folders: Sequence[Path]) -> ConceptsTab:
    """The tab, with dictionaries and stores of the folders that were opened for it."""
    return ConceptsTab(folders)
