"""Multimodal neurons: which neurons of the language model's MLPs turn what an image shows into a word.

Schwettmann et al. 2023 (arXiv 2308.01544). z_k (position p) is the input of the MLP's down projection, after activation
and gate; c the one token predicted at row t. The gradient of the logit at that row, taken at the image positions,

    g_{k,c} = sum over image positions p of  z_k(p) * d logit_c(t) / d z_k(p)

is, to first order, what the logit loses when the neuron is silenced at all of the image. Samples are averaged. A neuron
is decoded by what its column of the down projection writes into the stream, seen through the final norm's gain:

    words_k = W_U (gain * W_down[:, k])

(the norm's divisor, its bias and the unembedding's are the same for all neurons or all positions and are left out; a
LayerNorm's centring, and the gain of a norm that a block puts behind its MLP, are not). Whether such neurons matter is
asked of the model: silence them, and see the logit drop more than with neurons of the same layers and as active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.access import linear_map
from hooked_mm.attribution import layer_count
from hooked_mm.batch import Batch
from hooked_mm.cache import ActivationCache
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.norms import at_least_float32, centre, find_norm_formula, norm_gain, norm_of
from hooked_mm.positions import IMAGE, At, as_rule
from hooked_mm.runner import Hook, HookSpec
from hooked_mm.value_layout import layout

POINT = "blocks.{}.mlp.hook_post"


class Neuron(NamedTuple):
    """A neuron of the language model: its block, and its number among the block's."""

    layer: int
    number: int


@dataclass(frozen=True)
class Attributions:
    """Per layer, what every neuron of it does for the targets, and how active it is.

    Attributes:
        scores: layer -> (b, d_mlp), g summed over the positions.
        activity: layer -> (b, d_mlp), mean of |z| over the positions.
        logits: (b,), the targets' own logits.
    """

    scores: dict[int, Float[Tensor, "b k"]]
    activity: dict[int, Float[Tensor, "b k"]]
    logits: Float[Tensor, " b"]


def contributions(values: Float[Tensor, "... k"], gradients: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """g = z * d logit / d z, in at least float32.

    Args:
        values: z, what goes into the down projection.
        gradients: Of one logit with respect to it.
    """
    return at_least_float32(values) * at_least_float32(gradients)


def neuron_layers(model: HookedMM) -> list[int]:
    """The layers whose neurons can be read.

    Raises:
        BadInputError: If there is none: experts of a mixture have no neurons to read.
    """
    layers = [layer for layer in range(layer_count(model.hook_names)) if POINT.format(layer) in model.hook_points]
    if not layers:
        raise BadInputError(
            f"no block of this {model.cfg.family} model has a point mlp.hook_post, the neurons of its MLP (experts of "
            "a mixture are not read one by one); see model.hook_names"
        )
    return layers


def attributions(
    model: HookedMM,
    batch: Batch,
    targets: Int[Tensor, " b"],
    rows: Int[Tensor, " b"] | None = None,
    *,
    at: At = IMAGE,
    layers: Sequence[int] | None = None,
) -> Attributions:
    """What each neuron contributes at each sample's image to the logit of its own target, in one backward pass.

    The logits of a batch are differentiated as one sum of one logit per sample: no sample has a part in another's.

    Args:
        model: The model.
        batch: Pictures with prompts; with answers, `rows` says where the target is predicted.
        targets: A token id per sample.
        rows: Per sample the position whose logits predict the target; the prompt's last unless given.
        at: The positions that are summed over; those of images.
        layers: Which blocks; all that have neurons unless given.

    Raises:
        BadInputError: If a target is no token, a row does not exist, or a sample has none of the positions.
    """
    chosen = neuron_layers(model) if layers is None else list(layers)
    points = [POINT.format(layer) for layer in chosen]
    where = last_rows(batch) if rows is None else rows
    with torch.enable_grad():
        logits, cache = model.run_with_cache(batch, points, grad=True)
        assert logits is not None
        said = picked_logits(logits, where, targets)
        said.sum().backward()
    mask = as_rule(at).resolve(Hook(points[0], chosen[0], 0, batch), cache[points[0]].shape)
    counts = mask.sum(dim=1)
    if not bool(counts.all()):
        raise BadInputError(f"has no position of {at!r} to attribute at", int((counts == 0).nonzero()[0]))
    scores, activity = {}, {}
    for layer, point in zip(chosen, points, strict=True):
        here = mask[..., None].to(cache[point].device)
        values = cache[point].detach()
        scores[layer] = (contributions(values, cache.grad(point)) * here).sum(dim=1).cpu()
        activity[layer] = (at_least_float32(values).abs() * here).sum(dim=1).cpu() / counts.cpu()[:, None]
    return Attributions(scores, activity, said.detach().cpu())


def last_rows(batch: Batch) -> Int[Tensor, " b"]:
    """Where a prompt's answer is predicted; of an encoder-decoder, among the decoder's positions."""
    return (batch if batch.decoder is None else batch.decoder).last_prompt()


def picked_logits(
    logits: Float[Tensor, "b p vocab"], rows: Int[Tensor, " b"], targets: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """One logit per sample: that of its target at its row.

    Raises:
        BadInputError: If rows and targets are not one per sample, or outside of what there is.
    """
    count, length, words = logits.shape
    for name, given, end in (("rows", rows, length), ("targets", targets, words)):
        if given.shape != (count,) or bool((given < 0).any()) or bool((given >= end).any()):
            raise BadInputError(
                f"{name} {given.tolist()} are not {count} numbers from 0 to {end - 1}, one for each sample"
            )
    where = torch.arange(count, device=logits.device)
    return logits[where, rows.to(logits.device), targets.to(logits.device)]


def top_neurons(scores: dict[int, Float[Tensor, "n k"]], count: int) -> list[Neuron]:
    """The neurons of largest mean score over the samples, of whatever layer, largest first.

    Args:
        scores: layer -> (samples, neurons).
        count: How many.

    Raises:
        BadInputError: If there are not so many neurons.
    """
    means = {layer: value.double().mean(dim=0) for layer, value in scores.items()}
    places = [Neuron(layer, index) for layer, value in means.items() for index in range(len(value))]
    if not 1 <= count <= len(places):
        raise BadInputError(f"the top {count} of {len(places)} neurons were asked for; ask for 1 to all of them")
    best = torch.cat(list(means.values())).argsort(descending=True, stable=True)[:count]
    return [places[place] for place in best.tolist()]


def matched_draws(
    activity: dict[int, Float[Tensor, " k"]], chosen: Sequence[Neuron], draws: int, *, pool: int = 10, seed: int = 0
) -> list[list[Neuron]]:
    """Sets of other neurons, of the same layers and about as active: what a choice by activity alone would do.

    For every chosen neuron one of the `pool` neurons of its layer nearest in activity that are not chosen themselves;
    no neuron twice in a set. In another layer a neuron would be another thing to silence: at the last, what image
    positions hold is read by nobody.

    Args:
        activity: layer -> mean activity of its neurons.
        chosen: The neurons to match.
        draws: How many sets.
        pool: From how many neighbours one is drawn.
        seed: Of the draws.

    Raises:
        BadInputError: If a layer has not enough neurons that are not chosen.
    """
    taken = set(chosen)
    near: dict[Neuron, list[int]] = {}
    for neuron in chosen:
        value = activity[neuron.layer].double()
        order = (value - value[neuron.number]).abs().argsort(stable=True).tolist()
        near[neuron] = [other for other in order if Neuron(neuron.layer, other) not in taken][:pool]
        if len(near[neuron]) < max(sum(other.layer == neuron.layer for other in chosen), pool):
            raise BadInputError(
                f"layer {neuron.layer} has {len(near[neuron])} neurons besides those chosen, too few to draw from "
                f"{pool} of them; choose fewer neurons or a smaller pool"
            )
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        drawn: list[Neuron] = []
        for neuron in chosen:
            free = [other for other in near[neuron] if Neuron(neuron.layer, other) not in drawn]
            drawn.append(Neuron(neuron.layer, free[int(torch.randint(len(free), (1,), generator=generator))]))
        found.append(drawn)
    return found


def silence(
    sets: Sequence[Sequence[Neuron]],
    *,
    at: At = IMAGE,
    means: dict[int, Float[Tensor, " k"]] | None = None,
) -> list[HookSpec]:
    """Hooks that put neurons to zero, or to their means, at the chosen positions: of each sample its own set.

    Args:
        sets: Per sample of the batch, the neurons.
        at: Where; at image positions.
        means: layer -> mean of each of its neurons, for mean ablation; zero unless given.
    """
    rule = as_rule(at)
    layers = sorted({neuron.layer for neurons in sets for neuron in neurons})

    def change(value: Tensor, hook: Hook) -> Tensor:
        assert hook.layer is not None
        if len(sets) != len(hook.batch):
            raise BadInputError(f"{len(sets)} sets of neurons were given for a batch of {len(hook.batch)} samples")
        silent = torch.zeros(len(sets), value.shape[-1], dtype=torch.bool)
        for row, neurons in enumerate(sets):
            silent[row, [neuron.number for neuron in neurons if neuron.layer == hook.layer]] = True
        plan = layout(hook, value.shape)
        chosen = rule.mask(plan)[..., None].to(value.device) & plan.pick(silent.to(plan.modality.device), "neurons").to(
            value.device
        )
        instead = 0.0 if means is None else means[hook.layer].to(value)
        return torch.where(chosen, torch.as_tensor(instead, dtype=value.dtype, device=value.device), value)

    return [(POINT.format(layer), change) for layer in layers]


def ablated_logits(
    model: HookedMM,
    batch: Batch,
    sets: Sequence[Sequence[Neuron]],
    ids: Int[Tensor, " w"],
    rows: Int[Tensor, " b"] | None = None,
    *,
    at: At = IMAGE,
    means: dict[int, Float[Tensor, " k"]] | None = None,
    size: int = 256,
) -> Float[Tensor, "sets b w"]:
    """Logits of words with each set of neurons silenced; several sets run side by side in one pass.

    Args:
        model: The model.
        batch: Pictures with prompts.
        sets: Of neurons; an empty one leaves the model as it is.
        ids: The tokens whose logits are wanted.
        rows: Per sample the position whose logits are read; the prompt's last unless given.
        at: Where neurons are silenced.
        means: As in `silence`.
        size: Rows of one pass at most, of which one sample under one set is one.
    """
    where = last_rows(batch) if rows is None else rows
    jobs = [(number, sample) for number in range(len(sets)) for sample in range(len(batch))]
    found = torch.empty(len(sets), len(batch), len(ids))
    with torch.no_grad():
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            samples = [sample for _, sample in part]
            hooks = silence([sets[number] for number, _ in part], at=at, means=means)
            logits = model.run_with_hooks(batch.take(samples), hooks)
            assert logits is not None
            own = where[torch.tensor(samples)].to(logits.device)
            values = logits[torch.arange(len(part), device=logits.device), own][:, ids.to(logits.device)]
            for (number, sample), value in zip(part, values.float().cpu(), strict=True):
                found[number, sample] = value
    return found


def receptive_fields(
    cache: ActivationCache, neurons: Sequence[Neuron], sample: int
) -> list[Float[Tensor, "rows cols n"]]:
    """How active neurons are at every patch, one grid per image of the sample; NaN where an image has no patch.

    `patch_maps` lays them over the picture and holds them against masks.

    Args:
        cache: Of the neurons' points, `blocks.L.mlp.hook_post`.
        neurons: Which.
        sample: Its number in the batch.
    """
    grids = {layer: cache.grid(POINT.format(layer), sample) for layer in dict.fromkeys(n.layer for n in neurons)}
    images = range(len(next(iter(grids.values()))))
    return [torch.stack([grids[n.layer][image][..., n.number] for n in neurons], dim=-1) for image in images]


def written_words(model: HookedMM, layer: int, neurons: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
    """W_U (gain * W_down[:, k]): what each neuron's column of the down projection says, up to a positive factor.

    Args:
        model: The model.
        layer: Of the neurons.
        neurons: Their numbers in the layer.

    Returns:
        In at least float32; to be ranked, not to be read as logits.

    Raises:
        BadInputError: If what stands behind the layer's MLP is no norm.
    """
    width, structure = model.cfg.d_model, model.structure
    block, module = structure.text.blocks[layer], model.hf_model.get_submodule
    weight, _ = linear_map(module(model.hook_points[POINT.format(layer)].module), block.d_mlp)
    columns = at_least_float32(weight[:, neurons.to(weight.device)]).T
    if "mlp_after" in block.parts:
        behind = module(f"{block.path}.{block.parts['mlp_after']}")
        if find_norm_formula(behind) is None:
            raise BadInputError(
                f"behind the MLP of block {layer} stands a {type(behind).__name__}, which is no norm, so what its "
                "neurons write into the stream is not known; look at their effects on logits instead (ablated_logits)"
            )
        columns = columns * norm_gain(behind, width)[0].to(columns)
    if structure.final_norm is not None:
        norm = module(structure.final_norm)
        columns = centre(columns, norm_of(norm, width)) * norm_gain(norm, width)[0].to(columns)
    unembed, _ = linear_map(module(structure.unembed), width)
    return (columns.to(unembed.device) @ at_least_float32(unembed).T)[:, : model.cfg.d_vocab].cpu()
