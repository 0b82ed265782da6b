"""Where a model's stream meets the vocabulary: token embedding, unembedding, and what becomes of the logits."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_mm.architectures import LOGIT_SCALE_NAMES, WORD_COUNT_NAMES
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.sources import source_of
from hooked_mm.structure import Readout
from hooked_mm.weights import device_of, dtype_of

# How T5's kind divides by the root of the width, and what in the configuration switches that on.
_SHRUNK = (("d_model**-0.5", "tie_word_embeddings"), ("model_dim**-0.5", "scale_decoder_outputs"))


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


def contains(module: nn.Module, others: set[int]) -> bool:
    return any(id(inner) in others for inner in module.modules())


def find_head(model: nn.Module, unembed: str, decoder: nn.Module) -> str:
    """The module that runs the decoder and the unembedding, which lies at this path."""
    path = unembed.rpartition(".")[0]
    # A decoder that holds the unembedding (Molmo's) does not run it.
    while path and (model.get_submodule(path) is decoder or not contains(model.get_submodule(path), {id(decoder)})):
        path = path.rpartition(".")[0]
    return path


def find_transform(model: nn.Module, unembed: str, decoder: nn.Module) -> nn.Module | None:
    """What stands in the final norm's place in a head of several parts (BERT's), or None."""
    owner = model.get_submodule(unembed.rpartition(".")[0])
    last = model.get_submodule(unembed)
    others = [child for child in owner.children() if child is not last and any(True for _ in child.parameters())]
    return others[0] if len(others) == 1 and not contains(owner, {id(decoder)}) else None


def never_said(logits: Float[Tensor, "... vocab"]) -> Bool[Tensor, " vocab"]:
    """Words whose logits a model sets to the least number there is, everywhere (Chameleon's image tokens)."""
    return (logits == torch.finfo(logits.dtype).min).flatten(0, -2).all(dim=0)


def logit_scale(inner: Any, config: Any, *heads: nn.Module) -> float:
    """What the unembedding's output is multiplied by: a number of the configuration, which may divide (Granite).

    Args:
        inner: The transformers model.
        config: The text's configuration.
        heads: Modules inside that run decoder and unembedding.
    """
    for name in LOGIT_SCALE_NAMES:
        if (value := _applied(inner, config, name)) is not None:
            divides = re.search(rf"/\s*[\w.]*\b{name}\b", source_of(type(inner).forward))
            return 1 / value if divides else value
    sources = [source_of(type(module).forward) for module in (inner, *heads)]
    for written, switch in _SHRUNK:
        if getattr(config, switch, False) and any(written in source for source in sources):
            return float(config.d_model**-0.5)
    return 1.0


def logit_cap(inner: Any, config: Any) -> float | None:
    """The soft-cap of the logits."""
    return _applied(inner, config, "final_logit_softcapping")


def word_count(inner: Any, config: Any) -> int | None:
    """How many of the unembedding's outputs are words, where it has more; None if all are."""
    found = (_applied(inner, config, name) for name in WORD_COUNT_NAMES)
    return next((int(count) for count in found if count is not None), None)


def _applied(model: Any, config: Any, name: str) -> float | None:
    """A number of the configuration, if the forward uses it: Gemma 3 with images names a soft-cap and does not."""
    value = getattr(config, name, None)
    return value if value is not None and name in source_of(type(model).forward) else None


def logits_of(
    model: nn.Module, end: Readout, resid: Float[Tensor, "... d_model"], *, grad: bool = False
) -> Float[Tensor, "... vocab"]:
    """unembed(final norm(resid)), with the model's scale and soft-cap; with `grad` part of the gradient's graph."""
    with torch.set_grad_enabled(grad):
        unembed = model.get_submodule(end.unembed)
        value = one_stream(model, end, resid.to(device_of(unembed), dtype_of(unembed)))
        if end.final_norm:
            value = model.get_submodule(end.final_norm)(value)
        logits: Tensor = unembed(value)[..., : end.words] * end.logit_scale
        return logits if (cap := end.logit_cap) is None else cap * torch.tanh(logits / cap)


def one_stream(model: nn.Module, end: Readout, resid: Float[Tensor, "... d"]) -> Float[Tensor, "... d_model"]:
    """What the final norm stands on: the stream itself, or what a model of several streams makes of them.

    Raises:
        BadInputError: If the value has not as many streams as the model.
    """
    streams, path = end.streams, end.collapse
    if path is None:
        return resid
    if resid.ndim < 2 or resid.shape[-2] != streams:
        raise BadInputError(
            f"a stream of {tuple(resid.shape)} is not {streams} streams side by side (..., {streams}, d)"
        )
    whole: Tensor = model.get_submodule(path)(resid.reshape(1, -1, *resid.shape[-2:]))
    return whole.reshape(*resid.shape[:-2], -1)
