"""The layout of LLaVA-1.5's and LLaVA-Med v1.5's own checkpoints, as tables: names, towers, what is never used.

Sources: the training repositories haotian-liu/LLaVA (llava/model/llava_arch.py, multimodal_projector/builder.py,
multimodal_encoder/clip_encoder.py) and microsoft/LLaVA-Med (the same files), and transformers' script
models/llava/convert_llava_weights_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from hooked_mm.errors import BadInputError, UnsupportedModelError

DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""The decoder of a configuration, by its `model_type`."""

PROJECTORS = {
    "linear": (("model.multi_modal_projector.linear_1.", "model.mm_projector."),),
    "mlp2x_gelu": (
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ),
}
"""`mm_projector_type` -> transformers' name of a layer, and the original's. One layer alone is followed in
transformers' projector by nothing that changes anything: no activation and the identity."""

ACTIVATIONS = {"linear": "linear", "mlp2x_gelu": "gelu"}
"""What stands between transformers' two layers of a projector."""

TOWER = "model.vision_tower.vision_tower."
"""What the tower's weights begin with inside a checkpoint; behind it come CLIP's own names."""

UNUSED = (
    (
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        "a constant of the rotary embedding, which older versions of transformers saved",
    ),
    (r"model\.rotary_emb\.inv_freq", "a constant of the rotary embedding"),
    (
        r"(model\.vision_tower\.vision_tower\.)?vision_model\.embeddings\.position_ids",
        "0, 1, 2, ...; older versions of transformers saved them",
    ),
    (r"model\.image_newline", "used by image_aspect_ratio 'anyres' alone, which is not loaded here"),
)
"""Keys of a checkpoint that nothing reads, and why."""

UNUSED_OF_CLIP = (
    (r"vision_model\.embeddings\.position_ids", "0, 1, 2, ...; older versions of transformers saved them"),
    (r"text_model\..*|text_projection\.weight", "CLIP's encoder of texts"),
    (r"visual_projection\.weight|logit_scale", "what compares pictures with texts"),
)
"""Keys of a CLIP checkpoint that its tower does not read, and why."""

CLIP_TOWERS = {
    "openai/clip-vit-large-patch14-336": {"image_size": 336},
    "openai/clip-vit-large-patch14": {"image_size": 224},
}
"""What sets the published towers apart; the rest is CLIP_LARGE. Known here so that a checkpoint with its tower inside
needs no other file."""

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}

SELECTED = {"patch": "default", "cls_patch": "full"}
"""`mm_vision_select_feature` -> transformers' `vision_feature_select_strategy`."""

PADDED = {None: False, "square": False, "pad": True}
"""`image_aspect_ratio` -> whether a picture is made square by bars in the mean colour; otherwise its middle is cut."""

SETTINGS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("mm_projector_type", (None, *PROJECTORS), "transformers' LLaVA has a projector of one or two layers"),
    ("mm_vision_select_feature", (None, *SELECTED), "transformers' LLaVA knows these two"),
    (
        "image_aspect_ratio",
        tuple(PADDED),
        "it is of LLaVA-1.6, whose conversions for transformers (llava-hf/llava-v1.6-mistral-7b-hf, ...) load as usual",
    ),
    ("mm_resampler_type", (None,), "transformers' LLaVA has no resampler"),
    ("s2", (None, False), "transformers' LLaVA sees a picture in one size"),
    ("quantization_config", (None,), "quantized weights are not loaded from the original layout"),
)
"""Settings of a config.json that change what the model computes: the values that are loaded, and why no others are.
None stands for a setting that is not there."""

DECODER_SETTINGS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling attention_bias "
    "attention_dropout mlp_bias sliding_window bos_token_id eos_token_id pad_token_id tie_word_embeddings"
).split()
"""Settings that the original configuration shares with its decoder's."""


def is_llava_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original layout, not of transformers'."""
    return (
        config.get("model_type") in DECODERS
        and "vision_config" not in config
        and ("mm_vision_tower" in config or "mm_projector_type" in config)
    )


def original_name(name: str, projector: str) -> str | None:
    """What a weight of transformers' LLaVA is called in the original's checkpoint; None where the original has none.

    Args:
        name: Of a weight of `LlavaForConditionalGeneration`.
        projector: `mm_projector_type`.
    """
    if name.startswith("model.vision_tower."):
        part = name.removeprefix("model.vision_tower.")
        # Newer versions of transformers leave CLIP's `vision_model.` out.
        return f"{TOWER}vision_model.{part.removeprefix('vision_model.')}"
    rows = (("lm_head.", "lm_head."), ("model.language_model.", "model."), *PROJECTORS[projector])
    return next((old + name.removeprefix(new) for new, old in rows if name.startswith(new)), None)


def unused(key: str, rows: tuple[tuple[str, str], ...], *, tied: bool = False) -> bool:
    """Whether nothing reads a key.

    Args:
        key: Of a checkpoint.
        rows: UNUSED or UNUSED_OF_CLIP.
        tied: Whether the embeddings are the unembedding too, so that none of its own is read.
    """
    return (tied and key == "lm_head.weight") or any(re.fullmatch(pattern, key) for pattern, _ in rows)


def listed(names: Collection[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    first = sorted(names)[:most]
    return ", ".join(first) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_settings(written: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for more than transformers' LLaVA computes.

    Args:
        written: The original's config.json.

    Raises:
        UnsupportedModelError: For a value that no row of SETTINGS has.
        BadInputError: If the tower's layer is not said.
    """
    for name, known, reason in SETTINGS:
        if written.get(name) not in known:
            raise UnsupportedModelError(
                f"config.json says {name}={written[name]!r}; loaded are {', '.join(map(repr, known))}: {reason}"
            )
    if not isinstance(written.get("mm_vision_select_layer"), int):
        raise BadInputError(
            f"config.json says mm_vision_select_layer={written.get('mm_vision_select_layer')!r}; it must be the number "
            "of the tower's layer whose output the projector takes (-2 in all published checkpoints)"
        )


def check_names(source: str, missing: Collection[str], extra: Collection[str]) -> None:
    """Refuse a checkpoint that lacks a tensor, or has one that nothing is known to leave unused.

    Args:
        source: Whose they are, for the message.
        missing: By the names that the checkpoint should have.
        extra: As the checkpoint names them.

    Raises:
        BadInputError: If there are any.
    """
    if missing:
        raise BadInputError(
            f"{source} lacks {len(missing)} of the tensors that its configuration asks for: {listed(missing)}. "
            "Download it again, or correct config.json"
        )
    if extra:
        raise BadInputError(
            f"{source} has {len(extra)} tensors that have no place in the model and are not known to be unused: "
            f"{listed(extra)}. Its config.json may be of another model; if they are of no use, remove them"
        )
