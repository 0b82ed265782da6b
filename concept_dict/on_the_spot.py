"""Dictionaries learnt while somebody waits: of one conversation's own positions, or of some made scenes.

    here      rows are the positions of the conversation's pictures, or all of its positions where it has none
    scenes    rows are positions of made scenes with their captions, whose pictures then also show what a concept is

Rows of scenes are those of `MOST_ROWS` at most, evenly spaced; a dictionary has as many concepts as there are rows at
most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.explain import stream
from concept_dict.grounding import top_samples
from concept_dict.kmeans import KMeans
from concept_dict.metrics import pool_samples
from concept_dict.non_negative_dictionary import NonNegativeDictionary
from concept_dict.rows import Rows
from concept_dict.semi_nmf import SemiNMF
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset
from hooked_mm.scenes.language import DESCRIBED, WORD_CLASSES
from hooked_mm.scenes.world import Split
from hooked_mm.selectors import EachOf, Selector, TokenOfInterest, gather
from hooked_mm.small import SMALL_MODELS, small_model_path

KINDS: dict[str, Callable[..., Decomposition]] = {
    "sparse": NonNegativeDictionary,
    "semi-NMF": SemiNMF,
    "k-means": KMeans,
}
"""What can be learnt on the spot."""

WORDS = tuple(word for name in DESCRIBED for word in WORD_CLASSES[name])
"""What captions of scenes are made of."""

STYLE = "full"
SPLIT: Split = "test"
"""Attributes after the noun, so that nothing earlier gives them away; scenes that no small model was trained on."""

BATCH = 16
MOST_ROWS = 4096
MOST_STEPS = 60
"""Iterations of a fit: somebody waits, and concepts of so few rows have their words by then."""

Step = Callable[[int, int], None]
"""Told how much is done, of how much; may raise to end the work."""


def nothing(done: int, total: int) -> None:
    """Tell nobody."""


SELECTORS: dict[str, Selector] = {
    "image": EachOf("image"),
    "words": TokenOfInterest(WORDS, where="predicts"),
}
"""Rows of scenes: the positions of their pictures, or those where a word of the caption is predicted."""


@dataclass(frozen=True)
class SceneRows:
    """Representations of made scenes.

    Attributes:
        rows: (n, d) float32.
        sample: Per row the scene.
        count: Number of scenes.
        hook: Where they were read.
        selectors: By which.
    """

    rows: Float[Tensor, "n d"]
    sample: Int[np.ndarray, " n"]
    count: int
    hook: str
    selectors: tuple[Selector, ...]


@dataclass(frozen=True)
class Shown:
    """A sample that activates a concept."""

    number: int
    activation: float
    image: Image.Image
    text: str


def knows_scenes(model: HookedMM) -> bool:
    """Whether it is a shipped small model, which was trained on scenes."""
    folder = Path(str(getattr(model.hf_model.config, "_name_or_path", "")))
    return folder.name in SMALL_MODELS and folder == small_model_path(folder.name)


def own_name(model: HookedMM) -> dict[str, Any]:
    """What a dictionary says of the model that it was learnt on."""
    config = model.hf_model.config
    return {"model": getattr(config, "_name_or_path", None), "revision": getattr(config, "_commit_hash", None)}


def fitted(
    model: HookedMM,
    rows: Float[Tensor, "n d"],
    hook: str,
    kind: str,
    count: int,
    selectors: Sequence[Selector],
    step: Step = nothing,
) -> ConceptDictionary:
    """Concepts of rows, with what is known of where they come from.

    Args:
        model: Whose rows.
        rows: One at least.
        hook: Where they were read.
        kind: One of `KINDS`.
        count: Of concepts; as many as rows at most.
        selectors: How the rows were chosen.
        step: Told how many iterations are done, of how many at most, before each.

    Raises:
        BadInputError: For an unknown kind, no rows or no concepts.
    """
    if kind not in KINDS:
        raise unknown("kind of dictionary", kind, KINDS)
    if not len(rows):
        raise BadInputError("there are no positions to learn concepts of; choose another dictionary")
    method = KINDS[kind](n_components=min(count, len(rows)), max_iter=MOST_STEPS)
    step(0, MOST_STEPS)
    method.begin(Rows.of(rows))
    done = 0
    while not method.step():
        done += 1
        step(min(done, MOST_STEPS), MOST_STEPS)
    method.end()
    described = {str(n): selector.describe() for n, selector in enumerate(selectors)}
    return ConceptDictionary(method, hook, {**own_name(model), "selectors": described})


def learnt_here(
    model: HookedMM, batch: Batch, hook: str, kind: str, count: int, step: Step = nothing
) -> ConceptDictionary:
    """A dictionary of one conversation's own positions: of its pictures if they have positions in the text's stream.

    Args:
        model: The model.
        batch: One sample.
        hook: A (b, p, d) point of the language model.
        kind: One of `KINDS`.
        count: Of concepts; as many as positions at most.
        step: As in `fitted`.

    Raises:
        BadInputError: As `fitted`, or for a point without a vector per position.
    """
    side = batch.decoder or batch
    selector = EachOf("image") if bool(side.mask("image").any()) else EachOf()
    rows = gather(stream(model, batch, hook)[hook].float(), selector(side, model.tokenizer)).cpu()
    return fitted(model, rows, hook, kind, count, [selector], step)


def scene_rows(
    model: HookedMM,
    hook: str,
    selectors: Sequence[Selector],
    count: int,
    step: Step = nothing,
) -> SceneRows:
    """Representations of made scenes with their captions.

    Args:
        model: The model, which may know nothing of scenes.
        hook: A (b, p, d) point of the language model.
        selectors: Which positions.
        count: Of scenes.
        step: Told how many scenes are done, of how many, before every batch.

    Raises:
        BadInputError: If there is no scene, or a selector finds nothing in any.
    """
    if count < 1:
        raise BadInputError(f"count={count}; one scene at least is needed")
    data = SceneDataset(count, "caption", SPLIT, style=STYLE)
    found: list[Tensor] = []
    owners: list[int] = []
    for start in range(0, count, BATCH):
        step(start, count)
        part = [data[number] for number in range(start, min(start + BATCH, count))]
        batch = model.prepare([one.images for one in part], [one.text for one in part], [one.answer for one in part])
        side = batch.decoder or batch
        picks = [pick for selector in selectors for pick in selector(side, model.tokenizer)]
        found.append(gather(stream(model, batch, hook)[hook].float(), picks).cpu())
        owners += [start + pick.sample for pick in picks]
    rows = torch.cat(found)
    if not len(rows):
        raise BadInputError(
            f"{', '.join(map(str, selectors))} finds no position in any scene, as pictures that are read by "
            "cross-attention have none in the text; choose another dictionary"
        )
    spaced = slice(None, None, -(-len(rows) // MOST_ROWS))
    return SceneRows(rows[spaced].clone(), np.asarray(owners)[spaced], count, hook, tuple(selectors))


def learnt_on_scenes(
    model: HookedMM, scenes: SceneRows, kind: str, count: int, step: Step = nothing
) -> ConceptDictionary:
    """A dictionary of made scenes; `step` as in `fitted`.

    Raises:
        BadInputError: As `fitted`.
    """
    return fitted(model, scenes.rows, scenes.hook, kind, count, scenes.selectors, step)


def scene_activations(dictionary: ConceptDictionary, scenes: SceneRows, sign: int = 1) -> Float[np.ndarray, "scenes k"]:
    """Per scene and concept the largest activation over its rows; of the other end of signed ones with `sign=-1`."""
    return pool_samples(sign * dictionary.transform(scenes.rows), scenes.sample, scenes.count)


def strongest_scenes(pooled: Float[np.ndarray, "scenes k"], concept: int, count: int = 6) -> list[Shown]:
    """The scenes that activate a concept most, strongest first, with their captions."""
    data = SceneDataset(len(pooled), "caption", SPLIT, style=STYLE)
    found = []
    for number in top_samples(pooled[:, [concept]], count)[0]:
        one = data[number]
        assert isinstance(one.images, Image.Image)
        assert one.answer is not None
        found.append(Shown(number, float(pooled[number, concept]), one.images, one.answer))
    return found
