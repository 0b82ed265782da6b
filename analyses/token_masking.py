"""What a model predicts when some tokens are taken from it, by many choices of tokens in one pass.

knockout   no position reads from the tokens, in any layer: their attention weights are cut and the others grown, so
           that each row sums to 1 again (`hooked_mm.knockout`); works for tokens of any kind
mean       what enters the first block at the tokens is the mean of all image tokens' of the sample; for image tokens
           only, and only where pictures enter there (not also in later layers, as in Qwen3-VL)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.tail_logits import tail_logits
from analyses.targets import Targets
from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hooked import HookedMM
from hooked_mm.knockout import cut
from hooked_mm.runner import Hook, HookSpec

How = Literal["knockout", "mean"]
PATTERN, ENTRY = "blocks.{}.attn.hook_pattern", "blocks.0.hook_resid_pre"


@dataclass(frozen=True)
class Masked:
    """What a model predicts at one row under several choices of tokens.

    Attributes:
        token: (sets,), the likeliest token.
        log_probs: (sets, vocab).
    """

    token: Tensor
    log_probs: Float[Tensor, "sets vocab"]


def check_maskable(model: HookedMM, how: How = "knockout") -> None:
    """Refuse a model in which tokens can't be masked so.

    Raises:
        UnsupportedModelError: If it is an encoder-decoder, or a layer passes tokens on without attention weights.
        BadInputError: For another `how`.
    """
    if how not in get_args(How):
        raise BadInputError(f"how={how!r}; it is {' or '.join(map(repr, get_args(How)))}")
    if model.structure.encoder is not None:
        raise UnsupportedModelError(
            "this is an encoder-decoder: its image tokens are the encoder's and its predictions the decoder's, so no "
            "row of attention holds both"
        )
    lacking = [layer for layer in range(model.cfg.n_layers) if PATTERN.format(layer) not in model.hook_names]
    if how == "knockout" and lacking:
        raise UnsupportedModelError(
            f"layers {lacking} of this model have no attention pattern to cut, so tokens could still be read there; "
            "mask image tokens by how='mean'"
        )


def masked_predictions(
    model: HookedMM,
    batch: Batch,
    sample: int,
    row: int,
    sets: Sequence[Sequence[int]],
    how: How = "knockout",
) -> Masked:
    """The prediction at one row of one sample with each of some sets of tokens masked, all in one pass.

    Args:
        model: The model.
        batch: The batch.
        sample: Its number in the batch.
        row: The position whose logits are read.
        sets: Of positions; an empty one leaves the model as it is.
        how: See above.

    Raises:
        UnsupportedModelError: See `check_maskable`.
        BadInputError: If a set holds the row itself, a position that does not exist, or one that can't be masked so.
    """
    check_maskable(model, how)
    length = batch.modality.shape[1]
    chosen = torch.zeros(len(sets), length, dtype=torch.bool)
    for number, own in enumerate(sets):
        if any(not 0 <= place < length or place == row for place in own):
            raise BadInputError(f"positions {list(own)} of a batch of {length}; all but the row {row} can be masked")
        chosen[number, list(own)] = True
    images = batch.mask(modality="image")[sample].cpu()
    if how == "mean" and bool((chosen & ~images).any()):
        raise BadInputError("how='mean' masks image tokens only; leave text out, or mask by how='knockout'")
    if not len(sets):
        return Masked(torch.zeros(0, dtype=torch.long), torch.zeros(0, model.cfg.d_vocab))
    hooks = _knocked_out(model, chosen) if how == "knockout" else _averaged(chosen, images)
    copies = torch.arange(len(sets))
    wanted = Targets(copies, torch.full_like(copies, row), torch.zeros_like(copies))
    with torch.no_grad():
        logits, kept = tail_logits(model, batch.take([sample] * len(sets)), wanted, hooks)
    found = logits[:, int(kept.row[0])].float().log_softmax(dim=-1).cpu()
    return Masked(found.argmax(dim=-1), found)


def predicted_tokens(
    model: HookedMM,
    batch: Batch,
    sample: int,
    row: int,
    sets: Sequence[Sequence[int]],
    how: How = "knockout",
    at_once: int = 16,
) -> list[int]:
    """The likeliest token at one row under each of some sets of tokens masked, so many of them in one pass.

    Args:
        model, batch, sample, row, sets, how: As in `masked_predictions`.
        at_once: Sets in one pass.

    Raises:
        UnsupportedModelError, BadInputError: As in `masked_predictions`.
    """
    return [
        token
        for start in range(0, len(sets), at_once)
        for token in masked_predictions(model, batch, sample, row, sets[start : start + at_once], how).token.tolist()
    ]


def _knocked_out(model: HookedMM, chosen: Bool[Tensor, "sets p"]) -> list[HookSpec]:
    def function(value: Tensor, hook: Hook) -> Tensor:
        return cut(value, chosen.to(value.device)[:, None, None, :].expand(-1, 1, value.shape[2], -1))

    return [([PATTERN.format(layer) for layer in range(model.cfg.n_layers)], function)]


def _averaged(chosen: Bool[Tensor, "sets p"], images: Bool[Tensor, " p"]) -> list[HookSpec]:
    def function(value: Tensor, hook: Hook) -> Tensor:
        mean = value[:, images.to(value.device)].float().mean(dim=1, keepdim=True).to(value.dtype)
        return torch.where(chosen.to(value.device)[:, :, None], mean, value)

    return [(ENTRY, function)]
