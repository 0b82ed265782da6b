"""Directions from one answer to another, found on a single question alone: no samples, no store.

With two answers, *source* and *target*, put behind the very same prompt, and x the stream of a point where the first
token is predicted by which they differ (the prompt's last position, unless both begin alike):

    odds    gap g / |g|^2,   g = d/dx [log p(target | x) - log p(source | x)],   gap = log p(source) - log p(target)
    read    mean(T) - mean(S)   of the stream where the tokens of the target and of the source are read

`odds` is the shortest change of x that makes both answers equally likely, to first order: with alpha = 1 they are about
tied, and beyond that the target is said. Where the target is the likelier one already (or both are within a nat of each
other), the gap is taken as one nat. `read` is the coarse vector of `directions` of the two answers' own positions; x is
the same for both, so these say how a token differs that was *said*, not what makes a model say it. On the small models
`odds` turns one colour into another at every layer with alpha = 2, `read` hardly ever.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.hooked import HookedMM
from steering.directions import coarse
from steering.side_effects import token_nll

Way = Literal["odds", "read"]

LEAST_GAP = 1.0
"""Nats: what `odds` moves by at least."""


def text_side(batch: Batch) -> Batch:
    """The positions of the text that is said: of an encoder-decoder the decoder's."""
    return batch.decoder or batch


def answer_positions(batch: Batch) -> list[int]:
    """Where the answer of a single sample stands.

    Raises:
        BadInputError: If there are several samples, or the answer is empty.
    """
    if len(batch) != 1:
        raise BadInputError(f"a batch of {len(batch)} samples; directions of answers are those of one question")
    found: list[int] = text_side(batch).mask(role="answer")[0].nonzero()[:, 0].tolist()
    if not found:
        raise BadInputError("an answer without a token leads nowhere; give a word at least")
    return found


def own_stream(model: HookedMM, prompt: Batch, hook: str) -> Float[Tensor, " d"]:
    """x: what a point holds where the answer's first token is predicted, float32.

    Args:
        model: The model.
        prompt: Of one sample.
        hook: A (b, p, d) point of the language model.

    Raises:
        UnknownHookError: If the model has no such point.
        BadInputError: If the point has no vector at that position.
    """
    layer = model.hook_points[hook].layer if hook in model.hook_points else None
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt, [hook], stop_at_layer=None if layer is None else layer + 1)
    value, side = cache[hook], text_side(prompt)
    if value.ndim != 3 or value.shape[:2] != side.modality.shape:
        raise BadInputError(f"{hook!r} has no vector where the answer is predicted; take a point of the stream")
    return value[0, int(side.last_prompt()[0])].float()


def log_probability(
    model: HookedMM, batch: Batch, hook: str, common: int = 0
) -> tuple[Float[Tensor, ""], Float[Tensor, " d"], Float[Tensor, "t d"]]:
    """log p of the answer of a single sample, its gradient at x, and the stream where its tokens are read.

    Args:
        model: The model.
        batch: A prompt with its answer.
        hook: A (b, p, d) point of the language model.
        common: x is where the token behind so many of the answer is predicted.

    Returns:
        The log-probability in nats, the gradient, and the rows of the answer's tokens, all float32.

    Raises:
        BadInputError: As `answer_positions`; or if the point has no vectors at the positions of the text.
    """
    positions, side = answer_positions(batch), text_side(batch)
    with torch.enable_grad():
        logits, cache = model.run_with_cache(batch, [hook], grad=True)
        assert logits is not None
        value = cache[hook]
        if value.ndim != 3 or value.shape[:2] != side.modality.shape:
            raise BadInputError(f"{hook!r} has no vector where the answer is predicted; take a point of the stream")
        ids = side.input_ids[0, positions]
        found = -token_nll(logits[0, [position - 1 for position in positions]], ids).sum()
        (gradient,) = torch.autograd.grad(found, value)
    return found.detach(), gradient[0, positions[0] - 1 + common].float(), value.detach()[0, positions].float()


def answer_direction(
    model: HookedMM, source: Batch, target: Batch, hook: str, way: Way = "odds"
) -> Float[Tensor, " d"]:
    """The direction from one answer to another of the same question, float32.

    Args:
        model: The model.
        source: The question with the answer to leave.
        target: The same with the answer to get.
        hook: A (b, p, d) point of the language model.
        way: `odds` or `read`, see above.

    Raises:
        BadInputError: For an unknown way, batches of several samples, an empty answer, two answers that are the same,
            or a point on whose last prompt position the answers do not depend.
        UnknownHookError: If the model has no such point.
    """
    if way not in get_args(Way):
        raise unknown("way", way, get_args(Way))
    ids = [text_side(batch).input_ids[0, answer_positions(batch)].tolist() for batch in (source, target)]
    if ids[0] == ids[1]:
        raise BadInputError("both answers are the same, so nothing leads from one to the other; give another word")
    # Of "a red star" and "a blue star" the first word decides nothing.
    differs = [one != other for one, other in zip(*ids, strict=False)]
    common = differs.index(True) if True in differs else min(map(len, ids))
    (before, from_, rows), (after, to, others) = (
        log_probability(model, batch, hook, common) for batch in (source, target)
    )
    if way == "read":
        return coarse(rows, others)
    gradient = (to - from_).double()
    size = float(gradient.square().sum())
    if not size > 0:
        raise BadInputError(f"neither answer depends on {hook!r} where they differ; take a point of the stream")
    gap = max(LEAST_GAP, float(before - after))
    return (gap / size * gradient).float()
