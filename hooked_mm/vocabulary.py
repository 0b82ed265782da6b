"""Where a model's stream meets the vocabulary: token embedding, unembedding, and what becomes of the logits."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from hooked_mm.architectures import LOGIT_SCALE_NAMES
from hooked_mm.errors import UnsupportedModelError


def find_embedding(inner: Any, vocabulary: int) -> nn.Module:
    """The token embedding: transformers', else the one table of so many rows."""
    try:
        found = inner.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        found = None
    tables = [m for m in inner.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == vocabulary]
    if found is None and len(tables) != 1:
        raise UnsupportedModelError(
            f"{type(inner).__name__} names no token embedding, and {len(tables)} tables have {vocabulary} rows"
        )
    return tables[0] if found is None else found


def find_unembedding(inner: Any, vocabulary: int) -> nn.Module:
    """The module to the vocabulary: transformers', else the one linear map of so many outputs."""
    found = inner.get_output_embeddings()
    maps = [m for m in inner.modules() if isinstance(m, nn.Linear) and m.out_features == vocabulary]
    if found is None and len(maps) != 1:
        raise UnsupportedModelError(
            f"{type(inner).__name__} names no output embedding, and {len(maps)} linear maps have {vocabulary} outputs: "
            "it has no logits over a vocabulary"
        )
    return maps[0] if found is None else found


def logit_scale(inner: Any, config: Any) -> float:
    """What the unembedding's output is multiplied by: a number of the configuration, which may divide (Granite)."""
    for name in LOGIT_SCALE_NAMES:
        if (value := _applied(inner, config, name)) is not None:
            divides = re.search(rf"/\s*[\w.]*\b{name}\b", inspect.getsource(type(inner).forward))
            return 1 / value if divides else value
    return 1.0


def logit_cap(inner: Any, config: Any) -> float | None:
    """The soft-cap of the logits."""
    return _applied(inner, config, "final_logit_softcapping")


def _applied(model: Any, config: Any, name: str) -> float | None:
    """A number of the configuration, if the forward uses it: Gemma 3 with images names a soft-cap and does not."""
    value = getattr(config, name, None)
    return value if value is not None and name in inspect.getsource(type(model).forward) else None
