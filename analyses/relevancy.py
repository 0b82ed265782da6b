"""Relevancy: how much every position has a part in a token, by attention and its gradients through all layers.

Chefer et al. 2021 (arXiv 2103.15679; 2012.09838). With Abar of a layer (`pattern_gradients`), from R = I, first layer
first:

    self-attention      R_ss <- R_ss + Abar R_ss      R_sq <- R_sq + Abar R_sq
    cross-attention     R_sq <- R_sq + R^_ss^T Abar R^_qq      R_ss <- R_ss + Abar R_qs
    normalised          R^ = S^-1 (R - I) + I, S the row sums of R - I

s are positions of the text, q what it reads by cross-attention. All of one token's relevancy is one row, e_t^T R, and
R = (I + Abar_L) ... (I + Abar_1), so the row is carried from the last layer to the first without any N x N product;
what is carried is the row of R - I, so that small gradients are not lost beside ones. Cross-attention's transpose needs
whole matrices of the text, which are short there. Patches of the tower: `tower_relevancy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.pattern_gradients import PatternGradients, Round, Tell
from analyses.targets import Kind, Targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.structure import PREFIXES

Layers = Sequence[Float[Tensor, "... n n"] | None]
ROLES = ("attn", "xattn")


def self_attention(relevancy: Float[Tensor, "... s m"], weighted: Float[Tensor, "... s s"]) -> Float[Tensor, "... s m"]:
    """R + Abar R, for R_ss as for R_sq (eq. 6 and 7)."""
    return relevancy + weighted @ relevancy


def normalised(relevancy: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """R^ = S^-1 (R - I) + I (eq. 8 and 9); a row without anything beyond I stays that of I."""
    identity = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)
    return shares(relevancy - identity) + identity


def shares(values: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """Rows divided by their sums; a row of zeros stays one."""
    total = values.sum(dim=-1, keepdim=True)
    return values / total.where(total > 0, 1)


def cross_attention(
    own: Float[Tensor, "... s s"],
    read: Float[Tensor, "... s q"],
    weighted: Float[Tensor, "... s q"],
    source: Float[Tensor, "... q q"] | None = None,
    back: Float[Tensor, "... q s"] | None = None,
) -> tuple[Float[Tensor, "... s s"], Float[Tensor, "... s q"]]:
    """R_ss and R_sq behind a layer in which s attends to q (eq. 10 and 11).

    Args:
        own: R_ss.
        read: R_sq.
        weighted: Abar of the layer.
        source: R_qq; that of a source whose positions have not mixed, I, unless given.
        back: R_qs; that of a source that never reads the text, 0, unless given.
    """
    mixed = weighted if source is None else weighted @ normalised(source)
    return own if back is None else own + weighted @ back, read + normalised(own).transpose(-1, -2) @ mixed


def beyond(row: Float[Tensor, "... n"], layers: Layers) -> Float[Tensor, "... n"]:
    """row (R - I), R of these layers in their order; carried from the last to the first.

    Args:
        row: Weights of the stack's outputs: e_t for the relevancy of position t.
        layers: Abar of each, first layer first; None for a layer that has no part.
    """
    found = torch.zeros_like(row)
    for weighted in reversed(layers):
        if weighted is not None:
            found = found + ((row + found)[..., None, :] @ weighted.to(found))[..., 0, :]
    return found


def row_sums(layers: Layers, like: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """Sums of the rows of R - I, carried from the first layer to the last."""
    found = torch.zeros_like(like)
    for weighted in layers:
        if weighted is not None:
            found = found + (weighted.to(found) @ (1 + found)[..., None])[..., 0]
    return found


def through(row: Float[Tensor, "... n"], layers: Layers, *, normalise: bool = True) -> Float[Tensor, "... n"]:
    """row R^, or row R: what stands on a stack's outputs, seen at its inputs.

    Args:
        row: Weights of the stack's outputs.
        layers: Abar of each, first layer first; None for a layer that has no part.
        normalise: R^ instead of R.
    """
    if not normalise:
        return row + beyond(row, layers)
    total = row_sums(layers, row)
    return row + beyond(torch.where(total > 0, row / total.where(total > 0, 1), 0), layers)


@dataclass(frozen=True)
class Relevancies:
    """What every target's prediction rests on; parts of R - I at its row t.

    Attributes:
        targets: The tokens, n of them.
        scores: (n,), their logits or log-probabilities.
        positions: (n, p), the positions where pictures stand (of an encoder-decoder, its encoder's): shares that add up
            to one where they are those of one stack, R_sq R^_qq of an encoder.
        decoder: (n, q), of an encoder-decoder, shares of the decoder's positions.
        keys: (n, k), where pictures are read by cross-attention, R_sq over what is read.
    """

    targets: Targets
    scores: Float[Tensor, " n"]
    positions: Float[Tensor, "n p"]
    decoder: Float[Tensor, "n q"] | None = None
    keys: Float[Tensor, "n k"] | None = None


def stack_points(model: HookedMM, stream: str, batch: Batch) -> list[str]:
    """The patterns of a stack's layers, in execution order; of those that this batch reaches.

    Args:
        model: The model.
        stream: `text`, `encoder` or `vision`.
        batch: What it will run on.

    Raises:
        BadInputError: If a layer moves information between positions by something that has no pattern.
    """
    stack, found = model.structure.stacks[stream], set()
    for layer, block in enumerate(stack.blocks):
        names = [f"{PREFIXES[stream]}blocks.{layer}.{role}.hook_pattern" for role in ROLES if role in block.parts]
        lacking = [name for name in names if name not in model.hook_points]
        if lacking or (not names and block.mixing is not None) or "mixer" in block.parts or block.map:
            why = f"there is no {lacking[0]}" if lacking else f"its {block.kind} mixes them without attention"
            raise BadInputError(
                f"relevancy goes by the attention of every layer, but block {layer} of the {stream} stack of this "
                f"{model.cfg.family} model has none to read: {why}; take integrated gradients instead"
            )
        found |= {name for name in names if batch.has_images or not model.hook_points[name].needs_image}
    return [name for name in model.hook_names if name in found]


def text_points(model: HookedMM, batch: Batch) -> list[str]:
    """The patterns of encoder and decoder; as `stack_points`."""
    streams = [stream for stream in ("encoder", "text") if stream in model.structure.stacks]
    return [name for stream in streams for name in stack_points(model, stream, batch)]


def of_text(found: PatternGradients, one: Round, *, normalise: bool = True) -> Relevancies:
    """The relevancy of one round's targets, from the patterns of encoder and decoder.

    Args:
        found: Of one forward pass with all patterns of `text_points`.
        one: A round of its backward passes.
        normalise: Divide rows of R - I by their sums, as the paper does; False leaves R's own numbers.

    Raises:
        BadInputError: If a layer's queries and keys are not the same positions.
    """
    samples, rows = one.targets.sample, one.targets.row
    weighted = {
        name: None if value is None else value[samples.to(value.device)]
        for name, value in one.weighted.items()
        if name.startswith(("blocks.", "encoder."))
    }
    names = [name for name in weighted if name.startswith("blocks.")]
    for name in names:
        queries, keys = found.patterns[name].shape[-2:]
        if queries != keys and ".attn." in name:
            raise BadInputError(
                f"{name!r} has {queries} queries and {keys} keys: one pattern over the decoder's positions and what it "
                "reads besides, for which there is no rule; take integrated gradients instead"
            )
    divided = shares if normalise else torch.clone
    cross = [name for name in names if ".xattn." in name]
    first = found.patterns[names[0]]
    if not cross:
        one_hot = torch.nn.functional.one_hot(rows, first.shape[-2]).to(first.device, torch.float64)
        positions = divided(beyond(one_hot, [weighted[name] for name in names]))
        return Relevancies(one.targets, found.scores[one.places], positions)
    sizes = (len(rows), first.shape[-2], found.patterns[cross[0]].shape[-1])
    own, read = whole({name: weighted[name] for name in names}, sizes, first.device)
    here, rows = torch.arange(len(rows), device=own.device), rows.to(own.device)
    row, sources = own[here, rows], read[here, rows]
    row[here, rows] -= 1
    encoder = [value for name, value in weighted.items() if name.startswith("encoder.")]
    scores = found.scores[one.places]
    if not encoder:
        return Relevancies(one.targets, scores, divided(row), keys=sources)
    return Relevancies(one.targets, scores, through(sources, encoder, normalise=normalise), decoder=divided(row))


def whole(
    weighted: Mapping[str, Float[Tensor, "m s k"] | None],
    sizes: tuple[int, int, int],
    device: torch.device,
) -> tuple[Float[Tensor, "m s s"], Float[Tensor, "m s k"]]:
    """R_ss and R_sq of a decoder with cross-attention, of a source that has not mixed; in float64.

    Args:
        weighted: Name -> Abar of self-attention (`.attn.`) or cross-attention (`.xattn.`), in execution order.
        sizes: (m, s, k), how many at once, positions of the decoder, and of what it reads.
        device: Where.
    """
    own = torch.eye(sizes[1], dtype=torch.float64, device=device).repeat(sizes[0], 1, 1)
    read = own.new_zeros(sizes)
    for name, value in weighted.items():
        if value is None:
            continue
        if ".xattn." in name:
            own, read = cross_attention(own, read, value.to(own))
        else:
            own, read = self_attention(own, value.to(own)), self_attention(read, value.to(own))
    return own, read


def relevancies(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    *,
    kind: Kind = "logit",
    normalise: bool = True,
    tell: Tell | None = None,
) -> Relevancies:
    """The relevancy of the language model's positions to each target; the tower's patterns are not computed.

    Args:
        model: The model.
        batch: With answers that hold the targets.
        targets: The tokens to explain, from `targets.answer_targets`.
        kind: The token's logit or log-probability.
        normalise: As in `of_text`.
        tell: Called in front of every backward pass.

    Raises:
        BadInputError: If a layer has no pattern, or the model's attention has no rule; it says which.
    """
    found = PatternGradients(model, batch, targets, text_points(model, batch), kind)
    rounds = [(one.places, of_text(found, one, normalise=normalise)) for one in found.rounds(tell)]
    return combined(targets, [part for _, part in rounds], torch.cat([places for places, _ in rounds]))


def combined(targets: Targets, parts: Sequence[Relevancies], numbers: Int[Tensor, " n"]) -> Relevancies:
    """The relevancies of all rounds in the order of the targets.

    Args:
        targets: All.
        parts: Of some of the targets each.
        numbers: Which those are, part by part.
    """
    order = numbers.argsort()
    made: dict[str, Any] = {}
    for name in ("scores", "positions", "decoder", "keys"):
        values = [getattr(part, name) for part in parts]
        made[name] = None if values[0] is None else torch.cat([value.cpu() for value in values])[order]
    return Relevancies(targets, **made)
