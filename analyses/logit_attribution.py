"""Direct logit attribution: what embedding, every head, every MLP and every visual token put into a logit.

The stream before the final norm is a sum; with the norm's divisor s held fixed (`hooked_mm.attribution`) so is a logit:

    logit_t = sum over components c of  x_c . u / s  +  W_U[t] . beta + b_U[t]        u = gain * W_U[t]

A head's part is split further by where it reads. With A its attention at row t, v the values (those of its group of
heads under grouped-query attention), W_O[h] its part of the output projection:

    x_{L,h} = sum over positions k of  A[t, k] W_O[h] v[k]

so that every head has a part from every position, image positions among them, and the parts add up to the head's. The
projection's bias, and that of a norm behind it, are a component of their own (`0_attn_bias`); the divisor of a norm
that a block puts behind its attention is held fixed, too. All parts and the last bias sum to the logit: before a
soft-cap, where a model has one, behind a factor on its logits.

Direct: what a head does through later layers counts as theirs. A cross-attention's output is one component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.tail_logits import tail_logits
from analyses.targets import Targets
from hooked_mm import attribution
from hooked_mm.access import linear_map
from hooked_mm.attention_rows import attention_rows, pattern_layers
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.norms import NormFormula, at_least_float32, norm_gain, norm_of, norm_scale
from hooked_mm.runner import Hook, HookSpec
from hooked_mm.structure import scale_factor


@dataclass(frozen=True)
class LogitShares:
    """What every part puts into the logit of every target, or into its difference from the foil's.

    Attributes:
        labels: `embed`, `L0H0`, ..., `0_attn_bias`, `0_mlp_out`, ..., `bias`, in the order of execution.
        shares: One row per label.
        sources: Layer -> what each head puts in from each position; zero behind the target's row.
        logits: What the model itself says.
        unsplit: Layers whose heads are not split by position, and why.
    """

    labels: list[str]
    shares: Float[Tensor, "c n"]
    sources: dict[int, Float[Tensor, "n heads p"]]
    logits: Float[Tensor, " n"]
    unsplit: dict[int, str] = field(default_factory=dict)

    def total(self) -> Float[Tensor, " n"]:
        """The sum of all parts: the logit."""
        return self.shares.sum(0)

    def of(self, label: str) -> Float[Tensor, " n"]:
        """One part.

        Raises:
            BadInputError: If there is none of this label.
        """
        if label not in self.labels:
            raise BadInputError(f"there is no part {label!r}; there are {', '.join(self.labels[:6])}, ...")
        return self.shares[self.labels.index(label)]

    def by_position(self, layers: Sequence[int] | None = None) -> Float[Tensor, "n p"]:
        """What all heads of these layers (of all that were split, unless given) put in from each position.

        Raises:
            BadInputError: If one of them was not split, or none was.
        """
        chosen = list(self.sources) if layers is None else list(layers)
        if missing := [layer for layer in chosen if layer not in self.sources]:
            why = self.unsplit.get(missing[0], "it was not asked for")
            raise BadInputError(f"layer {missing[0]} was not split by position: {why}")
        if not chosen:
            raise BadInputError("no layer was split by position")
        return torch.stack([self.sources[layer].sum(1) for layer in chosen]).sum(0)

    def by_kind(self, visual: Bool[Tensor, "n p"]) -> dict[str, Float[Tensor, " n"]]:
        """Sums of parts: heads from image positions, heads from others, MLPs, embedding, and all else: biases, heads of
        layers that were not split.

        Args:
            visual: Which positions are the image's, per target.
        """
        where, kinds = self.by_position(), {"mlp": "_mlp_out", "embedding": "embed"}
        found = {"heads, image": (where * visual).sum(1), "heads, text": (where * ~visual).sum(1)}
        for kind, end in kinds.items():
            found[kind] = self.shares[[label.endswith(end) for label in self.labels]].sum(0)
        return {**found, "other": self.total() - torch.stack(list(found.values())).sum(0)}


@dataclass
class _Rows:
    """What hooks keep of a run: of each point the targets' rows; of values all positions."""

    targets: Targets
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    def row(self, value: Tensor, hook: Hook) -> None:
        """Keep the targets' rows."""
        self.rows[hook.name] = value[self.targets.sample, self.targets.row].detach()

    def all(self, value: Tensor, hook: Hook) -> None:
        """Keep every position."""
        self.whole[hook.name] = value.detach().clone()


@dataclass(frozen=True)
class _Direction:
    """u / s per target, and what needs no stream."""

    vector: Float[Tensor, "n d"]
    offset: Float[Tensor, " n"]

    def of(self, part: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """A component's share."""
        return (at_least_float32(part).to(self.vector) * self.vector).sum(-1)


def logit_attribution(
    model: HookedMM, batch: Batch, targets: Targets, layers: Sequence[int] | None = None
) -> LogitShares:
    """The parts of the targets' logits, in two forward passes; of the layers asked for also by position.

    Of all points only the targets' rows are kept, of the values of these layers all positions.

    Args:
        model: The model.
        batch: Prompts, or prompts with answers.
        targets: Tokens, with foils or without, and the rows that predict them; several per sample, if wanted.
        layers: Whose heads are split by position. Unless given, all that can be; the others are in `unsplit`.

    Raises:
        BadInputError: If what blocks add does not sum to the stream, or the parts not to the logit; if a layer's heads
            do not add up to what its attention adds; if the heads of a layer that was asked for can't be split.
        UnsupportedModelError: If a norm between a part and the logit is of an unknown formula.
    """
    names = attribution.component_names(model.hook_points, model.cfg.n_layers)
    there = set(model.hook_points)
    seen = {name for name in there if batch.has_images or not attribution.only_with_images(name, there)}
    listed = [(label, name) for label, name in names if name in seen]
    heads = [layer for layer in range(model.cfg.n_layers) if f"blocks.{layer}.attn.hook_z" in seen]
    unsplit = _unsplit(model, heads)
    if layers is not None and (wrong := [layer for layer in layers if layer not in heads or layer in unsplit]):
        why = unsplit.get(wrong[0], "it has no attention heads")
        raise BadInputError(f"layer {wrong[0]} can't be split by position: {why}; leave it out of layers=")
    split = [layer for layer in heads if layer not in unsplit] if layers is None else list(layers)
    kept, logits = _run(model, batch, targets, [name for _, name in listed], heads, split)
    direction = _direction(model, targets, kept.rows["stream"])
    _check(kept, [name for _, name in listed])
    patterns = _patterns(model, batch, targets, split)
    found: list[tuple[str, Tensor]] = []
    sources: dict[int, Tensor] = {}
    for label, name in listed:
        layer = model.hook_points[name].layer
        if layer not in heads or not name.endswith("hook_attn_out"):
            found.append((label, direction.of(kept.rows[name])))
            continue
        z = at_least_float32(kept.rows[f"blocks.{layer}.attn.hook_z"])
        pulled, bias = _through_projection(model, layer, z, kept.rows[name], direction)
        shares = (z.to(pulled) * pulled).sum(-1)
        found += [(f"L{layer}H{head}", shares[:, head]) for head in range(shares.shape[1])]
        found.append((f"{layer}_attn_bias", bias))
        if layer in patterns:
            value = kept.whole[f"blocks.{layer}.attn.hook_v"]
            parts, why = _by_position(patterns[layer], value, z, pulled, targets)
            if why and layers is not None:
                raise BadInputError(f"layer {layer} can't be split by position: {why}; leave it out of layers=")
            if why:
                unsplit[layer] = why
            else:
                sources[layer] = parts
    found.append(("bias", direction.offset))
    end = model.structure.readout
    made = LogitShares(
        [label for label, _ in found],
        torch.stack([share.cpu() for _, share in found]) * end.logit_scale,
        {layer: value.cpu() * end.logit_scale for layer, value in sources.items()},
        logits.cpu(),
        unsplit,
    )
    if end.logit_cap is None:
        _check_total(made, model.dtype)
    return made


def _unsplit(model: HookedMM, heads: Sequence[int]) -> dict[int, str]:
    """Layers whose heads can't be split by position, as they have no pattern or no values of their own."""
    patterns, found = set(pattern_layers(model)), {}
    for layer in heads:
        if layer not in patterns:
            found[layer] = "it has no attention pattern"
        elif f"blocks.{layer}.attn.hook_v" not in model.hook_points:
            found[layer] = "it has no values of its own, which are latent or another layer's"
    return found


def _check(kept: _Rows, names: Sequence[str]) -> None:
    """Refuse a stream that is no sum of what blocks are seen to add."""
    try:
        attribution.check_sum([kept.rows[name] for name in names], kept.rows["stream"], "the final stream")
    except BadInputError as error:
        raise BadInputError(
            "what the blocks of this model add does not sum to its final stream: they normalise or scale the whole of "
            "it, or a hook wrote there, so no part has a share of a logit"
        ) from error


def _check_total(made: LogitShares, dtype: torch.dtype) -> None:
    """Refuse parts that do not sum to the logit: something else lies between the stream and the logits."""
    distance = (made.total() - made.logits).abs() / made.shares.abs().sum(0).clamp_min(1e-30)
    if float(distance.max()) > (2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4):
        raise BadInputError(
            f"the parts do not sum to the logit (they miss it by {float(distance.max()):.1e} of their size): this "
            "model does more than a norm, an unembedding and a factor behind its last block"
        )


def _run(
    model: HookedMM, batch: Batch, targets: Targets, names: Sequence[str], heads: Sequence[int], split: Sequence[int]
) -> tuple[_Rows, Float[Tensor, " n"]]:
    """One pass: rows of all components, of z and of the last stream, values of the layers to be split; the logits."""
    kept, last = _Rows(targets), f"blocks.{model.cfg.n_layers - 1}."
    ends = [name for name in (f"{last}hook_resid_post", f"{last}hook_insert_out") if name in model.hook_points]
    points = [*names, *(f"blocks.{layer}.attn.hook_z" for layer in heads), *ends]
    hooks: list[HookSpec] = [(list(dict.fromkeys(points)), kept.row)]
    if split:
        hooks.append(([f"blocks.{layer}.attn.hook_v" for layer in split], kept.all))
    with torch.no_grad():
        logits, own = tail_logits(model, batch, targets, hooks)
    kept.rows["stream"] = sum(kept.rows[name] for name in ends if name in kept.rows)  # type: ignore[assignment]
    return kept, own.scores(logits)


def _direction(model: HookedMM, targets: Targets, stream: Float[Tensor, "n d"]) -> _Direction:
    """u / s of every target, the divisor that of its own stream."""
    module, path = model.hf_model.get_submodule, model.structure.final_norm
    norm = None if path is None else module(path)
    formula = None if norm is None else norm_of(norm, stream.shape[-1])
    unembed = linear_map(module(model.structure.unembed), stream.shape[-1])
    vector, offset = attribution.directions(*unembed, norm, targets.token.cpu(), stream.device)
    if targets.foil is not None:
        other = attribution.directions(*unembed, norm, targets.foil.cpu(), stream.device)
        vector, offset = vector - other[0], offset - other[1]
    if formula is None:
        return _Direction(vector, offset)
    return _Direction(_centred(vector, formula) / norm_scale(stream, formula).to(vector), offset)


def _centred(vector: Float[Tensor, "n d"], formula: NormFormula) -> Float[Tensor, "n d"]:
    # (x - mean(x)) . u = x . (u - mean(u))
    return vector - vector.mean(-1, keepdim=True) if formula.centred else vector


def _through_projection(
    model: HookedMM,
    layer: int,
    z: Float[Tensor, "n heads d_head"],
    added: Float[Tensor, "n d"],
    direction: _Direction,
) -> tuple[Float[Tensor, "n heads d_head"], Float[Tensor, " n"]]:
    """The direction as seen by each head's mix of values, and what the biases behind it put in.

    Raises:
        BadInputError: If heads and bias do not add up to what attention adds.
    """
    module, block = model.hf_model.get_submodule, model.structure.text.blocks[layer]
    out: Any = module(f"{block.path}.{block.parts['o']}")
    weight, bias = (value.to(z) for value in linear_map(out, z.shape[-2] * z.shape[-1]))
    whole = z.flatten(1) @ weight.T
    after, rest = attribution.behind_projection(block, module, whole[None], bias)
    try:
        attribution.check_sum([after[0], rest.expand_as(whole)], added, f"attn_out of layer {layer}")
    except BadInputError as error:
        raise BadInputError(
            f"the heads of layer {layer} and their bias do not add up to what its attention adds to the stream: this "
            "model does more behind its output projection than a norm or a factor, or a hook wrote there; its heads "
            "have no shares (component by component, cache.decompose_resid tells them)"
        ) from error
    seen = direction.vector.to(z)
    if "attn" in block.scales:
        seen = seen * scale_factor(module(block.path), block.scales["attn"]).detach().to(z)
    if "attn_after" in block.parts:
        norm = module(f"{block.path}.{block.parts['attn_after']}")
        formula, gain = norm_of(norm, whole.shape[-1]), norm_gain(norm, whole.shape[-1])[0].to(z)
        seen = _centred(seen * gain, formula) / norm_scale(whole + bias, formula)
    pulled = torch.einsum("nd,dhk->nhk", seen, weight.unflatten(1, z.shape[-2:]))
    return pulled, direction.of(rest.expand_as(whole))


def _patterns(
    model: HookedMM, batch: Batch, targets: Targets, layers: Sequence[int]
) -> dict[int, Float[Tensor, "n heads p"]]:
    """Each target's own row of attention, layer by layer."""
    if not layers:
        return {}
    counts = torch.bincount(targets.sample, minlength=len(batch))
    rows = torch.full((len(batch), int(counts.max())), -1)
    place = torch.zeros(len(targets), dtype=torch.long)
    filled = [0] * len(batch)
    for number, (sample, row) in enumerate(zip(targets.sample.tolist(), targets.row.tolist(), strict=True)):
        rows[sample, filled[sample]] = row
        place[number] = filled[sample]
        filled[sample] += 1
    found = attention_rows(model, batch, rows, list(layers))
    return {layer: value[targets.sample, :, place] for layer, value in found.items()}


def _by_position(
    pattern: Float[Tensor, "n heads p"],
    values: Float[Tensor, "b p kv d_head"],
    z: Float[Tensor, "n heads d_head"],
    pulled: Float[Tensor, "n heads d_head"],
    targets: Targets,
) -> tuple[Float[Tensor, "n heads p"], str]:
    """A[t, k] v[k] . W_O[h]^T u / s for every head and position, and why that is not what the heads do, if it isn't."""
    heads, groups = z.shape[1], values.shape[2]
    if pattern.shape[2] != values.shape[1] or values.shape[3] != z.shape[2]:
        return pattern, "its keys are not the sequence's positions, or its values of another width"
    found, mixed = torch.zeros_like(pattern, dtype=pulled.dtype), torch.zeros_like(z)
    for head in range(heads):
        # Heads of a group share its values.
        own = at_least_float32(values[:, :, head * groups // heads]).to(z)[targets.sample]
        weights = pattern[:, head].to(z)
        mixed[:, head] = (weights[:, None] @ own)[:, 0]
        found[:, head] = weights * (own @ pulled[:, head, :, None])[..., 0]
    distance = float((mixed - z).norm() / z.norm().clamp_min(1e-30))
    if distance > (2e-2 if values.dtype in (torch.float16, torch.bfloat16) else 1e-3):
        return found, (
            f"what its heads mix is not their attention times their values (it misses by {distance:.1e}), as a gate or "
            "a norm lies between"
        )
    return found, ""
