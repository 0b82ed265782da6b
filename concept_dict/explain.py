"""Why a model says what it says of one sample: the concepts that fire, where in the picture, and their words.

The sample is run as the dictionary's own were: with the same prompt prefix, at the positions that the same selector
chooses, which the dictionary's `made_by` tells; or at others that are asked for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import hooked_mm.selectors
from concept_dict.grounding import Word, top_words
from concept_dict.row_choice import learnt_where
from concept_dict.where import WhereMap, best_way, patch_activations, patch_gradients, where_map
from hooked_mm.batch import Batch, Modality
from hooked_mm.cache import ActivationCache
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
    selectors = made_selectors(dictionary.made_by) if selector is None else {"": selector}
    prefix = dictionary.made_by.get("answer_prefix")
    with torch.no_grad():
        batch = model.prepare([image], text, None if answer is None else [answer], prefix)
        if answer is None:
            batch, answer = answered(dictionary, model, batch)
        picks = [pick for select in selectors.values() for pick in select(batch, model.tokenizer)]
    named = ", ".join(str(select) for select in selectors.values())
    if not picks:
        said = "the prompt alone" if answer is None else repr(answer)
        raise BadInputError(f"{named} finds no position in this sample ({said}); give another selector")
    pictures = tuple(load_images(image))
    fired = fire(dictionary, model, batch, picks, pictures, count=count, words=words, how=how)
    return Explanation(pictures, text, answer, dictionary.hook, named, fired.how, fired.firings)


@dataclass(frozen=True)
class Fired:
    """What fires at some positions of a sample.

    Attributes:
        activations: Of all concepts, a row per pick.
        how: What the maps are.
        firings: The strongest concepts first, then those that were asked for by number.
    """

    activations: Float[Tensor, "n k"]
    how: str
    firings: tuple[Firing, ...]


def fire(
    dictionary: ConceptDictionary,
    model: HookedMM,
    batch: Batch,
    picks: Sequence[Pick],
    pictures: Sequence[Image.Image],
    *,
    count: int = 5,
    words: int = 4,
    how: str | None = None,
    drawn: int | None = None,
    also: Sequence[int] = (),
) -> Fired:
    """Which concepts fire at positions of a batch of one sample.

    Args:
        dictionary: Concepts of a (b, p, d) point of the language model.
        model: The model they are of.
        batch: The sample.
        picks: Positions, in the text side of an encoder-decoder; each a row, one at least.
        pictures: The sample's.
        count: Concepts to name at most; only such as fire.
        words: Words per concept at most.
        how: As in `explain`.
        drawn: How many of the strongest have maps; all unless given.
        also: Concepts that are told of, with maps, even if they are not among those.

    Raises:
        BadInputError: If the point has no vectors at these positions, or there is no such concept.
        UnknownHookError: If the model has no such hook.
    """
    hook, side = dictionary.hook, batch.decoder or batch
    wrong = [k for k in also if not 0 <= k < len(dictionary.concepts)]
    if wrong:
        raise BadInputError(f"no concept {wrong[0]}; there are {len(dictionary.concepts)}, counted from 0")
    cache = stream(model, batch, hook)
    activations = dictionary.transform(gather(cache[hook].float(), picks).cpu())
    strongest = activations.abs().max(dim=0)
    order = strongest.values.argsort(descending=True, stable=True)[:count].tolist()
    named = [k for k in order if strongest.values[k] > 0]
    named += [k for k in also if k not in named]
    fired = [(k, picks[int(strongest.indices[k])]) for k in named]
    shown = [n for n, k in enumerate(named) if drawn is None or n < drawn or k in also]
    at_image = all(side.modality[0, pick.positions[-1]] == Modality.IMAGE for _, pick in fired)
    how = how or best_way(batch, at_image)
    maps: list[list[Tensor]] = [[] for _ in fired]
    if how == "positions" and pictures and fired:
        grids = patch_activations(dictionary.decomposition, cache, hook, 0)
        for n in shown:
            maps[n] = [values[..., named[n]] for values in grids]
    elif how == "gradient" and pictures and shown:
        wanted = [(0, fired[n][1].positions, named[n]) for n in shown]
        for n, found in zip(shown, patch_gradients(dictionary.decomposition, model, batch, hook, wanted), strict=True):
            maps[n] = found
    firings = []
    for (k, pick), found in zip(fired, maps, strict=True):
        activation = float(activations[int(strongest.indices[k]), k])
        direction = dictionary.concepts[k] * (-1 if activation < 0 else 1)
        firings.append(
            Firing(
                k,
                activation,
                _what(side, pick),
                pick.positions[-1],
                tuple(top_words(model, direction[None], words)[0]),
                tuple(where_map(model, pictures[n], values) for n, values in enumerate(found)),
            )
        )
    return Fired(activations, how, tuple(firings))


def stream(model: HookedMM, batch: Batch, hook: str) -> ActivationCache:
    """What a point of the language model holds, computed no further.

    Raises:
        BadInputError: If it has not a vector per position of the text's side.
        UnknownHookError: If the model has no such hook.
    """
    layer = model.hook_points[hook].layer if hook in model.hook_points else None
    with torch.no_grad():
        _, cache = model.run_with_cache(batch, [hook], stop_at_layer=None if layer is None else layer + 1)
    side = batch.decoder or batch
    if cache[hook].ndim != 3 or cache[hook].shape[:2] != side.modality.shape:
        raise BadInputError(
            f"{hook!r} has {tuple(cache[hook].shape)}, not a vector at each of {side.modality.shape[1]} positions of "
            "the text; take a dictionary of the language model's stream"
        )
    return cache


def token_activations(dictionary: ConceptDictionary, model: HookedMM, batch: Batch) -> Float[Tensor, "p k"]:
    """Activations at every position of text of a batch of one sample; NaN at pictures and padding.

    Raises:
        BadInputError: As `stream`.
    """
    value, side = stream(model, batch, dictionary.hook)[dictionary.hook][0].float().cpu(), batch.decoder or batch
    text = side.mask("text")[0].cpu()
    found = value.new_full((len(value), len(dictionary.concepts)), torch.nan)
    if bool(text.any()):
        found[text] = dictionary.transform(value[text])
    return found


ANSWERED = ("TokenOfInterest", "BeforeSpecial")
"""Selectors of positions in answers, besides those that name the role."""


def rows_to_look_at(dictionary: ConceptDictionary, model: HookedMM, batch: Batch, tokens: Sequence[int]) -> list[Pick]:
    """Where to look into an answered sample: as the dictionary's rows were chosen, of answers at chosen tokens.

    Rows that were chosen in answers, whatever the words, are those of the tokens here, each by itself: where a token is
    predicted if the dictionary's rows are such, else where it is read. A dictionary that does not tell where its rows
    lie is asked where the tokens are predicted.

    Args:
        dictionary: The concepts.
        model: The model they are of.
        batch: One sample with its answer.
        tokens: Numbers of tokens of the answer, from 0.

    Raises:
        BadInputError: If a selector is unknown, or there is no position to look at.
    """
    side = batch.decoder or batch
    answer = side.mask(role="answer")[0].nonzero()[:, 0].tolist()
    wrong = [number for number in tokens if not 0 <= number < len(answer)]
    if wrong:
        raise BadInputError(f"the answer has no token {wrong[0]}; it has {len(answer)}, counted from 0")
    known = made_selectors(dictionary.made_by) if dictionary.made_by.get("selectors") else {"": None}
    picks: list[Pick] = []
    for selector in known.values():
        settings = {} if selector is None else selector.describe()
        if selector is None or settings["selector"] in ANSWERED or settings.get("role") == "answer":
            before = int(selector is None or settings.get("where") == "predicts")
            picks += [
                Pick(0, (answer[number] - before,), model.tokenizer.decode([int(side.input_ids[0, answer[number]])]))
                for number in tokens
            ]
        else:
            picks += selector(side, model.tokenizer)
    if not picks:
        # Of a selector by words there may be hundreds: its kind alone, for whoever looks at it.
        kinds = ", ".join(type(selector).__name__ for selector in known.values())
        reason = "the answer has no words" if not answer or not tokens else f"{kinds} looks for others"
        raise BadInputError(
            f"the dictionary finds no position in this conversation: {reason}; ask something else, or choose another "
            "dictionary"
        )
    return picks


def _what(batch: Batch, pick: Pick) -> str:
    """What stands at a pick: its word of interest, or its tokens."""
    if pick.word is not None:
        return pick.word
    tokens = [batch.tokens[pick.sample][position] for position in pick.positions]
    return tokens[0] if len(tokens) == 1 else f"{tokens[0]} ... {tokens[-1]}"
