"""Sensitivity maps: how much a prediction's score changes when what stands at a place changes a little.

With s the score of a target and x_j (d,) what stands at place j (an image token, or a patch inside the tower):

    norm             |ds/dx_j|_2                (Simonyan et al. 2014, arXiv 1312.6034)
    input            |sum_i x_ji ds/dx_ji|      (Shrikumar et al. 2016, arXiv 1605.01713), its size
    signed input     sum_i x_ji ds/dx_ji

One forward and one backward pass serve one target of every sample of a batch: samples do not touch each other, so that
the gradient of the sum of their scores is, at each sample, that of its own.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.targets import Kind, Targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM

Measure = Literal["norm", "input", "signed input"]


def measured(
    value: Float[Tensor, "... d"], gradient: Float[Tensor, "... d"], measure: Measure = "norm"
) -> Float[Tensor, "..."]:
    """One number per place, in at least float32; see the formulas above.

    Raises:
        BadInputError: For an unknown measure.
    """
    if measure not in get_args(Measure):
        raise unknown("measure", measure, get_args(Measure))
    wide = torch.promote_types(value.dtype, torch.float32)
    x, g = value.detach().to(wide), gradient.to(wide)
    if measure == "norm":
        return g.norm(dim=-1)
    product = (x * g).sum(dim=-1)
    return product.abs() if measure == "input" else product


def saliency(
    model: HookedMM,
    batch: Batch,
    targets: Targets,
    point: str = "hook_embed",
    *,
    measure: Measure = "norm",
    kind: Kind = "logit",
) -> Float[Tensor, "rows places"]:
    """The sensitivity of every sample's score to what stands at every place of a point.

    Args:
        model: The model.
        batch: With the targets' answers as far as they are predicted from earlier tokens of theirs.
        targets: At most one per sample; the places of samples without one get 0.
        point: `hook_embed`: the sequence (of an encoder-decoder, `encoder.hook_embed`); `vision.hook_embed` or a block
            of the tower: patches; `projector.hook_in`, `projector.hook_out`.
        measure: See the formulas above.
        kind: Whether a logit or a log-probability is explained.

    Returns:
        Laid out as the point's values, without their last dimension.

    Raises:
        BadInputError: If a sample has several targets, the point's values are no vectors, or no gradient reaches it.
    """
    if len(set(targets.sample.tolist())) < len(targets):
        raise BadInputError("one backward pass serves one target of each sample; give targets.rounds() one by one")
    with torch.enable_grad():
        logits, cache = model.run_with_cache(batch, point, grad=True)
        assert logits is not None
        score = targets.scores(logits, kind).sum()
    (name,) = cache
    value = cache[name]
    (gradient,) = torch.autograd.grad(score, value, allow_unused=True)
    if gradient is None:
        raise BadInputError(f"no gradient of the score reaches {name!r}; name a point that the answer depends on")
    return measured(value, gradient, measure)
