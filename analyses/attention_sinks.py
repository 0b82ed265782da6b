"""Attention sinks, and the modality budget of attention: who takes how much, per layer and head.

A *sink* is a key that receives far more than its share (Xiao et al. 2023, arXiv 2309.17453). By Gu et al. 2024 (arXiv
2410.10781), with Q_k the queries that can see key k (in causal attention those from k on):

    received  alpha_k = sum over q in Q_k of A[h, q, k] / |Q_k|        sink: alpha_k > epsilon, .3 unless given

Keys that few queries can see are no sinks, whatever they receive: the last position sees itself.

*Visual sinks* are image tokens with massive activations of the residual stream in the dimensions in which the first
position has them (Kang et al. 2025, arXiv 2503.03321; Sun et al. 2024, arXiv 2402.17762):

    phi(x) = max over d in D of |x_d| / sqrt(mean of x^2)               sink: phi(x) >= tau

tau is the authors' 20, whose models are 4096 wide. |x_d| / rms is sqrt(width) at most, so below a width of 1024 tau is,
unless given, .625 sqrt(width): the dimension holds 39 % of the state's sum of squares, as it does with 20 at 1024.

The *budget* is what share of the attention of a kind of query goes to a kind of key, mean over the queries:

    budget[h, Q, K] = mean over q in Q of sum over k in K of A[h, q, k]

Rows are computed some at a time; of a pattern nothing is kept but these sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from analyses.key_groups import Groups, key_groups
from hooked_mm.attention_rows import Part, each_row, pattern_layers
from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.runner import Hook

EPSILON = 0.3
LEAST = 8
"""Queries that must be able to see a key before it may be called a sink."""

KEYS = ("first", "image", "question", "template", "answer")
QUERIES = ("image", "question", "template", "answer")


def tau_of(width: int) -> float:
    """The least phi of a visual sink in a model of this width."""
    return min(20.0, 0.625 * math.sqrt(width))


def loudness(states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """|x_d| / rms(x) of every dimension, in at least float32; 0 for a state that is 0."""
    wide = states.detach().to(torch.promote_types(states.dtype, torch.float32)).abs()
    rms = wide.pow(2).mean(-1, keepdim=True).sqrt()
    return wide / rms.where(rms > 0, 1)


def sink_dimensions(first: Float[Tensor, "n d"], tau: float) -> list[int]:
    """The dimensions in which first positions have massive activations: their mean loudness is tau at least.

    Args:
        first: The residual stream at the first positions of several samples, of one layer.
        tau: See the file's text.

    Raises:
        BadInputError: If tau is beyond what the width allows.
    """
    if not 0 < tau <= math.sqrt(first.shape[-1]):
        raise BadInputError(
            f"tau={tau}; in a stream of width {first.shape[-1]} no value is more than {math.sqrt(first.shape[-1]):.3g} "
            "times the root mean square; choose one above 0 and below that"
        )
    return (loudness(first).mean(0) >= tau).nonzero()[:, 0].tolist()


def sink_strength(states: Float[Tensor, "*n d"], dimensions: Sequence[int]) -> Float[Tensor, "*n"]:
    """phi(x) of states; 0 without any dimension."""
    if not dimensions:
        return torch.zeros(states.shape[:-1], device=states.device)
    return loudness(states)[..., list(dimensions)].amax(-1)


def sinks(
    received: Float[Tensor, "b heads k"], seen: Int[Tensor, "b k"], epsilon: float = EPSILON, least: int = LEAST
) -> Bool[Tensor, "b heads k"]:
    """Which keys are sinks of which heads.

    Args:
        received: alpha.
        seen: How many queries can see each key.
        epsilon: What a sink receives more than.
        least: Queries that must see a key.

    Raises:
        BadInputError: If epsilon is no share, or `least` no count.
    """
    if not 0 < epsilon < 1 or least < 1:
        raise BadInputError(f"epsilon={epsilon}, least={least}; give a share between 0 and 1, and one query at least")
    return (received > epsilon) & (seen >= least)[:, None]


def heads_with_a_sink(found: Bool[Tensor, "b heads k"], group: Bool[Tensor, "b k"]) -> Float64[Tensor, "b heads"]:
    """1 for a head that has a sink among a group's keys, else 0; NaN for a sample without such keys."""
    any_ = (found & group[:, None]).any(-1).double()
    return any_.masked_fill(~group.any(-1)[:, None], torch.nan)


@dataclass
class Ledger:
    """Sums over queries of one attention, filled some rows at a time.

    Attributes:
        queries: Kind of query -> (b, q), which positions are of it.
        keys: Kind of key -> (b, k).
        valid: (b, q), queries that are no padding.
        causal: Queries see keys up to their own position (where a window hides some, these count as given nothing);
            otherwise every key.
        received: (b, heads, k) float64, summed attention.
        seen: (b, k), queries that can see each key.
        spent: (b, heads, queries, keys) float64, summed by kinds.
    """

    queries: Groups
    keys: Groups
    valid: Bool[Tensor, "b q"]
    causal: bool = True
    received: Tensor = field(default_factory=lambda: torch.zeros(()))
    seen: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    spent: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, pattern: Float[Tensor, "b heads r k"], rows: Int[Tensor, "b r"]) -> None:
        """Attention of these rows, which are not added twice."""
        rows = rows.to(pattern.device)
        count = self.valid.to(rows.device).gather(1, rows)
        wide = pattern.double().masked_fill(~count[:, None, :, None], 0)
        kinds = torch.stack([mask.to(rows.device) for mask in self.keys.values()], dim=-1)
        every = kinds.any(-1)
        order = torch.arange(pattern.shape[-1], device=rows.device)
        # Where an image sees all of itself, a query may give to a key behind it.
        sight = (order <= rows[..., None]) | (wide > 0).any(1) if self.causal else torch.ones_like(wide[:, 0]).bool()
        sight = sight & count[..., None] & every[:, None]
        shares = wide @ kinds.double()[:, None]
        own = torch.stack([mask.to(rows.device).gather(1, rows) for mask in self.queries.values()], dim=1)
        self.received = self.received + wide.sum(2)
        self.seen = self.seen + sight.sum(1)
        self.spent = self.spent + torch.einsum("bqr,bhrk->bhqk", own.double(), shares)

    def alpha(self) -> Float64[Tensor, "b heads k"]:
        """What each key receives of the queries that can see it; 0 where none can."""
        return self.received / self.seen.clamp_min(1)[:, None]

    def budget(self) -> Float64[Tensor, "b heads queries keys"]:
        """Shares by kinds; NaN for a kind of query or key that a sample has none of."""
        number = torch.stack([(mask & self.valid).sum(1) for mask in self.queries.values()], dim=1)
        lacking = torch.stack([~mask.any(1) for mask in self.keys.values()], dim=1)
        shares = self.spent / number.to(self.spent.device)[:, None, :, None]
        return shares.masked_fill(lacking.to(shares.device)[:, None, None], torch.nan)


def query_groups(batch: Batch) -> Groups:
    """Kinds of queries; `answer` are the rows that predict the answer's tokens, or would predict its first.

    The last token of an answer predicts nothing of it, and is of no kind.

    Raises:
        BadInputError: If roles are unknown.
    """
    text = batch.decoder or batch
    if bool((text.role == Role.UNKNOWN).any()):
        raise BadInputError("this batch was made from raw tensors, so roles are unknown; make it with model.prepare")
    there = text.modality != Modality.PAD
    answer = text.role == Role.ANSWER
    # A position says what stands at the next one that is no padding.
    saying = torch.zeros_like(answer)
    for sample in range(len(text)):
        own = there[sample].nonzero()[:, 0]
        saying[sample, own[:-1]] = answer[sample, own[1:]]
    bare = ~saying.any(1)
    last = text.last_prompt().to(saying.device)
    saying[bare] = torch.arange(saying.shape[1], device=saying.device) == last[bare][:, None]
    kinds = {"image": text.modality == Modality.IMAGE}
    kinds |= {"question": text.role == Role.QUESTION, "template": text.role == Role.TEMPLATE}
    return {**{name: mask & there & ~saying for name, mask in kinds.items()}, "answer": saying}


def attention_ledgers(
    model: HookedMM,
    batch: Batch,
    layers: Sequence[int] | None = None,
    part: Part = "attn",
    chunk: int = 64,
) -> dict[int, Ledger]:
    """The sums of every layer, in one pass.

    Args:
        model: The model.
        batch: Padded on either side, with or without answers.
        layers: Layer numbers from 0; None for all that have a pattern.
        part: Self-attention of the text, or cross-attention.
        chunk: Queries at a time: samples x heads x chunk x keys numbers are held.

    Raises:
        BadInputError: If roles are unknown; as in `each_row`.
        UnknownHookError: If a layer has no such pattern.
    """
    text = batch.decoder or batch
    valid, queries = text.modality != Modality.PAD, query_groups(batch)
    rows = torch.arange(text.modality.shape[1]).expand(len(text), -1)
    found: dict[int, Ledger] = {}

    def visit(layer: int, start: int, pattern: Tensor) -> None:
        if layer not in found:
            keys = key_groups(batch, pattern.shape[-1], part, first=True)
            found[layer] = Ledger(queries, keys, valid, causal=part == "attn")
        found[layer].add(pattern, rows[:, start : start + pattern.shape[2]])

    chosen = pattern_layers(model, part=part) if layers is None else layers
    each_row(model, batch, rows, visit, chosen, part=part, chunk=chunk)
    return {layer: found[layer] for layer in sorted(found)}


def first_states(model: HookedMM, batch: Batch, layers: Sequence[int]) -> dict[int, Float[Tensor, "b d"]]:
    """The stream that enters each layer, at every sample's first position; nothing else is kept."""
    text = batch.decoder or batch
    first = (text.modality != Modality.PAD).long().argmax(1)
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor, hook: Hook) -> None:
        assert hook.layer is not None
        kept[hook.layer] = value[torch.arange(len(value), device=value.device), first.to(value.device)].clone()

    _watch(model, batch, layers, keep)
    return kept


def strengths(
    model: HookedMM, batch: Batch, dimensions: Sequence[int], layers: Sequence[int]
) -> dict[int, Float[Tensor, "b p"]]:
    """phi of every position of the stream that enters each layer; nothing else is kept."""
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor, hook: Hook) -> None:
        assert hook.layer is not None
        kept[hook.layer] = sink_strength(value, dimensions).cpu()

    _watch(model, batch, layers, keep)
    return kept


def _watch(model: HookedMM, batch: Batch, layers: Sequence[int], keep: Callable[[Tensor, Hook], None]) -> None:
    with torch.no_grad():
        names = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
        # Behind the last layer asked nothing is computed.
        model.run_with_hooks(batch, [(names, keep)], stop_at_layer=max(layers) + 1)
