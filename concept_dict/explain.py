"""Why a model says what it says of one sample: the concepts that fire, where in the picture, and their words.

The sample is run as the dictionary's own were: with the same prompt prefix, at the positions that the same selector
chooses, which the dictionary's `made_by` tells; or at others that are asked for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

import hooked_mm.selectors
from concept_dict.grounding import Word, top_words
from concept_dict.row_choice import learnt_where
from concept_dict.where import WhereMap, best_way, patch_activations, patch_gradients, where_map
from hooked_mm.batch import Batch, Modality
from hooked_mm.drawing import enlarge, grid, titled
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import SampleImages, load_images
from hooked_mm.selectors import Pick, Selector, gather

if TYPE_CHECKING:
    from concept_dict.dictionary import ConceptDictionary


@dataclass(frozen=True)
class Firing:
    """A concept that fires for a sample.

    Attributes:
        concept: Its index.
        activation: Its activation where it is largest in size; negative: the other end of a signed concept.
        at: What stands there: the word of interest, or the position's token.
        position: The position, counted in the padded sequence; the last one of a mean.
        words: What the concept decodes to, for a negative activation its other end.
        where: A map per picture of the sample; none without pictures, or where they have no patches with a place.
    """

    concept: int
    activation: float
    at: str
    position: int
    words: tuple[Word, ...]
    where: tuple[WhereMap, ...]


@dataclass(frozen=True)
class Explanation:
    """What fires for one sample, strongest first. `str` gives a table, `draw` a picture.

    Attributes:
        images: The sample's pictures.
        text: What was asked.
        answer: What was said, given or generated; None if only the prompt was read.
        hook: Where the concepts live.
        selector: Which positions were looked at.
        how: What the maps are, `positions` or `gradient` (see `where`), or `none`.
        firings: The concepts.
    """

    images: tuple[Image.Image, ...]
    text: str
    answer: str | None
    hook: str
    selector: str
    how: str
    firings: tuple[Firing, ...]

    def __str__(self) -> str:
        said = "" if self.answer is None else f" -> {self.answer!r}"
        where = textwrap.shorten(self.selector, 100, placeholder=" ...")
        lines = [f"{self.text!r}{said}", f"{self.hook}, {where}", "concept  activation  at            words"]
        for firing in self.firings:
            words = ", ".join(word.text for word in firing.words) or "(no whole word)"
            lines.append(f"{firing.concept:>7}  {firing.activation:>10.3f}  {firing.at:<12}  {words}")
        if not self.firings:
            lines.append("(nothing fires)")
        return "\n".join(lines)

    def draw(self, side: int = 192) -> Image.Image:
        """The pictures, then per concept its maps over them, each with activation and words above it."""
        shown = [titled(enlarge(image.convert("RGB"), side), "", side) for image in self.images]
        for firing in self.firings:
            title = f"{firing.concept}: {', '.join(word.text for word in firing.words[:2])} ({firing.activation:.2f})"
            for found, image in zip(firing.where, self.images, strict=False):
                shown.append(titled(found.draw(image, side=side), title, side))
        if not shown:
            raise BadInputError("the sample has no pictures, so there is nothing to draw")
        return grid(shown, min(len(shown), 4), max(max(picture.size) for picture in shown))


def made_selectors(made_by: Mapping[str, Any]) -> dict[str, Selector]:
    """The selectors that a store's or dictionary's `made_by` describes, by name; those that its rows were chosen by.

    Raises:
        BadInputError: If it describes none, or one that is not ours.
    """
    described = made_by.get("selectors")
    if not described:
        raise BadInputError(
            "the dictionary does not say which positions it was made of (made_by has no 'selectors'); give "
            "selector=LastPrompt(), say"
        )
    known = {kind.__name__: kind for kind in vars(hooked_mm.selectors).values() if _is_selector(kind)}
    found = {}
    wanted = learnt_where(made_by).get("selector", list(described))
    for name, settings in described.items():
        if name not in ([wanted] if isinstance(wanted, str) else wanted):
            continue
        kind = settings["selector"]
        if kind not in known:
            raise BadInputError(f"{unknown('selector', kind, known)}; if it is your own, give it: selector=...")
        found[name] = known[kind](**{key: value for key, value in settings.items() if key != "selector"})
    return found


def _is_selector(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Selector) and kind is not Selector


def answered(dictionary: ConceptDictionary, model: HookedMM, batch: Batch) -> tuple[Batch, str | None]:
    """One prompt with what is said, as the dictionary's samples were read: generated, or the prompt alone."""
    made_by = dictionary.made_by
    if made_by.get("answer") == "none":
        return batch, None
    output = model.generate(batch, int(made_by.get("max_new_tokens") or 40))
    assert output.batch is not None  # prepared batches are always extended
    assert output.text is not None
    return output.batch, output.text[0]


def explain(
    dictionary: ConceptDictionary,
    model: HookedMM,
    image: SampleImages,
    text: str,
    answer: str | None = None,
    *,
    selector: Selector | None = None,
    count: int = 5,
    words: int = 4,
    how: str | None = None,
) -> Explanation:
    """Which concepts fire for a sample, where in the picture, and what they say.

    Args:
        dictionary: Concepts of a (b, p, d) point of the language model.
        model: The model they are of.
        image: The sample's picture or pictures (PIL images or paths), or None.
        text: What is asked.
        answer: What is said; without it the model's own answer, or none if the dictionary was made of prompts alone.
        selector: Which positions to look at; those that the dictionary was made of unless given.
        count: Concepts to name at most; only such as fire.
        words: Words per concept at most.
        how: What the maps are (see `where`). Unless given, `positions` for what is read at image positions that have a
            place, else `gradient`, what the picture contributes to what is read at the text.

    Raises:
        BadInputError: If the selector is unknown or finds nothing in this sample, or the model lacks what `how` needs.
        UnknownHookError: If the model has no such hook.
    """
    if how not in (None, "positions", "gradient", "none"):
        raise unknown("way to say where", how, ("positions", "gradient", "none"))
    hook = dictionary.hook
    selectors = made_selectors(dictionary.made_by) if selector is None else {"": selector}
    prefix = dictionary.made_by.get("answer_prefix")
    with torch.no_grad():
        batch = model.prepare([image], text, None if answer is None else [answer], prefix)
        if answer is None:
            batch, answer = answered(dictionary, model, batch)
        batch_picks = [pick for select in selectors.values() for pick in select(batch, model.tokenizer)]
        named = ", ".join(str(select) for select in selectors.values())
        if not batch_picks:
            said = "the prompt alone" if answer is None else repr(answer)
            raise BadInputError(f"{named} finds no position in this sample ({said}); give another selector")
        layer = model.hook_points[hook].layer if hook in model.hook_points else None
        _, cache = model.run_with_cache(batch, [hook], stop_at_layer=None if layer is None else layer + 1)
    activations = dictionary.transform(gather(cache[hook].float(), batch_picks).cpu())
    strongest = activations.abs().max(dim=0)
    order = strongest.values.argsort(descending=True, stable=True)[:count].tolist()
    fired = [(k, batch_picks[int(strongest.indices[k])]) for k in order if strongest.values[k] > 0]
    pictures = tuple(load_images(image))
    at_image = all(batch.modality[0, pick.positions[-1]] == Modality.IMAGE for _, pick in fired)
    how = how or best_way(batch, at_image)
    if how == "positions" and pictures and fired:
        grids = patch_activations(dictionary.decomposition, cache, hook, 0)
        maps = [[values[..., k] for values in grids] for k, _ in fired]
    elif how == "gradient" and pictures and fired:
        maps = patch_gradients(
            dictionary.decomposition, model, batch, hook, [(0, pick.positions, k) for k, pick in fired]
        )
    else:
        maps = [[] for _ in fired]
    firings = []
    for (k, pick), found in zip(fired, maps, strict=True):
        activation = float(activations[batch_picks.index(pick), k])
        direction = dictionary.concepts[k] * (1 if activation > 0 else -1)
        firings.append(
            Firing(
                k,
                activation,
                _what(batch, pick),
                pick.positions[-1],
                tuple(top_words(model, direction[None], words)[0]),
                tuple(where_map(model, pictures[n], values) for n, values in enumerate(found)),
            )
        )
    return Explanation(pictures, text, answer, hook, named, how, tuple(firings))


def _what(batch: Batch, pick: Pick) -> str:
    """What stands at a pick: its word of interest, or its tokens."""
    if pick.word is not None:
        return pick.word
    tokens = [batch.tokens[pick.sample][position] for position in pick.positions]
    return tokens[0] if len(tokens) == 1 else f"{tokens[0]} ... {tokens[-1]}"
