"""Models of every family with random weights, two layers, built from their configurations to fit `tests.processors`."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from hooked_mm.access import Access, FieldValue, ModuleValue
from hooked_mm.batch import Batch
from hooked_mm.cache import ActivationCache
from hooked_mm.hook_points import HookPoint, Stream
from hooked_mm.prepare import prepare
from hooked_mm.resolve import resolve
from hooked_mm.structure import Structure
from hooked_mm.testing.miniatures import miniature
from tests.processors import PINPOINTS, processor
from tests.versions import IN_CLIP

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
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        # Zero (gates, Gemma 3's projector) or nearly so (BLIP-2's tower): no image would get through.
        if name.endswith("mm_input_projection_weight"):
            weight.normal_(std=0.02)
        elif not weight.any() or (weight.ndim > 1 and weight.std() < 1e-6):
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


@functools.cache
def _llava() -> Structure:
    return resolve(miniature("llava"))


def structure(family: str) -> Structure:
    """A structure that knows the image token; paths are not needed by batches."""
    return replace(_llava(), family=family, image_token_id=image_token_id(family), plain_positions=False)


_TOWERS = {
    "idefics2": "model.vision_model.encoder.layers.0",
    "idefics3": "model.vision_model.encoder.layers.0",
    "smolvlm": "model.vision_model.encoder.layers.0",
    "qwen2_vl": "model.visual.blocks.0",
    "qwen2_5_vl": "model.visual.blocks.0",
    "qwen3_vl": "model.visual.blocks.0",
    "internvl": "model.vision_tower.encoder.layer.0",
    "mllama": "model.vision_model.transformer.layers.0",
    "blip-2": "vision_model.encoder.layers.0",
}
_TEXTS = {
    "idefics2": "model.text_model.layers.0",
    "idefics3": "model.text_model.layers.0",
    "smolvlm": "model.text_model.layers.0",
    "blip-2": "language_model.model.decoder.layers.0",
    "florence2": "model.language_model.encoder.layers.0",
}
_PROJECTORS = {
    "idefics2": "model.connector",
    "idefics3": "model.connector",
    "smolvlm": "model.connector",
    "qwen2_vl": "model.visual.merger",
    "qwen2_5_vl": "model.visual.merger",
    "qwen3_vl": "model.visual.merger",
    "blip-2": "language_projection",
}


def points(family: str) -> dict[str, HookPoint]:
    """Where the test looks: what enters the first blocks of tower and text, and what the projector makes."""
    tower = _TOWERS.get(family, f"model.vision_tower.{IN_CLIP}encoder.layers.0")
    text = _TEXTS.get(family, "model.language_model.layers.0")
    projector = _PROJECTORS.get(family, "model.multi_modal_projector")
    out: Access = ModuleValue(projector, "output")
    if family == "qwen2_5_vl":
        # The projector's own output is in window order.
        out = FieldValue("model.visual", "pooler_output")
    # An encoder-decoder's image positions are its encoder's.
    stream: Stream = "encoder" if family == "florence2" else "text"
    found = [
        HookPoint("projector.hook_in", "projector", None, "", ModuleValue(projector, "input")),
        HookPoint("projector.hook_out", "projector", None, "", out),
        HookPoint("hook_embed", stream, None, "", ModuleValue(text, "input")),
    ]
    if family != "florence2":
        found.append(HookPoint("vision.hook_embed", "vision", None, "", ModuleValue(tower, "input")))
    return {point.name: point for point in found}


def run(family: str, batch: Batch, model: Any = None) -> ActivationCache:
    """A forward pass, read by raw PyTorch hooks at `points`."""
    model = model or tiny(family)
    values: dict[str, torch.Tensor] = {}

    def take(name: str, value: Any) -> None:
        values[name] = (value[0] if isinstance(value, tuple) else value).clone()

    handles = []
    for name, point in points(family).items():
        module = model.get_submodule(point.module)
        access = point.access
        if isinstance(access, FieldValue):
            field = access.name
            handles.append(module.register_forward_hook(lambda m, a, o, n=name, f=field: take(n, getattr(o, f))))
        elif isinstance(access, ModuleValue) and access.side == "output":
            handles.append(module.register_forward_hook(lambda m, a, out, name=name: take(name, out)))
        else:

            def before(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                take(name, args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor)))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return ActivationCache(values, batch, points(family))


@functools.cache
def position_wise(family: str) -> Any:
    """The same model with a tower whose blocks do nothing: what a patch holds stays where it is."""
    model = copy.deepcopy(tiny(family))
    stack = points(family)["vision.hook_embed"].module.rsplit(".", 1)[0]
    for name, weight in model.get_submodule(stack).named_parameters():
        # What attention and MLP write into the stream.
        if name.split(".")[-2] in ("out_proj", "o_proj", "fc2", "proj", "down_proj", "linear_fc2", "projection_layer"):
            weight.zero_()
    return model


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch_of(family: str, pictures: list[list[Image.Image]], side: str = "left", variant: Any = None) -> Batch:
    """A prepared batch of a family, one question per sample; `variant` is another processor for it."""
    return prepare(
        variant or processor(family),
        structure(family),
        tiny(family).config,
        pictures,
        ["what is it?", "where", "and the colour of this one?", "how many"][: len(pictures)],
        [None] * len(pictures),
        template=True,
        padding_side=side,
        dtype=torch.float32,
    )
