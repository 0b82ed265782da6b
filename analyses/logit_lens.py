"""The logit lens: which words a layer's stream would already say, p^l = softmax(unembed(norm(h^l))).

h^l is the residual stream behind l blocks, h^0 what enters the first one (nostalgebraist, "interpreting GPT: the logit
lens", 2020). norm and unembed are the model's own, with its logit scale and soft-cap (`HookedMM.to_logits`); h^L is
the stream in front of the final norm, so that the last layer is normed once and gives the model's own logits.

Logits over a vocabulary are large: they are made and reduced to the most probable words for a few rows at a time, and
those of a whole sample are never held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM

BUDGET = 2**24
"""Logits that are made at once: 64 MiB in float32, of which two or three copies are held."""

STREAM = "resid"
"""The residual stream between blocks, as a point."""


class Unembeds(Protocol):
    """What is needed of a model: a `HookedMM`, or its `unembedding` alone."""

    @property
    def cfg(self) -> Any:
        """`d_vocab`."""
        ...

    def to_logits(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """unembed(norm(resid)), with scale and soft-cap."""
        ...


@dataclass(frozen=True)
class Cells:
    """What the lens reads, on the CPU; `...` is what was asked about: rows, or layers and rows.

    Attributes:
        ids: (..., k) int64, the most probable words, most probable first.
        probabilities: (..., k) float32.
        entropy: (...) float32, -sum p log p over the vocabulary, in nats.
        rank: (...) int64, how many words are more probable than the chosen one; None if none was chosen.
        chosen: (...) float32, the chosen word's probability; None if none was chosen.
    """

    ids: Int[Tensor, "... k"]
    probabilities: Float[Tensor, "... k"]
    entropy: Float[Tensor, "..."]
    rank: Int[Tensor, "..."] | None = None
    chosen: Float[Tensor, "..."] | None = None


@dataclass(frozen=True)
class Lens:
    """One sample through the lens.

    Attributes:
        layers: Number -> hook name, in order. n is the stream behind n blocks, or what lies within the n-th block.
        positions: (n,) int64, the sample's own positions in the batch (an encoder-decoder's in its decoder).
        cells: What is read at (layers, n).
        words: (n,) int64, the chosen word of every position; None if none was chosen.
    """

    layers: dict[int, str]
    positions: Int[Tensor, " n"]
    cells: Cells
    words: Int[Tensor, " n"] | None


def read_cells(
    model: Unembeds,
    resid: Float[Tensor, "n ..."],
    top: int = 5,
    words: Int[Tensor, " n"] | int | None = None,
    budget: int = BUDGET,
) -> Cells:
    """Most probable words of rows of a residual stream; probabilities, entropy and ranks in float32.

    Norm and unembedding compute in the dtype of their weights, so that the last layer gives the model's own logits.

    Args:
        model: Whose norm and unembedding to use.
        resid: (n, d) rows (in a model of several streams (n, streams, d)), of any dtype.
        top: k, how many words; the whole vocabulary if it has fewer.
        words: A word's token id for all rows or each, whose rank and probability are told too.
        budget: How many logits may be held at once; at least those of one row are.

    Raises:
        BadInputError: If `top` is not positive, a token is not of the vocabulary, or their number is not that of rows.
    """
    vocabulary = int(model.cfg.d_vocab)
    if top < 1:
        raise BadInputError(f"top={top}: at least one word must be asked for")
    wanted = _wanted(words, len(resid), vocabulary)
    rows = max(1, budget // vocabulary)
    parts = [
        _read(model, resid[start : start + rows], top, None if wanted is None else wanted[start : start + rows])
        for start in range(0, max(1, len(resid)), rows)
    ]
    return _joined(parts, torch.cat)


def _wanted(words: Int[Tensor, " n"] | int | None, rows: int, vocabulary: int) -> Int[Tensor, " n"] | None:
    """The chosen word of every row."""
    if words is None:
        return None
    wanted = torch.as_tensor(words).cpu().long()
    wanted = wanted.expand(rows) if wanted.ndim == 0 else wanted
    if len(wanted) != rows:
        raise BadInputError(f"{len(wanted)} words were chosen for {rows} rows; give one for all, or one for each")
    outside = wanted[(wanted < 0) | (wanted >= vocabulary)]
    if len(outside):
        raise BadInputError(f"token {int(outside[0])} is not one of a vocabulary of {vocabulary}; give token ids")
    return wanted


def _read(model: Unembeds, resid: Tensor, top: int, words: Tensor | None) -> Cells:
    """All rows at once."""
    logs = model.to_logits(resid).float().log_softmax(dim=-1)
    best = logs.topk(min(top, logs.shape[-1]), dim=-1)
    rank, chosen = None, None
    if words is not None:
        own = logs.gather(-1, words.to(logs.device)[:, None])
        rank, chosen = (logs > own).sum(dim=-1).cpu(), own[:, 0].exp().cpu()
    # In place, as this is the largest tensor that there is; a word that is never said adds nothing.
    probabilities = logs.exp_()
    entropy = torch.special.entr(probabilities, out=probabilities).sum(dim=-1)
    return Cells(best.indices.cpu(), best.values.exp().cpu(), entropy.cpu(), rank, chosen)


def _joined(parts: Sequence[Cells], join: Callable[[list[Tensor]], Tensor]) -> Cells:
    """Several as one; all of them have chosen words, or none has."""
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return Cells(**{name: join([getattr(part, name) for part in parts]) for name in names})


def lens_points(hook_names: Iterable[str], point: str = STREAM, layers: Iterable[int] | None = None) -> dict[int, str]:
    """Layer number -> hook name of what the lens shall look at, in order.

    Args:
        hook_names: Of the model.
        point: `"resid"`, the stream, which begins with 0 in front of the first block; or a (b, p, d) point within the
            blocks, `"resid_mid"`, `"attn_out"`, `"mlp_out"`, ..., which has in block l - 1 the number l of the stream
            that this block makes.
        layers: Numbers to keep, negative ones from the end; all that there are unless given.

    Raises:
        BadInputError: If the model's blocks have no such point, or none at a layer that is asked for.
    """
    names = list(hook_names)
    stream = point in (STREAM, "resid_post", "hook_resid_post")
    inner = "hook_resid_post" if stream else point if "hook_" in point else f"hook_{point}"
    found = {
        int(match[1]) + 1: name
        for name in names
        if (match := re.fullmatch(rf"blocks\.(\d+)\.{re.escape(inner)}", name))
    }
    if not found:
        known = sorted({name.split(".", 2)[2] for name in names if name.startswith("blocks.")})
        raise unknown("point of the blocks", inner, known)
    if stream:
        first = next(name for name in ("blocks.0.hook_resid_pre", "hook_embed") if name in names)
        found = {0: first, **found}
    if layers is None:
        return found
    last = max(found)
    asked = {number + last + 1 if number < 0 else number for number in layers}
    if lacking := sorted(asked - set(found)):
        raise BadInputError(
            f"layer {lacking[0]} was asked for; {inner!r} has the layers {min(found)} to {last}: choose among these"
        )
    return {number: name for number, name in found.items() if number in asked}


@torch.no_grad()
def logit_lens(
    model: HookedMM,
    batch: Batch | Mapping[str, Any],
    *,
    layers: Iterable[int] | None = None,
    point: str = STREAM,
    top: int = 5,
    words: Literal["last"] | int | None = "last",
    budget: int = BUDGET,
    where: Bool[Tensor, "b p"] | None = None,
    tell: Callable[[str, int, int], object] | None = None,
) -> list[Lens]:
    """One forward pass, and what every asked layer would say at every position, image positions among them.

    Layers above the deepest one asked for do not run. Streams are kept in the model's dtype while they are read.

    Args:
        model: The model.
        batch: From `prepare`, or a mapping of the model's own forward tensors.
        layers: Numbers as in `lens_points`.
        point: As in `lens_points`.
        top: Words per cell.
        words: Whose rank and probability every cell tells: `"last"`, what the deepest layer asked for says first at
            that position; a token id; or None.
        budget: As in `read_cells`.
        where: Only these positions (of an encoder-decoder, of its decoder) are read; all but padding unless given.
        tell: Called before each layer is read, with what is done, how many were and how many there are; may raise.

    Returns:
        One per sample, in the batch's order.

    Raises:
        BadInputError: As in `lens_points` and `read_cells`; if `where` is not of the batch's positions.
    """
    if isinstance(words, str) and words != "last":
        raise BadInputError(f"words={words!r}; it must be 'last', a token id or None")
    names = lens_points(model.hook_names, point, layers)
    deepest = max(names)
    # In front of the head, which would make the logits of all positions.
    _, cache = model.run_with_cache(batch, list(names.values()), stop_at_layer=max(1, deepest))
    text = cache.batch.decoder or cache.batch
    if where is not None and where.shape != text.modality.shape:
        raise BadInputError(f"where is {tuple(where.shape)}; the batch's positions are {tuple(text.modality.shape)}")
    found = []
    for sample in range(len(cache.batch)):
        places = cache.select(names[deepest], sample=sample).position.cpu()
        kept = slice(None) if where is None else where[sample].cpu()[places]

        def values(name: str, sample: int = sample, kept: slice | Tensor = kept) -> Tensor:
            every = cache.select(name, sample=sample).values
            return every[kept if isinstance(kept, slice) else kept.to(every.device)]

        last = values(names[deepest])
        said = read_cells(model, last, 1, None, budget).ids[:, 0] if isinstance(words, str) else words
        rows = []
        for number, name in enumerate(names.values()):
            if tell is not None:
                tell("reading layers through the lens", number, len(names))
            rows.append(read_cells(model, values(name), top, said, budget))
        chosen = _wanted(said, len(last), int(model.cfg.d_vocab))
        found.append(Lens(names, places[kept], _joined(rows, torch.stack), chosen))
    return found
