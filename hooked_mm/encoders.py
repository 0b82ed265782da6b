"""Which module encodes what: the vision tower and the text encoder, and their configurations.

An encoder reads text if its forward takes `input_ids`; it is a tower if it does not, and holds no token embedding.
Encoder-decoders have either kind, or both: the tower inside the text encoder.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from hooked_mm.architectures import TOWER_NAMES
from hooked_mm.errors import UnsupportedModelError


def vision_config(config: Any) -> Any:
    """The tower's configuration: the model's or its encoder's part, or the encoder's own where that has no words."""
    encoder = getattr(config, "encoder", None)
    for holder in (config, encoder):
        if (found := getattr(holder, "vision_config", None)) is not None:
            return found
    return encoder if hasattr(encoder, "patch_size") and not hasattr(encoder, "vocab_size") else None


def encoder_config(config: Any) -> Any:
    """The text encoder's configuration, which may be the decoder's too."""
    own = getattr(getattr(config, "encoder", None), "text_config", None)
    return config.get_text_config() if own is None else own


def reads_text(module: nn.Module) -> bool:
    """Whether a module's forward takes token ids."""
    return "input_ids" in inspect.signature(type(module).forward).parameters


def require_pictures(model: nn.Module, tower: nn.Module | None) -> None:
    """Refuse a model without a tower whose forward takes nothing that could be a picture.

    Raises:
        UnsupportedModelError: For such a model (Evolla, which reads proteins; language models without images).
    """
    takes = [name for name in inspect.signature(type(model).forward).parameters if name not in ("self", "kwargs")]
    if tower is None and not any(word in name for name in takes for word in ("pixel", "patch", "image")):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no pictures: it has no vision tower, and its forward takes "
            f"{', '.join(takes)}"
        )


def _has_words(module: nn.Module, vocabulary: int) -> bool:
    return any(isinstance(m, nn.Embedding) and m.num_embeddings == vocabulary for m in module.modules())


def _is_encoder_decoder(model: Any) -> bool:
    """By configuration, or because its forward takes ids for a decoder besides (DiffusionGemma's canvas)."""
    config = model.config
    if "decoder_input_ids" in inspect.signature(type(model).forward).parameters and hasattr(model, "get_encoder"):
        return True
    return any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config()))


def vision_encoder(model: Any, vocabulary: int) -> nn.Module | None:
    """The tower by transformers' conventions; None if they name none.

    Args:
        model: The transformers model.
        vocabulary: How many rows a token embedding has.
    """
    for name in TOWER_NAMES:
        if isinstance(own := getattr(model.base_model, name, None), nn.Module):
            return own
    holder, seen = model, set()
    while id(holder) not in seen and hasattr(holder, "get_encoder"):
        seen.add(id(holder))
        known = [holder.get_encoder(modality="image")]
        known += [holder.get_encoder()] if _is_encoder_decoder(model) else []
        for found in known:
            if found is holder or isinstance(found, type(model)):
                continue
            if not _has_words(found, vocabulary) and not reads_text(found):
                return found if isinstance(found, nn.Module) else None
            holder = found
            break
    return None


def text_encoder(model: Any, tower: nn.Module | None) -> nn.Module | None:
    """The module that runs an encoder-decoder's text encoder; None for any other model."""
    if not _is_encoder_decoder(model):
        return None
    found = model.get_encoder()
    decoder = model.get_decoder()
    # BLIP's models for either kind of language model call a decoder their encoder, too.
    if (
        found is model
        or found is tower
        or any(module is decoder for module in found.modules())
        or not reads_text(found)
    ):
        return None
    inside = tower is not None and any(module is tower for module in found.modules())
    deeper: nn.Module = found.get_decoder() if inside and hasattr(found, "get_decoder") else found
    return deeper
