"""Grad-CAM on attention: where a row of attention that speaks for a token looks.

With l the logit (or log-probability) of the chosen token at row t that predicts it, and A^l the attention of layer l:

    CAM^l_q = mean over heads of relu(dl/dA) * A  [q, img]

(Selvaraju et al. 2017, arXiv 1610.02391, on attention as ALBEF has it, Li et al. 2021, arXiv 2107.07651.) Rows q are t
itself, or those of the question's tokens. At the last layer that mixes positions only row t has a gradient, since
nothing behind it moves what other rows have read, and at no layer has a row behind t: maps of such rows are zero. Their
min-max scaled picture would be noise, so they are marked (`reached`) and said to be empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.pattern_gradients import PatternGradients, Tell
from analyses.targets import Kind, Targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.positions import At, as_rule
from hooked_mm.runner import Hook
from hooked_mm.structure import PREFIXES
from hooked_mm.value_layout import row_layout

OWN, CROSS = "blocks.{}.attn.hook_pattern", "blocks.{}.xattn.hook_pattern"


@dataclass(frozen=True)
class GradCams:
    """Maps of every target, by layer and row.

    Attributes:
        targets: The tokens, n of them.
        scores: (n,), their logits or log-probabilities.
        layers: The layers, in order.
        queries: Per target, the positions of its rows, (r,).
        maps: Per target, (layers, r, k) over all keys: positions of the sequence, or what cross-attention reads.
        reached: Per target, (layers, r): False where a row has no gradient, so that its map is empty.
        notes: What a reader must know.
    """

    targets: Targets
    scores: Float[Tensor, " n"]
    layers: tuple[int, ...]
    queries: list[Int[Tensor, " r"]]
    maps: list[Float[Tensor, "layers r k"]]
    reached: list[Bool[Tensor, "layers r"]]
    notes: tuple[str, ...] = ()

    def mean(self, number: int, layer: int | None = None) -> Float[Tensor, " k"]:
        """The mean map of a target over the layers and rows that its gradient reaches; zero if there are none.

        Args:
            number: Of the target.
            layer: Only this one; all unless given.
        """
        here = slice(None) if layer is None else slice(self.layers.index(layer), self.layers.index(layer) + 1)
        maps = self.maps[number][here]
        kept = maps[self.reached[number][here]]
        return kept.mean(0) if len(kept) else maps.sum((0, 1))


def grad_cam(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    *,
    rows: At = "target",
    layers: Sequence[int] | None = None,
    kind: Kind = "logit",
    point: str | None = None,
    tell: Tell | None = None,
) -> GradCams:
    """Grad-CAM of every target, in one forward pass and one backward pass for a target of each sample.

    Args:
        model: The model.
        batch: With answers that hold the targets.
        targets: The tokens to explain, from `targets.answer_targets`.
        rows: Whose attention: `"target"`, row t of each target itself; or a rule for positions, `"question"` among
            them (of the stack that `point` lies in).
        layers: Numbers of layers, negative ones from the end; all that have the pattern unless given.
        kind: The token's logit or log-probability.
        point: The attention, with `{}` for the layer: `"encoder.blocks.{}.attn.hook_pattern"`. Unless given, that of
            the language model, cross-attention where that reads pictures or an encoder.
        tell: Called in front of every backward pass.

    Raises:
        BadInputError: If there is no such attention or layer, or a target's sample has none of the rows.
    """
    point = point or default_point(model)
    chosen = pattern_layers(model, point, layers)
    names = [point.format(layer) for layer in chosen]
    found = PatternGradients(model, batch, targets, names, kind)
    count, _, length, _ = found.patterns[names[0]].shape
    widths = sorted({value.shape[-1] for value in found.patterns.values()})
    if len(widths) > 1:
        raise BadInputError(f"layers {list(chosen)} attend to {widths} keys; choose layers that attend to as many")
    if count != len(batch):
        raise BadInputError(f"{names[0]!r} has {count} rows for {len(batch)} samples; take attention of the text")
    hook = Hook(names[0], chosen[0], 0, batch)
    masks = None if rows == "target" else as_rule(rows).mask(row_layout(hook, count, length))
    if masks is None and point.startswith("encoder."):
        raise BadInputError(f"row t is one of the decoder, but {names[0]!r} is the encoder's; name rows of the encoder")
    queries: list[Tensor] = [
        targets.row[number : number + 1].cpu() if masks is None else masks[sample].nonzero()[:, 0].cpu()
        for number, sample in enumerate(targets.sample.tolist())
    ]
    lacking = [number for number, own in enumerate(queries) if not len(own)]
    if lacking:
        raise BadInputError(f"has none of the rows {rows!r}", int(targets.sample[lacking[0]]))
    maps: list[Tensor] = [torch.empty(0)] * len(targets)
    reached: list[Tensor] = [torch.empty(0)] * len(targets)
    for one in found.rounds(tell):
        for place, sample in zip(one.places.tolist(), one.targets.sample.tolist(), strict=True):
            own = queries[place]
            maps[place] = torch.stack([_rows(one.weighted[name], found.patterns[name], sample, own) for name in names])
            reached[place] = torch.stack([one.reached[name][sample].cpu()[own] for name in names])
    return GradCams(targets, found.scores, chosen, queries, maps, reached, notes(chosen, reached))


def _rows(weighted: Tensor | None, pattern: Tensor, sample: int, rows: Tensor) -> Tensor:
    if weighted is None:
        return torch.zeros(len(rows), pattern.shape[-1])
    return weighted[sample, rows.to(weighted.device)].cpu()


def notes(layers: Sequence[int], reached: Sequence[Bool[Tensor, "layers r"]]) -> tuple[str, ...]:
    """Which layers have maps that are empty, and how many."""
    told = []
    for place, layer in enumerate(layers):
        empty, total = sum(int((~one[place]).sum()) for one in reached), sum(one.shape[1] for one in reached)
        if empty:
            told.append(
                f"layer {layer}: {empty} of {total} maps are empty, as their rows have no gradient there (nothing "
                "behind moves what they read to the target's row)"
            )
    return tuple(told)


def default_point(model: HookedMM) -> str:
    """Cross-attention where the language model has it, else its attention.

    Raises:
        BadInputError: If neither can be read.
    """
    for point in (CROSS, OWN):
        if any(point.format(layer) in model.hook_points for layer in range(model.cfg.n_layers)):
            return point
    raise BadInputError(f"no layer of this {model.cfg.family} model's text has attention that can be read")


def pattern_layers(model: HookedMM, point: str, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers that have the pattern, in order.

    Raises:
        BadInputError: If one that is asked for does not have it; it names those that do.
    """
    if "{}" not in point or not point.endswith("hook_pattern"):
        raise BadInputError(f"point={point!r} is no pattern by layer, as 'blocks.{{}}.attn.hook_pattern' is")
    stack = next((name for name, prefix in PREFIXES.items() if prefix and point.startswith(prefix)), "text")
    total = model.structure.stacks[stack].n_layers if stack in model.structure.stacks else 0
    known = [layer for layer in range(total) if point.format(layer) in model.hook_points]
    asked = known if layers is None else sorted({layer + total if layer < 0 else layer for layer in layers})
    wrong = [layer for layer in asked if layer not in known]
    if wrong or not asked:
        raise BadInputError(
            f"layers={layers!r}: this {model.cfg.family} model has {point!r} at layers {known}; choose among them"
        )
    return tuple(asked)
