"""The keys of an attention by what they are: every one that is not padding belongs to exactly one group.

| group | keys |
|---|---|
| `first` | the sample's first position, if it is asked for apart: where sinks lie |
| `image` | positions of the picture; in a cross-attention to a tower, all of its keys |
| `question`, `template`, `answer` | text by its role |
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mm.attention_rows import Part
from hooked_mm.batch import Batch, Modality, Role
from hooked_mm.errors import BadInputError

ROLES = {"question": Role.QUESTION, "template": Role.TEMPLATE, "answer": Role.ANSWER}

Groups = dict[str, Bool[Tensor, "b k"]]


def key_groups(batch: Batch, keys: int, part: Part = "attn", *, first: bool = False) -> Groups:
    """The groups of an attention's keys, disjoint; also those that no sample has.

    Args:
        batch: What the model is given.
        keys: How many the attention has.
        part: Self-attention of the text (of an encoder-decoder, the decoder), or cross-attention.
        first: Take each sample's first position out of its group, into one of its own.

    Raises:
        BadInputError: If roles are unknown, or there are as many keys as neither positions nor a tower's patches.
    """
    read = batch if part == "xattn" else batch.decoder or batch
    crossed = part == "xattn" and batch.layout.kind == "cross"
    if crossed:
        shown = torch.zeros(len(batch), 1, dtype=torch.bool, device=batch.modality.device)
        shown[batch.image_sample.to(shown.device)] = True
        whole = shown.expand(-1, keys).clone()
        none = torch.zeros_like(whole)
        found: Groups = {"image": whole, **dict.fromkeys(ROLES, none)}
    else:
        if keys != read.modality.shape[1]:
            raise BadInputError(
                f"{keys} keys for a batch of {read.modality.shape[1]} positions; give the attention's own batch"
            )
        if bool((read.role == Role.UNKNOWN).any()):
            raise BadInputError(
                "this batch was made from raw tensors, so roles are unknown; make it with model.prepare"
            )
        found = {"image": read.modality == Modality.IMAGE}
        found |= {name: read.role == role for name, role in ROLES.items()}
    if not first:
        return found
    there = torch.stack(list(found.values())).any(0)
    leading = there & (there.cumsum(1) == 1)
    return {"first": leading, **{name: mask & ~leading for name, mask in found.items()}}
