"""What a generation gives back, and what it asks of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mm.batch import Batch, Modality
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.structure import Structure


@dataclass(frozen=True)
class GenerationOutput:
    """What a model generated.

    Attributes:
        text: One string per sample, special tokens left out.
        tokens: (batch, new) ids; after the end of a sample, padding.
        logits: (batch, new, vocab), or None unless asked for.
        batch: The prompts with the generated tokens behind them as role `answer`, to run again in one pass; None for
            raw inputs, whose tokens have no names.
    """

    text: list[str]
    tokens: Int[Tensor, "b new"]
    logits: Float[Tensor, "b new vocab"] | None
    batch: Batch | None


def check_left_padding(batch: Batch) -> None:
    """Refuse prompts padded on the right, behind which an answer would not be adjacent.

    Raises:
        BadInputError: It names the first such sample.
    """
    padded = (batch if batch.decoder is None else batch.decoder).modality[:, -1] == Modality.PAD
    if bool(padded.any()):
        row = int(padded.nonzero()[0])
        raise BadInputError("is padded on the right; prepare with padding_side='left' to generate", row)


def check_prompts(batch: Batch, structure: Structure, start: int | None) -> None:
    """Refuse what can't be gone on with.

    Args:
        batch: The prompts.
        structure: Of the model.
        start: The token that a decoder of its own begins with, which transformers would put in front where it lacks.

    Raises:
        UnsupportedModelError: If the model generates in a way of its own.
        BadInputError: If prompts are padded on the right, or a decoder's do not begin with its start token.
    """
    if structure.no_generation:
        raise UnsupportedModelError(
            f"{structure.family} models can't generate with hooks: {structure.no_generation}. Run single passes: "
            "model.run_with_hooks(batch, ...)"
        )
    check_left_padding(batch)
    given = batch.inputs.get("decoder_input_ids")
    if given is not None and start is not None and not bool((given[:, 0] == start).any()):
        raise BadInputError(
            f"begins with token {int(given[0, 0])}, where the decoder's start token is {start}: transformers would put "
            "it in front, and positions would be others than the batch's; put it there yourself",
            0,
        )


def until_end(tokens: Int[Tensor, "b new"], ends: int | Sequence[int] | None) -> Bool[Tensor, "b new"]:
    """Generated tokens up to and with the first end-of-sequence token; what follows is padding."""
    if ends is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    is_end = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device))
    return (is_end.cumsum(dim=1) - is_end.long()) == 0


def make_output(
    batch: Batch,
    tokens: Int[Tensor, "b new"],
    logits: Float[Tensor, "b new vocab"] | None,
    tokenizer: Any,
    ends: int | Sequence[int] | None,
) -> GenerationOutput:
    """Text of the new tokens, and the batch with them behind its prompts.

    Args:
        batch: The prompts.
        tokens: The new tokens.
        logits: Of every step, or None.
        tokenizer: None for raw inputs, whose tokens have no names.
        ends: The model's end-of-sequence tokens.
    """
    if tokenizer is None:
        return GenerationOutput([], tokens, logits, None)
    text = [line.strip() for line in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    extended = None
    # Several answers per sample have no batch to stand in.
    if batch.tokens and tokens.shape[0] == len(batch):
        names = [tokenizer.convert_ids_to_tokens(row) for row in tokens.tolist()]
        extended = batch.extend(tokens, until_end(tokens, ends), names)
    return GenerationOutput(text, tokens, logits, extended)
