"""LLaVA-1.5 and LLaVA-Med v1.5 as their authors published them, loaded into transformers' LLaVA.

The originals are language models whose config.json tells of the tower and the projector besides; their weights have
other names, the tower may be inside (LLaVA-Med v1.5) or be a CLIP named in `mm_vision_tower` (LLaVA-1.5), and there
is no `<image>` in the vocabulary: the original code splices features in where its prompts say so.

All names and sizes are checked before a weight is read. Then the model, built without memory for weights, is filled
file after file: one file is open at a time, and each tensor is copied to its device in the dtype asked for.

**Added tokens.** transformers marks an image's positions by an id of the vocabulary, so `<image>` is added (and
`<pad>`, if the tokenizer has no padding token), behind the original's. Embeddings and unembedding get a row for each
where they have none: the mean of the original rows. The embedding of `<image>` is replaced by features and never
read. As its row of the unembedding is the mean of all others, an added token's logit is the mean of the original
logits: never above all of them, and its probability is at most one part in the vocabulary's size. Generation never
says an added token (`suppress_tokens`). The logits of the original vocabulary are the original's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PretrainedConfig,
)

from hooked_mm.checkpoint import Checkpoint, settled_dtype
from hooked_mm.errors import BadInputError, UnsupportedModelError
from hooked_mm.hub_files import fetch
from hooked_mm.llava_keys import (
    ACTIVATIONS,
    CLIP_LARGE,
    CLIP_TOWERS,
    DECODER_SETTINGS,
    DECODERS,
    TOWER,
    UNUSED,
    UNUSED_OF_CLIP,
    check_names,
    check_settings,
    listed,
    original_name,
    unused,
)
from hooked_mm.llava_processor import make_processor
from hooked_mm.placement import Placement
from hooked_mm.weight_files import Entry, entries, tensors

_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}
_GROWN = ("model.language_model.embed_tokens.weight", "lm_head.weight")
"""Weights with a row for every token."""


@dataclass(frozen=True)
class Tower:
    """A CLIP, where a checkpoint has none inside: `entries` are its weights by CLIP's names.

    Attributes:
        source: Folder or hub id.
        config: Of the tower alone.
        pictures: Its preprocessor_config.json, if it has one.
        entries: Empty where the checkpoint's own are used.
    """

    source: str
    config: CLIPVisionConfig
    pictures: dict[str, Any] | None = None
    entries: dict[str, Entry] = field(default_factory=dict)


def load_llava_original(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device_map: Any = None,
    vision_tower: str | Path | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **others: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A checkpoint in the original layout as transformers' model and processor.

    Args:
        source: Folder or hub id.
        dtype: Of the weights; `"auto"` or None for what config.json says.
        device_map: As in transformers: None, a device, `"auto"`, or a table of modules and devices.
        vision_tower: Folder or hub id of the CLIP to use in place of the one that config.json names. Weights of the
            tower inside the checkpoint win over both.
        max_memory: For `device_map="auto"`, as in accelerate.
        offload_folder: Where weights go whose device is `"disk"`.
        attn_implementation: As in transformers.
        trust_remote_code: Changes nothing: nothing here runs code of a checkpoint.
        revision: Of the checkpoint on the hub (not of the tower).
        local_files_only: Download nothing.
        token: Of the hub.
        cache_dir: Where downloads lie.
        others: None is known; any is refused.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        BadInputError: If a file is not there or can't be read safely, a tensor is missing, has no place or another
            size than the configuration says, or an option is not known.
        UnsupportedModelError: If the configuration asks for what transformers' LLaVA can't do.
    """
    del trust_remote_code
    if others:
        raise BadInputError(
            f"LLaVA in its original layout is not loaded with {listed(others)}. Write it in transformers' layout first "
            "(model.save_pretrained(folder), processor.save_pretrained(folder)); that loads with all options"
        )
    hub = {"local_files_only": local_files_only, "token": token, "cache_dir": cache_dir}
    folder = fetch(source, ["*.json", "*.model", "*.txt"], revision, "model", **hub)
    written = _read(folder / "config.json")
    check_settings(written)
    held, kept = _heads(written, dtype, source, revision, hub)
    tower = _tower(written, vision_tower, folder, any(key.startswith(TOWER) for key in held), hub)
    text = _decoder(written)
    processor = make_processor(folder, written, text, tower.config, tower.pictures)
    config = _config(written, text, tower.config, processor, kept)
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    places = _places(model, written, held, tower, str(source))
    placement = Placement(model, device_map, dtype=kept, max_memory=max_memory, offload_folder=offload_folder)
    _fill(placement, places, model.config.text_config.vocab_size, kept)
    for name, value in _identity(model, written).items():
        placement.put(name, value)
    placement.finish()
    model.generation_config = _generation(folder, processor, written)
    return model.eval(), processor


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{file} can't be read: {error}") from error
    return dict(found)


def _heads(
    written: Mapping[str, Any],
    dtype: str | torch.dtype | None,
    source: str | Path,
    revision: str | None,
    hub: Mapping[str, Any],
) -> tuple[dict[str, Entry], torch.dtype]:
    """What the files hold, and the dtype that the weights shall have; all files are closed again."""
    checkpoint = Checkpoint(source, revision=revision, **hub)
    said = SimpleNamespace(dtype=written.get("torch_dtype") or written.get("dtype"))
    kept = settled_dtype(checkpoint, said, dtype or "auto")
    if not kept.is_floating_point:
        raise BadInputError(f"dtype={dtype!r}: weights are of a floating dtype, like 'bfloat16'")
    return entries(checkpoint.files), kept


def _decoder(written: Mapping[str, Any]) -> PretrainedConfig:
    given = {name: written[name] for name in DECODER_SETTINGS if name in written}
    if given.get("rope_scaling", 0) is None:
        # Newer versions of transformers warn of the name.
        del given["rope_scaling"]
    return _CONFIGS[DECODERS[written["model_type"]]](**given)


def config_of_ends(written: Mapping[str, Any]) -> tuple[LlavaConfig, Callable[[str], str | None]]:
    """What is needed to read final norm and unembedding alone.

    Args:
        written: The original's config.json.

    Returns:
        A configuration with the original's decoder and vocabulary (the tower is any), and what gives a weight of
        `LlavaForConditionalGeneration` its name in the original's checkpoint.
    """
    check_settings(written)
    made = LlavaConfig(
        text_config=_decoder(written),
        tie_word_embeddings=bool(written.get("tie_word_embeddings", False)),
        dtype=written.get("torch_dtype") or written.get("dtype"),
    )
    return made, lambda name: original_name(name, written.get("mm_projector_type") or "linear")


def _config(
    written: Mapping[str, Any], text: PretrainedConfig, tower: CLIPVisionConfig, processor: Any, dtype: torch.dtype
) -> LlavaConfig:
    text.vocab_size = max(text.vocab_size, len(processor.tokenizer))
    text.pad_token_id = processor.tokenizer.pad_token_id
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        projector_hidden_act=ACTIVATIONS[written.get("mm_projector_type") or "linear"],
        vision_feature_layer=written["mm_vision_select_layer"],
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=bool(written.get("tie_word_embeddings", False)),
        pad_token_id=text.pad_token_id,
        dtype=dtype,
    )


def _tower(
    written: Mapping[str, Any], asked: str | Path | None, folder: Path, inside: bool, hub: Mapping[str, Any]
) -> Tower:
    """The tower's configuration, and its weights where the checkpoint has none."""
    named = str(asked or written.get("mm_vision_tower") or "")
    if not named:
        raise BadInputError("config.json names no vision tower; say which CLIP it is: vision_tower='...'")
    at = next((place for place in (Path(named), folder / named) if place.is_dir()), None)
    own = folder / "preprocessor_config.json"
    pictures = _read(own) if own.is_file() else None
    if inside and at is None and named in CLIP_TOWERS:
        return Tower(named, CLIPVisionConfig(**CLIP_LARGE, **CLIP_TOWERS[named]), pictures)
    try:
        found = at or fetch(named, ["config.json", "preprocessor_config.json"], None, "vision tower", **hub)
        files = [] if inside else Checkpoint(at or named, **hub).files
    except BadInputError as error:
        raise BadInputError(
            f"the vision tower {named!r} can't be had ({error}); name a folder or another: vision_tower='...'"
        ) from error
    said = _read(found / "config.json")
    if said.get("model_type") not in ("clip", "clip_vision_model"):
        raise UnsupportedModelError(
            f"the vision tower {named!r} is of type {said.get('model_type')!r}; the original layout is loaded with CLIP"
        )
    said = said.get("vision_config", said)
    if (found / "preprocessor_config.json").is_file():
        pictures = _read(found / "preprocessor_config.json")
    return Tower(named, CLIPVisionConfig.from_dict(said), pictures, entries(files))


Places = dict[str, tuple[str, Entry]]
"""Of a weight of the model: what its file calls it, and where it is."""


def _places(model: Any, written: Mapping[str, Any], held: Mapping[str, Entry], tower: Tower, source: str) -> Places:
    """Where every weight comes from; refuses what is missing, has no place, or has another size."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    projector = written.get("mm_projector_type") or "linear"
    wanted = {original_name(name, projector): name for name in weights}
    wanted.pop(None, None)
    clip = {}
    if tower.entries:
        # Newer versions of transformers save a tower without CLIP's `vision_model.`.
        clip = {key.removeprefix("vision_model."): (key, entry) for key, entry in tower.entries.items()}
        asked = {key.removeprefix(f"{TOWER}vision_model."): key for key in wanted if key and key.startswith(TOWER)}
        check_names(
            f"the vision tower {tower.source!r}",
            {f"vision_model.{part}" for part in asked.keys() - clip.keys()},
            {key for part, (key, _) in clip.items() if part not in asked and not unused(key, UNUSED_OF_CLIP)},
        )
        clip = {wanted.pop(key): clip[part] for part, key in asked.items()}
    check_names(
        source,
        {str(key) for key in wanted.keys() - held.keys()},
        {key for key in held.keys() - wanted.keys() if not unused(key, UNUSED, tied=model.config.tie_word_embeddings)},
    )
    places = {**{name: (str(key), held[str(key)]) for key, name in wanted.items()}, **clip}
    rows = written["vocab_size"]
    misfits = []
    for name, (key, entry) in places.items():
        shape = tuple(weights[name].shape)
        should = (rows, *shape[1:]) if name in _GROWN else shape
        if entry.shape != should:
            misfits.append(f"{key} is {entry.shape}, not {should}")
    if misfits:
        raise BadInputError(
            f"{len(misfits)} tensors of {source} have other sizes than its configuration says: {listed(misfits)}"
        )
    return places


def _fill(placement: Placement, places: Places, rows: int, dtype: torch.dtype) -> None:
    """Every weight from its file, one file after the other."""
    by_file: dict[Path, dict[str, str]] = {}
    for name, (key, entry) in places.items():
        by_file.setdefault(entry.file, {})[key] = name
    for file, names in by_file.items():
        for key, value in tensors(file, names):
            name = names[key]
            placement.put(name, _grown(value, rows, dtype) if name in _GROWN else value)


def _grown(value: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The same rows, followed by their mean until there are `rows`."""
    if len(value) == rows:
        return value
    made = torch.empty((rows, value.shape[1]), dtype=dtype)
    made[: len(value)] = value
    made[len(value) :] = value.mean(0, dtype=torch.float32)
    return made


def _identity(model: Any, written: Mapping[str, Any]) -> dict[str, Tensor]:
    """A second layer that changes nothing, where the projector has one alone."""
    if (written.get("mm_projector_type") or "linear") != "linear":
        return {}
    size = model.config.text_config.hidden_size
    layer = "model.multi_modal_projector.linear_2."
    return {f"{layer}weight": torch.eye(size), f"{layer}bias": torch.zeros(size)}


def _generation(folder: Path, processor: Any, written: Mapping[str, Any]) -> GenerationConfig:
    """As the original says, but added tokens are never said."""
    if (folder / "generation_config.json").is_file():
        made = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    else:
        ends = {name: written.get(name) for name in ("bos_token_id", "eos_token_id")}
        made = GenerationConfig(**ends)
    made.pad_token_id = processor.tokenizer.pad_token_id
    added = {processor.image_token_id, *range(written["vocab_size"], len(processor.tokenizer))}
    made.suppress_tokens = sorted(added)
    return made
