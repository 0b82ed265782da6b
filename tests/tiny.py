"""Models of every family with random weights, two layers, built from their configurations to fit `tests.processors`."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText

from hooked_mm.structure import Stack, Structure
from tests.processors import PINPOINTS, processor

_STACK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_HEADS = {**_STACK, "num_key_value_heads": 4}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


def _config(family: str, vocab: int, token: int) -> Any:
    text: dict[str, Any] = {**_HEADS, "vocab_size": vocab, "max_position_embeddings": 1024, "pad_token_id": 0}
    llama = {"model_type": "llama", **text}
    clip = {"model_type": "clip_vision_model", **_STACK, "projection_dim": 32}
    siglip = {"model_type": "siglip_vision_model", **_STACK}
    image = {"image_token_id": token}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    match family:
        case "llava":
            vision = {**clip, "image_size": 24, "patch_size": 8}
            return transformers.LlavaConfig(vision_config=vision, text_config=llama, **image)
        case "llava_next":
            vision = {**clip, "image_size": 16, "patch_size": 4}
            return transformers.LlavaNextConfig(
                vision_config=vision, text_config=llama, image_grid_pinpoints=PINPOINTS, **image
            )
        case "llava_onevision":
            vision = {**siglip, "image_size": 16, "patch_size": 4, "vision_use_head": False}
            return transformers.LlavaOnevisionConfig(
                vision_config=vision,
                text_config={"model_type": "qwen2", **text},
                image_grid_pinpoints=PINPOINTS,
                vision_aspect_ratio="anyres_max_2",
                video_token_id=token + 1,
                **image,
            )
        case "idefics2":
            vision = {**_STACK, "image_size": 48, "patch_size": 8}
            perceiver = {
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            }
            return transformers.Idefics2Config(
                text_config={"model_type": "mistral", **text}, vision_config=vision, perceiver_config=perceiver, **image
            )
        case "idefics3" | "smolvlm":
            kind = {"idefics3": transformers.Idefics3Config, "smolvlm": transformers.SmolVLMConfig}[family]
            vision = {**_STACK, "image_size": 16, "patch_size": 4}
            return kind(text_config=llama, vision_config=vision, scale_factor=2, **image)
        case "qwen2_vl":
            vision = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
            return transformers.Qwen2VLConfig(text_config={**text, **ids, **_MROPE}, vision_config=vision, **image)
        case "qwen2_5_vl":
            vision = {
                **{k: v for k, v in _STACK.items() if k not in ("num_hidden_layers", "num_attention_heads")},
                "depth": 2,
                "num_heads": 4,
                "patch_size": 4,
                "window_size": 16,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            }
            return transformers.Qwen2_5_VLConfig(text_config={**text, **ids, **_MROPE}, vision_config=vision, **image)
        case "qwen3_vl":
            vision = {
                "hidden_size": 32,
                "intermediate_size": 48,
                "depth": 2,
                "num_heads": 4,
                "patch_size": 4,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            }
            return transformers.Qwen3VLConfig(
                text_config={**text, **ids, **_MROPE, "head_dim": 8}, vision_config=vision, **image
            )
        case "gemma3":
            vision = {**siglip, "image_size": 16, "patch_size": 4, "vision_use_head": False}
            return transformers.Gemma3Config(
                text_config={**text, "head_dim": 8, "sliding_window": 64},
                vision_config=vision,
                mm_tokens_per_image=4,
                **image,
            )
        case "internvl":
            vision = {**_STACK, "image_size": [16, 16], "patch_size": [4, 4]}
            return transformers.InternVLConfig(
                vision_config=vision, text_config={"model_type": "qwen2", **text}, image_seq_length=4, **image
            )
        case "mllama":
            vision = {
                **{k: v for k, v in _STACK.items() if k != "num_attention_heads"},
                "attention_heads": 4,
                "num_global_layers": 1,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [1],
                "max_num_tiles": 4,
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            }
            rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
            return transformers.MllamaConfig(
                vision_config=vision, text_config={**text, **rope, "cross_attention_layers": [1]}, image_token_id=token
            )
        case "blip-2":
            vision = {**_STACK, "image_size": 16, "patch_size": 4}
            qformer = {**_STACK, "encoder_hidden_size": 32, "vocab_size": 30, "cross_attention_frequency": 1}
            opt = {
                "model_type": "opt",
                "vocab_size": vocab,
                "hidden_size": 32,
                "word_embed_proj_dim": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 256,
            }
            return transformers.Blip2Config(
                vision_config=vision, qformer_config=qformer, text_config=opt, num_query_tokens=5, image_token_id=token
            )
        case "florence2":
            vision = {
                "embed_dim": [8, 16],
                "num_heads": [2, 2],
                "num_groups": [2, 2],
                "depths": [1, 1],
                "patch_size": [7, 3],
                "patch_stride": [4, 4],
                "patch_padding": [3, 1],
                "patch_prenorm": [False, True],
                "window_size": 2,
                "projection_dim": 32,
            }
            bart = {
                "model_type": "bart",
                "vocab_size": vocab,
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "max_position_embeddings": 256,
                "pad_token_id": 0,
                "decoder_start_token_id": 2,
            }
            return transformers.Florence2Config(
                text_config=bart, vision_config=vision, is_encoder_decoder=True, **image
            )
    raise ValueError(family)


def image_token_id(family: str) -> int:
    """The id whose embedding image features replace."""
    made = processor(family)
    name = made.tokenizer.image_token if family == "gemma3" else str(made.image_token)
    return made.tokenizer.convert_tokens_to_ids(name)


@functools.cache
def tiny(family: str) -> Any:
    """A model of a family, random weights, in evaluation mode (shared: leave it as it is)."""
    torch.manual_seed(0)
    config = _config(family, len(processor(family).tokenizer), image_token_id(family))
    return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


def structure(family: str) -> Structure:
    """A structure that knows the image token; paths are not needed by batches."""
    stack = Stack(2, 32, 4, 4, 8, 48, "", MappingProxyType({}))
    return Structure(family, stack, None, None, "", "", "", image_token_id(family), plain_positions=False)
