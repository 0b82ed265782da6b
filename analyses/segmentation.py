"""Segmentation by the logit lens: where in a picture the model would say a word, and how sure it is that it is there.

Jiang et al. 2024 (arXiv 2410.02762). p^l_i(c) = softmax(unembed(norm(h^l_i)))_c is the probability of a word c at image
position i behind l blocks.

    map of c            s_i = max over layers of p^l_i(c), or that of one layer, laid out as the picture is
    segmentation of c   the pixels with s > threshold; s is interpolated between the centres of patches
    confidence in c     max over layers and positions of p^l_i(c); hallucination score 1 - confidence

A word stands for its first token. The threshold and the layers are chosen on other pictures than those scored. A box in
the middle of the picture, as large as an object is on average, is what any map must beat.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.logit_lens import BUDGET, Unembeds, lens_points
from analyses.patch_maps import auroc, iou, on_picture
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.frames import Box
from hooked_mm.hooked import HookedMM
from hooked_mm.words import check_words

Layers = int | Literal["max"]
"""The number of one layer, or the largest value of all."""


def first_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[Int[Tensor, " w"], list[str]]:
    """The token that each word begins with behind a space, and those words that are several tokens.

    Raises:
        UnknownWordError: If the tokenizer can't make a word.
        BadInputError: If two words begin with the same token, so that the lens can't tell them apart.
    """
    check_words(tokenizer, words)
    made = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    # Some tokenizers write the space as a token of its own.
    made = [[t for t in ids if tokenizer.decode([t]).strip()] or ids for ids in made]
    owners: dict[int, str] = {}
    for word, ids in zip(words, made, strict=True):
        if owners.setdefault(ids[0], word) != word:
            raise BadInputError(
                f"{word!r} and {owners[ids[0]]!r} both begin with the token {tokenizer.decode(ids[:1])!r}, so the lens "
                "can't tell them apart; leave one out"
            )
    return torch.tensor([ids[0] for ids in made]), [word for word, ids in zip(words, made, strict=True) if len(ids) > 1]


def word_probabilities(
    model: Unembeds, resid: Float[Tensor, "n ..."], ids: Int[Tensor, " w"], budget: int = BUDGET
) -> Float[Tensor, "n w"]:
    """softmax(unembed(norm(h)))_c of rows for some words c, float32 on the CPU.

    Args:
        model: Whose norm and unembedding to use.
        resid: (n, d) rows of any layer (in a model of several streams (n, streams, d)).
        ids: The words' tokens.
        budget: How many logits may be held at once; at least those of one row are.

    Raises:
        BadInputError: If a token is not of the vocabulary.
    """
    vocabulary = int(model.cfg.d_vocab)
    if bool((ids < 0).any()) or bool((ids >= vocabulary).any()):
        raise BadInputError(f"tokens {ids.tolist()} are not all of a vocabulary of {vocabulary}; give token ids")
    rows, parts = max(1, budget // vocabulary), [torch.empty(0, len(ids))]
    for start in range(0, len(resid), rows):
        logits = model.to_logits(resid[start : start + rows]).float()
        parts.append(logits.softmax(dim=-1)[:, ids.to(logits.device)].cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class WordMaps:
    """How probable words are at every image position of a batch.

    Attributes:
        layers: Numbers of the layers; n is the stream behind n blocks.
        values: (b, p, layers, w) float32; NaN where a position shows no image.
        batch: What the model ran on.
    """

    layers: list[int]
    values: Float[Tensor, "b p l w"]
    batch: Batch

    def grids(self, sample: int) -> list[Float[Tensor, "rows cols l w"]]:
        """A grid per image of a sample; NaN where an image has no position.

        Raises:
            BadInputError: If there is no such sample, or the model's image positions have no places in the picture.
        """
        if not 0 <= sample < len(self.batch):
            raise BadInputError(f"sample {sample} asked of a batch of {len(self.batch)}")
        layout = self.batch.layout
        images = (layout.image_sample == sample).nonzero()[:, 0].tolist()
        return [layout.read(image, self.values, "sequence", overview=False) for image in images]

    def confidence(self, layers: Layers = "max") -> Float[Tensor, "b w"]:
        """The largest probability of each word over image positions (and layers); NaN for a sample without image."""
        values = over_layers(self.values, self.layers, layers)
        missing = values.isnan().all(dim=1)
        return values.nan_to_num(nan=-1.0).amax(dim=1).masked_fill(missing, torch.nan)


def over_layers(values: Float[Tensor, "... l w"], numbers: Sequence[int], layers: Layers) -> Float[Tensor, "... w"]:
    """The largest value of all layers, or that of one.

    Raises:
        BadInputError: If there is no such layer.
    """
    if layers == "max":
        return values.amax(dim=-2)
    if layers not in numbers:
        raise BadInputError(f"layer {layers} was not read; there are {list(numbers)}, or 'max' over them")
    return values[..., list(numbers).index(layers), :]


@torch.no_grad()
def word_maps(
    model: HookedMM,
    batch: Batch | Mapping[str, Any],
    ids: Int[Tensor, " w"],
    layers: Iterable[int] | None = None,
) -> WordMaps:
    """One forward pass, and how probable each word is at each image position behind each layer.

    Args:
        model: The model.
        batch: Pictures with any text; what stands behind a picture does not change what a decoder makes of it.
        ids: The words' tokens.
        layers: Which, numbered as in `logit_lens.lens_points`; all unless given.

    Raises:
        BadInputError: If no position of the batch shows an image: text reads pictures by cross-attention, or there
            are none.
    """
    names = lens_points(model.hook_names, layers=layers)
    _, cache = model.run_with_cache(batch, list(names.values()), stop_at_layer=max(1, *names))
    made = cache.batch
    shows = made.mask("image")
    if not bool(shows.any()):
        raise BadInputError(
            "no position of this batch shows an image, so the lens has nothing to look at: give pictures, and a model "
            "whose text has image positions"
        )
    values = torch.full((*shows.shape, len(names), len(ids)), torch.nan)
    where = shows.cpu()
    for place, name in enumerate(names.values()):
        values[..., place, :][where] = word_probabilities(model, cache[name][shows], ids)
    return WordMaps(list(names), values, made)


@dataclass(frozen=True)
class Threshold:
    """Which pixels of a map are chosen: those above a number, above a quantile of the map, or above Otsu's threshold.

    Attributes:
        kind: `fixed`, `quantile` or `otsu`.
        value: The number or the quantile; Otsu needs none.
    """

    kind: Literal["fixed", "quantile", "otsu"]
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "quantile", "otsu") or (self.kind == "quantile" and not 0 <= self.value < 1):
            raise BadInputError(f"no threshold {self.kind!r} {self.value}; kinds are fixed, quantile (0 to 1) and otsu")

    def choose(self, values: Float[Tensor, "height width"]) -> Bool[Tensor, "height width"]:
        """The pixels above the threshold; never one without a value."""
        known = values[~values.isnan()]
        if not len(known):
            return torch.zeros_like(values, dtype=torch.bool)
        made = {"fixed": lambda: self.value, "quantile": lambda: float(known.quantile(self.value))}
        return values > (otsu(known) if self.kind == "otsu" else made[self.kind]())

    def __str__(self) -> str:
        return "Otsu" if self.kind == "otsu" else f"{self.kind} {self.value:g}"


THRESHOLDS = (
    *(Threshold("fixed", value) for value in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)),
    *(Threshold("quantile", value) for value in (0.75, 0.8, 0.85, 0.9, 0.95)),
    Threshold("otsu"),
)
"""Those that are tried."""


def otsu(values: Float[Tensor, " n"]) -> float:
    """The value at or below which lies the lower of two classes, their means as far apart as can be (Otsu 1979).

    Maximises w_0 w_1 (m_0 - m_1)^2 over all cuts between different values, w the classes' shares and m their means; of
    values that are all the same it is that value, above which there is none.
    """
    ordered = values.double().sort().values
    count = torch.arange(1, len(ordered), dtype=torch.float64)
    sums = ordered.cumsum(0)
    low, high = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (low - high).square()
    # Within equal values there is no cut.
    between = between.masked_fill(ordered[1:] == ordered[:-1], -1.0)
    if not len(between) or float(between.max()) < 0:
        return float(ordered[-1])
    return float(ordered[int(between.argmax())])


@dataclass(frozen=True)
class Case:
    """A word, its map on a picture, and where it truly is.

    Attributes:
        picture: Number of the picture: what intervals are drawn over.
        word: The word.
        grid: (rows, cols, layers), its probability.
        box: The part of the picture that the grid covers, in pixels of the picture.
        mask: (height, width), the pixels of what the word names.
    """

    picture: int
    word: str
    grid: Float[Tensor, "rows cols l"]
    box: Box
    mask: Bool[Tensor, "height width"]

    def pixels(self, numbers: Sequence[int], layers: Layers) -> Float[Tensor, "height width"]:
        """The map on the picture."""
        height, width = self.mask.shape
        chosen = over_layers(self.grid[..., None], numbers, layers)[..., 0]
        return on_picture(chosen, self.box, (width, height))


@dataclass(frozen=True)
class Setting:
    """Whose probability is looked at, and from where on a pixel is chosen."""

    layers: Layers
    threshold: Threshold


def best_setting(
    cases: Sequence[Case], numbers: Sequence[int], thresholds: Sequence[Threshold] = THRESHOLDS
) -> tuple[Setting, float]:
    """The layer (or all) and threshold of the largest mean IoU, and that IoU; the first of several as good.

    Raises:
        BadInputError: If there are no cases.
    """
    if not cases:
        raise BadInputError("there is no picture with a mask to choose the threshold on")
    scored: dict[Setting, list[float]] = {}
    for case in cases:
        for layers in ("max", *numbers):
            found = case.pixels(numbers, layers)  # type: ignore[arg-type]
            for threshold in thresholds:
                scored.setdefault(Setting(layers, threshold), []).append(  # type: ignore[arg-type]
                    iou(threshold.choose(found), case.mask)
                )
    means = {setting: sum(values) / len(values) for setting, values in scored.items()}
    best = max(means, key=lambda setting: means[setting])
    return best, means[best]


def centre_box(
    size: tuple[int, int], share: float
) -> tuple[Bool[Tensor, "height width"], Float[Tensor, "height width"]]:
    """A box in the middle of a picture, of its shape and a share of its area; and how near each pixel is to the middle.

    Args:
        size: (width, height).
        share: Of the area, 0 to 1: the mean share of the objects to be found.

    Returns:
        The pixels whose centres are in the box, and minus the distance from the middle in the box's own norm, which
        ranks all pixels and so is the fairer rival for AUROC.
    """
    across, down = ((torch.arange(count).double() + 0.5) / count - 0.5 for count in size)
    distance = torch.maximum(down.abs()[:, None], across.abs()[None])
    return distance < share**0.5 / 2, -distance


def patch_shares(case: Case) -> Float[Tensor, "rows cols"]:
    """The share of every patch's pixels that are the word's: the mask as coarse as a map; 0 outside the picture."""
    (height, width), (rows, cols) = case.mask.shape, case.grid.shape[:2]
    left, top, right, bottom = case.box
    down = ((torch.arange(height).double() + 0.5 - top) / (bottom - top) * rows).floor().long()
    across = ((torch.arange(width).double() + 0.5 - left) / (right - left) * cols).floor().long()
    inside = ((down >= 0) & (down < rows))[:, None] & ((across >= 0) & (across < cols))
    cell = (down[:, None] * cols + across)[inside]
    pixels = cell.bincount(minlength=rows * cols)
    own = cell.bincount(case.mask[inside].double(), minlength=rows * cols)
    return (own / pixels.clamp_min(1)).reshape(rows, cols)


def scored(
    cases: Sequence[Case], numbers: Sequence[int], setting: Setting, share: float
) -> dict[str, Float[Tensor, " cases"]]:
    """Per case the IoU and the AUROC over pixels, of the map and of the centre box; and the IoU of the best such map.

    Args:
        cases: Pictures that had no part in choosing the setting.
        numbers: The layers of their maps.
        setting: Whose probability, and which threshold.
        share: Of the box, the mean share of objects on the pictures where the setting was chosen.
    """
    names = ("IoU", "pixel AUROC", "IoU of the centre box", "pixel AUROC of the centre box", "IoU of masks in patches")
    rows: dict[str, list[float]] = {name: [] for name in names}
    for case in cases:
        found, (box, near) = case.pixels(numbers, setting.layers), centre_box(case.mask.shape[::-1], share)  # type: ignore[arg-type]
        values = (
            iou(setting.threshold.choose(found), case.mask),
            auroc(found, case.mask),
            iou(box, case.mask),
            auroc(near, case.mask),
            iou(on_picture(patch_shares(case), case.box, (case.mask.shape[1], case.mask.shape[0])) > 0.5, case.mask),
        )
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
