"""Whose words a store's rows say: the unembedding of the model they were read from, without the rest of it."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import ArgumentParser

from hooked_mm.errors import BadInputError
from hooked_mm.hooked import HookedMM
from hooked_mm.reader import ModelSource
from hooked_mm.store import ActivationStore
from hooked_mm.unembedding import Unembedding

NEEDED = "id", "dtype", "adapter", "revision", "random_weights"


def add_words(parser: ArgumentParser) -> None:
    """The option for an unembedding that the store can't name."""
    parser.add_argument(
        "--words",
        type=ModelSource | None,
        help="whose unembedding to use; the model's that the rows are of unless given",
    )


def source_of_words(made: Any, store: ActivationStore) -> ModelSource:
    """Where to load the unembedding from: as told, else of the model that is extracted from, else as the store says.

    Args:
        made: The command's options, `words` and `model` among them.
        store: Of the rows.

    Raises:
        BadInputError: If nothing is told and the store does not say what it was made with.
    """
    if (told := made.words or made.model) is not None:
        return told
    said = {**store.made_by, "id": store.made_by.get("model")}
    if not isinstance(said["id"], str) or not isinstance(said.get("adapter"), str | None):
        raise BadInputError(
            f"the store {str(store.path)!r} does not say which model it was made with ({said['id']!r}, adapter "
            f"{said.get('adapter')!r}); give --words.id, a model with the same unembedding"
        )
    return ModelSource(**{name: said[name] for name in NEEDED if said.get(name) is not None})


def load_words(source: ModelSource, store: ActivationStore, device: torch.device | str) -> HookedMM | Unembedding:
    """The unembedding, refused if it is not of rows as wide as the store's.

    Raises:
        BadInputError: With both widths.
    """
    model = source.words(device)
    width = store.activations(store.hooks[0], slice(0, 1)).shape[-1]
    if width != model.cfg.d_model:
        raise BadInputError(
            f"the store's rows are {width} wide, the stream of {source.name!r} {model.cfg.d_model}; give --words.id of "
            "the model that they were read from"
        )
    return model
