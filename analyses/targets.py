"""The tokens whose prediction an analysis explains, and the rows that predict them.

A causal model predicts the token at position q from the stream at the position before it. That position, `row`, is
where a token's logit, attention and gradient are taken; the position of the token itself already predicts the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.batch import Batch, Modality
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM

Kind = Literal["logit", "log_prob"]
Which = Literal["all", "first"] | Sequence[int]


class NoTargetsError(BadInputError):
    """No answer of a batch has a token that was asked for; commands count its samples and go on."""


@dataclass(frozen=True)
class Targets:
    """Tokens that are explained, one per entry.

    Attributes:
        sample: Which sample of the batch each belongs to.
        row: t, the position whose logits predict it; of an encoder-decoder, a position of the decoder.
        token: Its id.
        foil: The id of another token; what is explained then is by how much the one is preferred to the other.
    """

    sample: Int[Tensor, " n"]
    row: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    foil: Int[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        sizes = {name: tuple(value.shape) for name, value in vars(self).items() if value is not None}
        if len(set(sizes.values())) != 1 or any(len(size) != 1 for size in sizes.values()):
            raise BadInputError(f"targets are lists of one length, but they are {sizes}")

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, numbers: Sequence[int] | Tensor) -> Targets:
        """Some of them, in this order."""
        which = torch.as_tensor(numbers, dtype=torch.long)
        return Targets(*(None if value is None else value[which.to(value.device)] for value in vars(self).values()))  # type: ignore[arg-type]

    def rounds(self) -> list[Targets]:
        """Split so that a round holds at most one target of each sample: what one backward pass can serve."""
        seen: dict[int, int] = {}
        places: list[list[int]] = []
        for place, sample in enumerate(self.sample.tolist()):
            number = seen.get(sample, 0)
            seen[sample] = number + 1
            if number == len(places):
                places.append([])
            places[number].append(place)
        return [self.take(own) for own in places]

    def scores(self, logits: Float[Tensor, "b p vocab"], kind: Kind = "logit") -> Float[Tensor, " n"]:
        """What is explained of each: its logit or log-probability at row t, less its foil's if it has one.

        Args:
            logits: Of all positions of the batch.
            kind: A difference of log-probabilities is one of logits.

        Raises:
            BadInputError: For another kind, or targets outside the logits.
        """
        if kind not in ("logit", "log_prob"):
            raise BadInputError(f"kind={kind!r}; it is 'logit' or 'log_prob'")
        samples, positions, words = logits.shape
        for name, size in (("sample", samples), ("row", positions), ("token", words), ("foil", words)):
            value = getattr(self, name)
            if value is not None and len(value) and not 0 <= int(value.min()) <= int(value.max()) < size:
                raise BadInputError(
                    f"targets have {name} {int(value.min())} to {int(value.max())}, but there are {size} in logits of "
                    f"shape {tuple(logits.shape)}"
                )
        place = logits.device
        sample, token = self.sample.to(place), self.token.to(place)
        rows = logits[sample, self.row.to(place)]
        if kind == "log_prob" and self.foil is None:
            rows = rows.log_softmax(dim=-1)
        found = rows.gather(1, token[:, None])[:, 0]
        return found if self.foil is None else found - rows.gather(1, self.foil.to(place)[:, None])[:, 0]


def token_ids(batch: Batch) -> Int[Tensor, "b p"]:
    """The id of the token at every position; -1 where none stands (images that a model puts in front by itself).

    Args:
        batch: Of an encoder-decoder, its `decoder`.

    Raises:
        BadInputError: If ids and positions do not correspond.
    """
    ids = batch.input_ids
    if ids.shape == batch.modality.shape:
        return ids
    stands = batch.modality != Modality.IMAGE
    if not bool((stands.sum(1) == ids.shape[1]).all()):
        raise BadInputError(
            f"{ids.shape[1]} ids for {batch.modality.shape[1]} positions, of which others than the image's have none: "
            "which token stands where is not known"
        )
    whole = torch.full(batch.modality.shape, -1, dtype=ids.dtype, device=ids.device)
    whole[stands.to(ids.device)] = ids.flatten()
    return whole


def answer_targets(batch: Batch, which: Which = "all", leave_out: Collection[int] = ()) -> Targets:
    """The tokens of the answers that stand in the batch, sample by sample in their order.

    Args:
        batch: With answers: from `prepare(..., answers=)`, or `GenerationOutput.batch`.
        which: All of an answer, its first token, or those of these numbers (from 0, negative from the end); an answer
            that is shorter has none there.
        leave_out: Ids that are no words and are left out of `all`: an answer's end (`tokenizer.all_special_ids`).

    Raises:
        NoTargetsError: If no answer has such a token.
        BadInputError: If roles are unknown, or `which` is something else.
    """
    if isinstance(which, str) and which not in ("all", "first"):
        raise BadInputError(f"which={which!r}; it is 'all', 'first' or numbers of tokens")
    text = batch.decoder or batch
    answer, ids = text.mask(role="answer"), token_ids(text)
    there = text.modality != Modality.PAD
    found: list[tuple[int, int, int]] = []
    for sample in range(len(text)):
        places = answer[sample].nonzero()[:, 0].tolist()
        if which == "all":
            places = [place for place in places if int(ids[sample, place]) not in leave_out]
        elif which == "first":
            places = places[:1]
        else:
            places = [places[number] for number in which if -len(places) <= number < len(places)]
        own = there[sample].nonzero()[:, 0]
        for place in places:
            before = own[own < place]
            if len(before):
                found.append((sample, int(before[-1]), int(ids[sample, place])))
    if not found:
        raise NoTargetsError(
            f"no sample has an answer with such a token (which={which!r}); prepare the batch with answers=, or take "
            "the .batch of a generation"
        )
    sample_, row, token = torch.tensor(found).T
    return Targets(sample_, row, token)


def special_ids(model: HookedMM) -> tuple[int, ...]:
    """The ids that a model's tokenizer has for marks, which are no words; none without a processor."""
    return () if model.processor is None else tuple(model.tokenizer.all_special_ids)


def prompt_targets(
    batch: Batch, tokens: Int[Tensor, " b"] | Sequence[int], foil: Int[Tensor, " b"] | Sequence[int] | None = None
) -> Targets:
    """One token per sample, as the answer's first.

    Args:
        batch: The prompts.
        tokens: Ids, one per sample.
        foil: Other ids to hold them against.

    Raises:
        BadInputError: If there are not as many as samples.
    """
    text = batch.decoder or batch
    ids = [None if given is None else torch.as_tensor(given, dtype=torch.long) for given in (tokens, foil)]
    for given in ids:
        if given is not None and tuple(given.shape) != (len(text),):
            raise BadInputError(f"tokens of shape {tuple(given.shape)} for {len(text)} samples; give one per sample")
    first, other = ids
    assert first is not None
    return Targets(
        torch.arange(len(text)), text.last_prompt().cpu(), first.cpu(), None if other is None else other.cpu()
    )
