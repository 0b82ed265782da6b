"""A store's samples as batches again, with the answers that it holds behind them, and what is predicted at its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
class AnswerRows:
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


def asked(rows: AnswerRows) -> Asked:
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


Answers = Literal["read", "all", "none"]


def sample_batch(
    model: HookedMM,
    store: ActivationStore,
    images: Callable[[int], SampleImages],
    samples: Sequence[int],
    answers: Answers = "read",
) -> Batch:
    """The batch that a store's samples were read from, made again: prompts, pictures, and what was said.

    Args:
        model: The model that the store is of.
        store: Its samples have prompts.
        images: The pictures of a sample by its index in the store (see `pictures.store_pictures`).
        samples: Which ones, by index.
        answers: `"read"`: behind a prompt stands what stood there when it was read; `"all"`: also an answer that the
            store holds though the prompt alone was read; `"none"`: nothing. Where answers were generated they are put
            there token for token.

    Raises:
        BadInputError: If an answer is wanted and the store does not hold it.
    """
    names = [name for name in ("prompt", "answer", "answer_tokens") if name in store.samples.column_names]
    table = store.samples.select(names).take(list(samples)).to_pylist()
    pictures, prompts = [images(index) or None for index in samples], [entry["prompt"] for entry in table]
    prefix, kind = store.made_by.get("answer_prefix"), store.made_by.get("answer") or "none"
    if answers == "none" or (answers == "read" and kind == "none"):
        return model.prepare(pictures, prompts, answer_prefix=prefix)
    said = [entry.get("answer_tokens") for entry in table]
    if all(tokens is None for tokens in said):
        given = [entry.get("answer") for entry in table]
        if any(answer is None for answer in given):
            raise BadInputError("the store holds no answers, so no token is predicted; extract with answers")
        return model.prepare(pictures, prompts, answers=given, answer_prefix=prefix)
    batch = model.prepare(pictures, prompts, answer_prefix=prefix)
    rows = [list(tokens or ()) for tokens in said]
    width = max(1, *map(len, rows))
    filled = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    kept = torch.arange(width, device=model.device) < lengths[:, None]
    return batch.extend(filled, kept, [model.tokenizer.convert_ids_to_tokens(row) for row in filled.tolist()])


def stored_rows(
    model: HookedMM,
    store: ActivationStore,
    images: Callable[[int], SampleImages],
    *,
    samples: int | None = None,
    per_sample: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> Iterator[AnswerRows]:
    """The rows of a store as batches of prompts with the answers that it holds, generated or given.

    Args:
        model: The model that the store is of.
        store: With rows at single positions.
        images: The pictures of a sample by its index in the store (see `pictures.store_pictures`).
        samples: Only the first so many of the samples that have rows.
        per_sample: At most so many rows of each, drawn at random.
        batch_size: Samples per batch.
        seed: Of the draw.

    Raises:
        BadInputError: If the store holds no answers, or its rows are means over several positions.
    """
    positions, owners = store.rows.column("position").to_pylist(), store.row_samples()
    if any(position is None for position in positions):
        raise BadInputError(
            "the store has rows that are means over several positions, where no one token is predicted; take the part "
            "of another selector: store.where(selector=...)"
        )
    rng = np.random.default_rng(seed)
    rows_of: dict[int, list[int]] = {}
    for row, owner in enumerate(owners.tolist()):
        rows_of.setdefault(owner, []).append(row)
    chosen = sorted(rows_of)[:samples]
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        drawn = [sorted(rng.permutation(rows_of[sample]).tolist()[:per_sample]) for sample in part]
        yield AnswerRows(
            sample_batch(model, store, images, part, "all"),
            np.array([number for number, rows in enumerate(drawn) for _ in rows], int),
            np.array([positions[row] for rows in drawn for row in rows], int),
        )
