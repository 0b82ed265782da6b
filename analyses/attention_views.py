"""What the model attends to when it says each token of its answer.

The row of an answer token is the row that *predicts* it, t = q - 1 for the token at position q: the token's own row
already attends on behalf of the next one. With A^l (heads, rows, keys) and a set of columns S (the image's, the
question's, patches that were clicked):

    mean   sum over k in S of A^l[h, t, k] / |S|      (heads x layers, as in LVLM-Interpret, arXiv 2404.03118)
    share  sum over k in S of A^l[h, t, k]
    map    A^l[h, t, image positions] on the picture's patches

Heads are chosen first and averaged afterwards, if at all. Attention is taken in one teacher-forced pass over prompt and
answer, of the asked rows and layers alone; a generation that is looked at holds none (`hooked_mm.attention_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from analyses.key_groups import key_groups
from analyses.picture_maps import PictureMap, picture_maps
from analyses.targets import Targets, Which, answer_targets, special_ids
from hooked_mm.attention_rows import Part, attention_rows, pattern_layers
from hooked_mm.batch import Batch
from hooked_mm.connector import Connector, connector_map
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM


def column_mean(pattern: Float[Tensor, "n heads k"], columns: Bool[Tensor, "n k"]) -> Float[Tensor, "n heads"]:
    """The mean of each row over its columns, float64; NaN for a row without any."""
    return column_share(pattern, columns) / columns.sum(1, keepdim=True).to(pattern.device)


def column_share(pattern: Float[Tensor, "n heads k"], columns: Bool[Tensor, "n k"]) -> Float[Tensor, "n heads"]:
    """How much of each row goes to its columns, float64: 0 for none of them, 1 for all."""
    return pattern.double().masked_fill(~columns[:, None].to(pattern.device), 0).sum(-1)


def choose_heads(pattern: Float[Tensor, "n heads k"], heads: Sequence[int], *, mean: bool) -> Float[Tensor, "n h k"]:
    """Some heads, and then their mean if it is asked for: the mean of what was chosen, not a choice of the mean.

    Args:
        pattern: Of all heads.
        heads: Numbers of those that are kept, in this order.
        mean: Give their mean, (n, 1, k).

    Raises:
        BadInputError: If a head does not exist, or none is chosen.
    """
    if not heads or not all(0 <= head < pattern.shape[1] for head in heads):
        raise BadInputError(f"heads {list(heads)} of {pattern.shape[1]}; choose one at least, counted from 0")
    chosen = pattern[:, list(heads)]
    return chosen.mean(1, keepdim=True) if mean else chosen


@dataclass(frozen=True)
class AnswerAttention:
    """Attention of the rows that predict answer tokens.

    Attributes:
        targets: The tokens, n of them; `row` is whose attention it is.
        patterns: Layer -> (n, heads, k), what each head gives to each key.
        groups: Kind of key -> (n, k), which keys are of it: `image`, `question`, `template`, `answer`.
        heads: The numbers of the heads.
        part: `attn`, or `xattn` for cross-attention, whose keys are the picture's or the encoder's.
    """

    targets: Targets
    patterns: Mapping[int, Float[Tensor, "n heads k"]]
    groups: Mapping[str, Bool[Tensor, "n k"]]
    heads: Sequence[int]
    part: Part = "attn"

    def __len__(self) -> int:
        return len(self.targets)

    def by_head(self, columns: str | Bool[Tensor, "n k"], *, share: bool = False) -> Float[Tensor, "n layers heads"]:
        """Heads x layers of every token: the mean over columns, or their share.

        Args:
            columns: A group's name, or the columns of each token.
            share: The sum instead of the mean.

        Raises:
            BadInputError: For an unknown group, or columns of another shape.
        """
        if isinstance(columns, str):
            if columns not in self.groups:
                raise BadInputError(f"there are no columns {columns!r}; known: {', '.join(self.groups)}")
            columns = self.groups[columns]
        expected = (len(self), next(iter(self.patterns.values())).shape[2])
        if tuple(columns.shape) != expected:
            raise BadInputError(f"columns of shape {tuple(columns.shape)}; they are a mask of {expected}")
        measure = column_share if share else column_mean
        return torch.stack([measure(pattern, columns) for pattern in self.patterns.values()], dim=1).cpu()


def answer_attention(
    model: HookedMM,
    batch: Batch,
    which: Which = "all",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    part: Part | None = None,
) -> AnswerAttention:
    """Attention of the answers' tokens, in one pass.

    Args:
        model: The model.
        batch: With answers, as `generate(...).batch` has them; padded on either side.
        which: Tokens of the answers; see `targets.answer_targets`.
        layers: Layer numbers from 0; None for all.
        heads: Only these; None for all.
        part: Self-attention or cross-attention; unless given, the one by which the text sees the picture.

    Raises:
        BadInputError: If there are no such tokens; as in `attention_rows`.
        UnknownHookError: If a layer has no such pattern.
    """
    targets = answer_targets(batch, which, special_ids(model))
    part = part or sees_by(model, batch)
    chosen = pattern_layers(model, part=part) if layers is None else list(dict.fromkeys(layers))
    if not chosen:
        raise BadInputError(
            f"attention of no layer was asked for, or this {model.structure.family} has no {part} patterns to look at"
        )
    rows, slot = rows_by_sample(targets, len(batch))
    found = attention_rows(model, batch, rows, chosen, heads, part=part)
    patterns = {layer: found[layer][targets.sample, :, slot] for layer in chosen}
    count, width = patterns[chosen[0]].shape[1:]
    groups = {name: mask[targets.sample.to(mask.device)] for name, mask in key_groups(batch, width, part).items()}
    return AnswerAttention(targets, patterns, groups, list(range(count)) if heads is None else list(heads), part)


def sees_by(model: HookedMM, batch: Batch) -> Part:
    """The attention by which the text sees the picture: cross-attention where that is no part of its sequence."""
    crossed = batch.layout.kind == "cross" or batch.decoder is not None
    return "xattn" if crossed and pattern_layers(model, part="xattn") else "attn"


def seen_through(model: HookedMM, batch: Batch, column: str) -> Part:
    """The attention among whose keys some columns are: `image`, `question`, `template` or `answer`."""
    part = sees_by(model, batch)
    # Cross-attention reads the picture, an encoder's also the prompt; the rest is the text's own.
    read = {"image"} if batch.layout.kind == "cross" else {"image", "question", "template"}
    return part if column in read else "attn"


def rows_by_sample(targets: Targets, samples: int) -> tuple[Int[Tensor, "b r"], Int[Tensor, " n"]]:
    """The targets' rows as a table, -1 where a sample has fewer, and each target's place in its sample's line."""
    counts = torch.zeros(samples, dtype=torch.long)
    slot = torch.empty(len(targets), dtype=torch.long)
    for place, sample in enumerate(targets.sample.tolist()):
        slot[place] = counts[sample]
        counts[sample] += 1
    rows = torch.full((samples, int(counts.max())), -1)
    rows[targets.sample, slot] = targets.row
    return rows, slot


def head_maps(
    model: HookedMM,
    batch: Batch,
    attention: AnswerAttention,
    token: int | None,
    pairs: Sequence[tuple[int, int]],
    images: Sequence[Image.Image],
    connector: Connector | None = None,
) -> dict[tuple[int, int], list[PictureMap]]:
    """What some heads look at when a token is said, over the sample's pictures.

    Args:
        model: The model.
        batch: The batch that the attention is of.
        attention: From `answer_attention`.
        token: Its number among the targets; None for the mean of all, which are of one sample then.
        pairs: (layer, head), as they are numbered in the model.
        images: The sample's pictures.
        connector: Of the batch, for models with a resampler; made unless given.

    Raises:
        BadInputError: If there is no such token, layer or head, or no place in the picture is known.
    """
    if token is not None and not 0 <= token < len(attention):
        raise BadInputError(f"token {token} of {len(attention)}; they are counted from 0")
    samples = set(attention.targets.sample.tolist() if token is None else [int(attention.targets.sample[token])])
    if len(samples) > 1:
        raise BadInputError(
            f"the mean of tokens of samples {sorted(samples)}, which see different pictures; give a token"
        )
    (sample,), found = samples, {}
    if batch.layout.kind == "resampled" and connector is None:
        connector = connector_map(model, batch)
    for layer, head in pairs:
        if layer not in attention.patterns or head not in attention.heads:
            raise BadInputError(
                f"layer {layer}, head {head} was not looked at; there are layers {list(attention.patterns)}, "
                f"heads {list(attention.heads)}"
            )
        own = attention.patterns[layer][:, attention.heads.index(head)]
        values = own.double().mean(0) if token is None else own[token]
        found[layer, head] = picture_maps(model, batch, sample, values, images, connector)
    return found


def strongest(
    values: Float[Tensor, "layers heads"], layers: Sequence[int], heads: Sequence[int], count: int
) -> list[tuple[int, int]]:
    """The (layer, head) pairs of the largest values, largest first; NaN are none."""
    flat = values.double().nan_to_num(nan=-torch.inf).flatten()
    best = [place for place in flat.argsort(descending=True, stable=True).tolist() if flat[place] > -torch.inf]
    return [(layers[place // len(heads)], heads[place % len(heads)]) for place in best[:count]]


def clicked_columns(
    model: HookedMM,
    batch: Batch,
    attention: AnswerAttention,
    sample: int,
    points: Sequence[tuple[int, float, float]],
    images: Sequence[Image.Image],
) -> Bool[Tensor, "n k"]:
    """The keys of the patches at some places of a sample's pictures, for `AnswerAttention.by_head`.

    Where crops and an overview both show a place, both their patches are meant.

    Args:
        model: The model.
        batch: The batch that the attention is of.
        attention: From `answer_attention`.
        sample: Index in the batch.
        points: (picture, x, y), in pixels of the picture.
        images: The sample's pictures.

    Returns:
        True at those keys for every token of the sample's answer, nowhere for the others'.

    Raises:
        BadInputError: If latents stand for the picture, which belong to no place, or no patch covers a point.
    """
    if batch.layout.kind == "resampled":
        raise BadInputError(
            "the picture is told by latents that belong to no place in it, so no key is that of a patch; lay the "
            "attention over the picture instead (head_maps)"
        )
    width = next(iter(attention.patterns.values())).shape[2]
    # Each key's number, laid out as its attention would be.
    numbers = picture_maps(model, batch, sample, torch.arange(width).double(), images)
    chosen = torch.zeros(width, dtype=torch.bool)
    for picture, x, y in points:
        own = [found for one in numbers if one.picture == picture and (found := _cell(one, x, y)) is not None]
        if not own:
            raise BadInputError(f"no patch covers ({x}, {y}) of picture {picture}; give pixels inside of it")
        chosen[own] = True
    return chosen & (attention.targets.sample == sample)[:, None]


def _cell(numbers: PictureMap, x: float, y: float) -> int | None:
    """The number that stands at a place of the picture."""
    left, top, right, bottom = numbers.box
    rows, cols = numbers.values.shape
    row, col = math.floor((y - top) / (bottom - top) * rows), math.floor((x - left) / (right - left) * cols)
    if not (0 <= row < rows and 0 <= col < cols):
        return None
    value = numbers.values[row, col]
    return None if bool(value.isnan()) else int(value)
