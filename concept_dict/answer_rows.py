"""Positions that predict a token of an answer: batches of prompts with the answers that a store holds behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mm.batch import Batch, count_positions
from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.prepare import SampleImages
from hooked_mm.store import ActivationStore


@dataclass(frozen=True)
class Rows:
    """Positions at which a token of the answer is predicted.

    Attributes:
        batch: Prompts with their answers.
        sample: Per row, which sample of the batch.
        position: Per row, the how-manieth of the sample's own tokens (padding not counted, from 0), as stores have it.
    """

    batch: Batch
    sample: Int[np.ndarray, " r"]
    position: Int[np.ndarray, " r"]


@dataclass(frozen=True)
class Asked:
    """Rows by their columns in the batch, with the token that each predicts."""

    batch: Batch
    sample: Int[Tensor, " r"]
    column: Int[Tensor, " r"]
    token: Int[Tensor, " r"]


def asked(rows: Rows) -> Asked:
    """Columns and tokens of rows; refuses positions that there are not or that predict nothing."""
    said = rows.batch if rows.batch.decoder is None else rows.batch.decoder
    real = said.inputs["attention_mask"].bool().cpu()
    own = count_positions(real).masked_fill(~real, -1)
    columns, tokens = [], []
    for sample, position in zip(rows.sample.tolist(), rows.position.tolist(), strict=True):
        found, after = (own[sample] == position).nonzero(), (own[sample] == position + 1).nonzero()
        if not len(found) or not len(after):
            raise BadInputError(
                f"position {position} predicts nothing: there are {int(real[sample].sum())} tokens with the answer. "
                "Take positions that predict a token of the answer (TokenOfInterest(where='predicts'), or LastPrompt "
                "with an answer)",
                sample,
            )
        columns.append(int(found[0, 0]))
        tokens.append(int(said.input_ids[sample, int(after[0, 0])]))
    return Asked(rows.batch, torch.as_tensor(rows.sample).long(), torch.tensor(columns), torch.tensor(tokens))


def stored_rows(
    model: HookedMM,
    store: ActivationStore,
    images: Callable[[int], SampleImages],
    *,
    samples: int | None = None,
    per_sample: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> Iterator[Rows]:
    """The rows of a store as batches of prompts with the answers that it holds, generated or given.

    Args:
        model: The model that the store is of.
        store: With rows at single positions.
        images: The pictures of a sample by its `sample_number`, its index in the data set.
        samples: Only the first so many samples.
        per_sample: At most so many rows of each, drawn at random.
        batch_size: Samples per batch.
        seed: Of the draw.

    Raises:
        BadInputError: If the store holds no answers, or its rows are means over several positions.
    """
    table = store.samples.slice(0, samples).to_pylist()
    positions, owners = store.rows.column("position").to_pylist(), store.row_samples()
    if any(position is None for position in positions):
        raise BadInputError(
            "the store has rows that are means over several positions, where no one token is predicted; take the part "
            "of another selector: store.where(selector=...)"
        )
    rng, prefix = np.random.default_rng(seed), store.made_by.get("answer_prefix")
    rows_of: list[list[int]] = [[] for _ in range(store.samples.num_rows)]
    for row, owner in enumerate(owners.tolist()):
        rows_of[owner].append(row)
    for start in range(0, len(table), batch_size):
        part = table[start : start + batch_size]
        pictures = [images(entry["sample_number"]) for entry in part]
        drawn = [sorted(rng.permutation(rows_of[start + number]).tolist()[:per_sample]) for number in range(len(part))]
        yield Rows(
            _with_answers(model, pictures, part, prefix),
            np.array([number for number, rows in enumerate(drawn) for _ in rows], int),
            np.array([positions[row] for rows in drawn for row in rows], int),
        )


def _with_answers(
    model: HookedMM, pictures: Sequence[SampleImages], samples: Sequence[dict], prefix: str | None
) -> Batch:
    """Prompts with their answers behind them, token for token where they were generated."""
    prompts = [entry["prompt"] for entry in samples]
    said = [entry.get("answer_tokens") for entry in samples]
    if all(tokens is None for tokens in said):
        given = [entry.get("answer") for entry in samples]
        if any(answer is None for answer in given):
            raise BadInputError("the store holds no answers, so no token is predicted; extract with answers")
        return model.prepare(pictures, prompts, answers=given, answer_prefix=prefix)
    batch = model.prepare(pictures, prompts, answer_prefix=prefix)
    rows = [list(tokens or ()) for tokens in said]
    width = max(1, *map(len, rows))
    filled = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    kept = torch.arange(width, device=model.device) < lengths[:, None]
    names = [model.tokenizer.convert_ids_to_tokens(row) for row in filled.tolist()]
    return batch.extend(filled, kept, names)
