"""Top tokens: which words each layer would say, counted over a data set, apart for text and image positions.

p^l_i = softmax(unembed(norm(h^l_i))) is the logit lens at row i behind l blocks (`logit_lens`), T^l_i its k most
probable tokens. Over n rows of a modality, a token t has

    count        the number of rows with t in T^l_i;                    share  count / n
    probability  the mean of p^l_i(t) over these rows

and a class of words (colours, shapes, ...) the share of rows whose most probable token is one of it, a mean over
samples of the share within each. Only counts are kept, so a data set of any size is counted in the memory of a few
vocabularies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from hooked_mm.errors import BadInputError


@dataclass(frozen=True)
class TokenCount:
    """A token at a layer, see the module's formulas."""

    modality: str
    layer: int
    token: int
    count: int
    share: float
    probability: float


@dataclass
class TopTokens:
    """Counts of tokens among the k most probable; those of several parts of the data add up.

    Attributes:
        d_vocab: Tokens that there are.
        rows: Rows counted.
        counts: (d_vocab,), how many of them have the token among their k.
        sums: (d_vocab,), the sum of its probabilities in those.
    """

    d_vocab: int
    rows: int = 0
    counts: Int[Tensor, " vocab"] = field(init=False)
    sums: Float64[Tensor, " vocab"] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.d_vocab, dtype=torch.int64)
        self.sums = torch.zeros(self.d_vocab, dtype=torch.float64)

    def add(self, ids: Int[Tensor, "n k"], probabilities: Float[Tensor, "n k"]) -> None:
        """Count some rows.

        Args:
            ids: Their most probable tokens, of a row each once.
            probabilities: Of these.

        Raises:
            BadInputError: If the two differ in shape, or a token is not of the vocabulary.
        """
        if ids.ndim != 2 or ids.shape != probabilities.shape:
            raise BadInputError(f"ids {tuple(ids.shape)} and probabilities {tuple(probabilities.shape)} must be (n, k)")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.d_vocab:
            raise BadInputError(
                f"tokens {int(ids.min())} to {int(ids.max())} are not of a vocabulary of {self.d_vocab}"
            )
        flat = ids.cpu().flatten()
        self.rows += len(ids)
        self.counts += flat.bincount(minlength=self.d_vocab)
        self.sums += flat.bincount(weights=probabilities.double().cpu().flatten(), minlength=self.d_vocab)

    def best(self, count: int, modality: str = "all", layer: int = 0) -> list[TokenCount]:
        """The tokens most often among the k, then of largest summed probability; none that never is.

        Args:
            count: At most so many.
            modality: What the rows are, to be written beside.
            layer: The layer, to be written beside.
        """
        # Sums of probabilities are at most the counts, so that they decide among equal counts only.
        order = torch.argsort(self.counts.double() + self.sums / (self.sums.max() + 1), descending=True, stable=True)
        found = []
        for token in order[:count].tolist():
            if times := int(self.counts[token]):
                share, mean = times / self.rows, float(self.sums[token]) / times
                found.append(TokenCount(modality, layer, token, times, share, mean))
        return found


def class_tokens(tokenizer: Any, words: Collection[str], d_vocab: int) -> Bool[Tensor, " vocab"]:
    """Which tokens of a vocabulary spell one of the words, whole, in any case, with or without a space in front.

    Raises:
        BadInputError: If none does.
    """
    wanted = {word.lower() for word in words}
    spelt = tokenizer.batch_decode([[token] for token in range(min(d_vocab, len(tokenizer)))])
    found = torch.zeros(d_vocab, dtype=torch.bool)
    found[: len(spelt)] = torch.tensor([text.strip().lower() in wanted for text in spelt])
    if not bool(found.any()):
        raise BadInputError(
            f"no token of this tokenizer spells any of {sorted(wanted)[:5]} whole, so no row can have one as its most "
            "probable; choose other words"
        )
    return found


def shares_by_sample(
    hits: Bool[Tensor, " n"], samples: Int[Tensor, " n"], count: int
) -> tuple[Int[Tensor, " samples"], Int[Tensor, " samples"]]:
    """Per sample, how many of its rows are hits, and how many rows it has; both add up over parts of the data.

    Args:
        hits: Per row.
        samples: The number of each row's sample.
        count: How many samples there are.
    """
    return samples[hits].bincount(minlength=count), samples.bincount(minlength=count)


def markdown(found: Sequence[TokenCount], tokenizer: Any) -> str:
    """A table with a line per layer and a column per modality: the words with their shares in per cent."""
    modalities = list(dict.fromkeys(item.modality for item in found))
    lines = ["| layer | " + " | ".join(modalities) + " |", "| --- " * (1 + len(modalities)) + "|"]
    for layer in sorted({item.layer for item in found}):
        cells = []
        for modality in modalities:
            own = [item for item in found if (item.layer, item.modality) == (layer, modality)]
            cells.append(", ".join(f"{spelling(tokenizer, item.token)} {100 * item.share:.0f}" for item in own))
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spelling(tokenizer: Any, token: int) -> str:
    """How a token is written in a table: in one line, what would end a cell or be taken for markup as code."""
    text = tokenizer.decode([token]).strip()
    text = text or str(tokenizer.convert_ids_to_tokens(token))
    plain = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return plain if plain.isalnum() else f"`{plain}`"
