"""Miniatures in the original layout of LLaVA-1.5 and LLaVA-Med, written by hand from transformers models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from tests.processors import _tokenizer

PUBLISHED = {
    # liuhaotian/llava-v1.5-13b
    "llava-1.5": {
        "_name_or_path": "llava-v1.5-13b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 13824,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 40,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": 32000,
    },
    # The settings of microsoft/llava-med-v1.5-mistral-7b: Mistral-7B-Instruct-v0.2's with LLaVA's beside them.
    "llava-med-1.5": {
        "architectures": ["LlavaMistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2",
        "tune_mm_mlp_adapter": False,
        "use_cache": False,
        "use_mm_proj": True,
        "vocab_size": 32000,
    },
}

PREFIX = "model.vision_tower.vision_tower.vision_model."
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}


def tokenizer() -> Any:
    """As the originals': no image token; `<unk>` pads."""
    return _tokenizer(["<unk>"], "<unk>", "<s>", "</s>")


def source_model(decoder: str = "mistral", projector: str = "mlp2x_gelu", seed: int = 0) -> Any:
    """A transformers model as conversions of originals are: two rows more than the original vocabulary, image first."""
    vocabulary = len(tokenizer())
    text = {**_TEXT, "vocab_size": vocabulary + 2, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        # Settings that are not the classes' defaults, so that one that is not handed on shows.
        text_config=MistralConfig(**text, rope_theta=50.0, sliding_window=None)
        if decoder == "mistral"
        else LlamaConfig(**text, rope_theta=70.0),
        image_token_index=vocabulary,
        projector_hidden_act="gelu" if projector == "mlp2x_gelu" else "linear",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
        if projector == "linear":
            model.model.multi_modal_projector.linear_2.weight.copy_(torch.eye(32))
            model.model.multi_modal_projector.linear_2.bias.zero_()
    return model


def original_names(model: Any, projector: str) -> dict[str, Tensor]:
    """Its weights by the original's names, the tower's too, without the two rows."""
    rows, made = len(tokenizer()), {}
    for name, value in model.state_dict().items():
        match name.split("."):
            case ["lm_head", "weight"]:
                made["lm_head.weight"] = value[:rows].clone()
            case ["model", "language_model", "embed_tokens", "weight"]:
                made["model.embed_tokens.weight"] = value[:rows].clone()
            case ["model", "language_model", *rest]:
                made[".".join(["model", *rest])] = value
            case ["model", "vision_tower", "vision_model", *rest] | ["model", "vision_tower", *rest]:
                made[PREFIX + ".".join(rest)] = value
            case ["model", "multi_modal_projector", layer, leaf]:
                if projector == "mlp2x_gelu":
                    made[f"model.mm_projector.{'0' if layer == 'linear_1' else '2'}.{leaf}"] = value
                elif layer == "linear_1":
                    made[f"model.mm_projector.{leaf}"] = value
            case _:
                raise AssertionError(name)
    return made


def write_weights(folder: Path, weights: dict[str, Tensor], kind: str = "safetensors", shards: int = 1) -> list[Path]:
    """One file, or shards and their index; `kind` is "safetensors" or "bin"."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(weights)
    if shards == 1:
        files = {f"{stem}.{kind}": names}
    else:
        files = {f"{stem}-{i + 1:05}-of-{shards:05}.{kind}": names[i::shards] for i in range(shards)}
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        part = {name: weights[name].contiguous() for name in held}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    return [folder / file for file in files]


def write_tower(folder: Path, weights: dict[str, Tensor], **pictures: Any) -> Path:
    """A CLIP as on the hub: with its text encoder, which is of no use here."""
    folder.mkdir()
    tower = {f"vision_model.{name.removeprefix(PREFIX)}": w for name, w in weights.items() if name.startswith(PREFIX)}
    tower |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(())}
    tower |= {"vision_model.embeddings.position_ids": torch.arange(10)[None], "visual_projection.weight": torch.ones(4)}
    write_weights(folder, tower)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": _VISION}))
    if pictures:
        (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def write_original(
    folder: Path,
    model: Any,
    *,
    decoder: str = "mistral",
    projector: str = "mlp2x_gelu",
    inside: bool = True,
    kind: str = "safetensors",
    shards: int = 1,
    extra: dict[str, Tensor] | None = None,
    without: tuple[str, ...] = (),
    **settings: Any,
) -> Path:
    """A folder in the original layout beside a folder `clip` (its configuration alone if the tower is inside)."""
    folder.mkdir(parents=True)
    weights = original_names(model, projector)
    if inside:
        clip = folder.parent / "clip"
        clip.mkdir(exist_ok=True)
        (clip / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **_VISION}))
    else:
        clip = write_tower(folder.parent / "clip", weights)
        weights = {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
    weights = {name: value for name, value in {**weights, **(extra or {})}.items() if name not in without}
    write_weights(folder, weights, kind, shards)
    published = PUBLISHED["llava-med-1.5" if decoder == "mistral" else "llava-1.5"]
    theta = {"mistral": 50.0, "llama": 70.0}[decoder]
    config = {**published, **_TEXT, "vocab_size": len(tokenizer()), "rope_theta": theta, "torch_dtype": "float32"}
    config |= {"mm_vision_tower": str(clip), "mm_projector_type": projector, "mm_hidden_size": 24, "pad_token_id": 0}
    config |= {"bos_token_id": tokenizer().bos_token_id, "eos_token_id": tokenizer().eos_token_id, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(folder)
    return folder
