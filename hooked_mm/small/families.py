"""The small models before training, and what training has to know of each family.

Everything is the family's real transformers class with its real processor, only small, so that whatever works here
works on the large one. No picture is cut: LLaVA pads it to a square, Idefics2 and Qwen2-VL take it as it is.

| family | tower | patches | connector | image tokens | decoder |
|---|---|---|---|---|---|
| llava | CLIP, 96 x 4 | 8 px of a 64 px square | MLP | 64 | Llama, 128 x 6 |
| idefics2 | SigLIP-like, 96 x 4 | 8 px | MLP, perceiver of 2 layers | 36 latents | Mistral, 128 x 6 |
| qwen2_vl | Qwen2-VL's, 80 x 4 | 4 px | merges 2 x 2 | 36 to 54 | Qwen2, 128 x 6, multimodal rotary |
| molmo | CLIP, 80 x 4, blocks 4 and 2 | 4 px of 5 to 7 crops | pools 2 x 2, MLP | 52 to 64, added | OLMo, 128 x 6 |

Add a family: write its `Family` and add it to `FAMILIES`; once trained, name it in `small.SMALL_MODELS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.processors import image_processor_class, without_video
from hooked_mm.small.family import HALF, Family, Pixels, Steps, square, text_config
from hooked_mm.small.family_molmo import Molmo
from hooked_mm.small.tokenizer import build_tokenizer, chat_template


class Llava(Family):
    """CLIP tower, MLP projector, Llama decoder; the tower's last layer without its class token."""

    name = "llava"
    padded = True
    side, patch = 64, 8
    steps = Steps(alignment=500, language=3000)

    def build(self) -> tuple[Any, Any]:
        tokenizer = build_tokenizer(["<image>"])
        processor = transformers.LlavaProcessor(
            image_processor=image_processor_class("Llava")(
                size={"shortest_edge": self.side}, crop_size=square(self.side), do_pad=True, **HALF
            ),
            tokenizer=tokenizer,
            patch_size=self.patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat_template("<image>"),
            image_token="<image>",
        )
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=self.side,
                patch_size=self.patch,
                projection_dim=96,
            ),
            text_config=transformers.LlamaConfig(**text_config(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=(self.side // self.patch) ** 2,
            projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )
        return transformers.LlavaForConditionalGeneration(config), processor

    def patch_grid(self, width: int, height: int) -> tuple[int, int]:
        return self.side // self.patch, self.side // self.patch

    token_grid = patch_grid

    def patches(self, model: Any, pixels: Pixels) -> Float[Tensor, "b patches d_vision"]:
        return model.model.vision_tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]

    def decoder(self, model: Any) -> Any:
        return model.model.language_model


class Idefics2(Family):
    """SigLIP-like tower on pictures of any shape, MLP and perceiver, Mistral decoder."""

    name = "idefics2"
    side, patch, latents = 72, 8, 6
    # Its latents have no place of their own in the picture: what they name is learnt late.
    steps = Steps(tower=2400, alignment=800, language=2600)

    def build(self) -> tuple[Any, Any]:
        specials = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
        tokenizer = build_tokenizer(specials)
        processor = transformers.Idefics2Processor(
            image_processor=image_processor_class("Idefics2")(
                do_image_splitting=False, size={"longest_edge": self.side, "shortest_edge": 48}, **HALF
            ),
            tokenizer=tokenizer,
            image_seq_len=self.latents**2,
            chat_template=chat_template("<image>"),
        )
        config = transformers.Idefics2Config(
            vision_config={
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": self.side,
                "patch_size": self.patch,
            },
            perceiver_config={
                "hidden_size": 128,
                "resampler_n_latents": self.latents**2,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 32,
                "num_key_value_heads": 4,
            },
            text_config=transformers.MistralConfig(**text_config(tokenizer), sliding_window=None),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
        return transformers.Idefics2ForConditionalGeneration(config), processor

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        return self.latents, self.latents

    def patches(self, model: Any, pixels: Pixels) -> Float[Tensor, "b patches d_vision"]:
        values = pixels["pixel_values"].flatten(0, 1)
        shape = (len(values), values.shape[-2] // self.patch, values.shape[-1] // self.patch)
        mask = torch.ones(shape, dtype=torch.bool, device=values.device)
        return model.model.vision_model(pixel_values=values, patch_attention_mask=mask).last_hidden_state

    def decoder(self, model: Any) -> Any:
        return model.model.text_model


class Qwen2VL(Family):
    """Qwen2-VL's tower on pictures of any shape, merging blocks of 2 x 2 patches; rotary positions in three axes."""

    name = "qwen2_vl"
    axes = 3
    patch, merge = 4, 2

    def build(self) -> tuple[Any, Any]:
        image = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        ends = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
        tokenizer = build_tokenizer(
            [*image.values(), *ends.values()], image_token=image["image_token"], video_token=image["video_token"]
        )
        template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
        processor = without_video(transformers.Qwen2VLProcessor)(
            image_processor_class("Qwen2VL")(
                patch_size=self.patch,
                merge_size=self.merge,
                size={"shortest_edge": 40 * 40, "longest_edge": 64 * 64},
                **HALF,
            ),
            tokenizer,
            None,
            template,
        )
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (image | ends).items()}
        text = text_config(tokenizer)
        heads = text["hidden_size"] // text["num_attention_heads"]
        config = transformers.Qwen2VLConfig(
            vision_config={
                "depth": 4,
                "embed_dim": 80,
                "hidden_size": text["hidden_size"],
                "num_heads": 4,
                "mlp_ratio": 4,
                "patch_size": self.patch,
                "spatial_merge_size": self.merge,
                "temporal_patch_size": 2,
            },
            text_config={
                **text,
                # As the large models': the time axis gets a quarter of the frequencies, rows and columns the rest.
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "mrope_section": [heads // 8, heads * 3 // 16, heads * 3 // 16],
                },
            },
            image_token_id=ids["image_token"],
            video_token_id=ids["video_token"],
            vision_start_token_id=ids["vision_bos_token"],
            vision_end_token_id=ids["vision_eos_token"],
            tie_word_embeddings=False,
        )
        return transformers.Qwen2VLForConditionalGeneration(config), processor

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        rows, cols = self.patch_grid(width, height)
        return rows // self.merge, cols // self.merge

    def patch_order(self, rows: int, cols: int) -> Int[Tensor, " patches"]:
        cells = torch.arange(rows * cols).view(rows // self.merge, self.merge, cols // self.merge, self.merge)
        return cells.permute(0, 2, 1, 3).flatten()

    def join(self, pixels: Pixels, rows: Any) -> Pixels:
        values = pixels["pixel_values"][rows].float()
        return {"pixel_values": values.flatten(0, 1), "image_grid_thw": pixels["image_grid_thw"].expand(len(values), 3)}

    def grey(self, values: Float[Tensor, "n *pixels"]) -> Float[Tensor, "n *pixels"]:  # noqa: F821
        # A patch is a row of (channel, frame, height, width).
        channels = values.unflatten(-1, (3, -1))
        return channels.mean(-2, keepdim=True).expand_as(channels).flatten(-2)

    def patches(self, model: Any, pixels: Pixels) -> Float[Tensor, "b patches d_vision"]:
        grid = pixels["image_grid_thw"]
        out = model.model.visual(pixels["pixel_values"], grid_thw=grid).last_hidden_state
        return out.view(len(grid), -1, out.shape[-1])

    def decoder(self, model: Any) -> Any:
        return model.model.language_model

    def positions(self, model: Any, inputs: Mapping[str, Tensor]) -> Int[Tensor, "3 p"]:
        kinds = (inputs["input_ids"] == model.config.image_token_id).int()
        return model.model.get_rope_index(inputs["input_ids"], kinds, inputs["image_grid_thw"])[0][:, 0]


FAMILIES: dict[str, Family] = {family.name: family for family in (Llava(), Idefics2(), Qwen2VL(), Molmo())}


def build(name: str) -> tuple[Any, Any]:
    """A family's model, randomly initialised and ready to generate, and its processor."""
    model, processor = FAMILIES[name].build()
    tokenizer = processor.tokenizer
    model.generation_config.update(
        **{f"{special}_token_id": getattr(tokenizer, f"{special}_token_id") for special in ("pad", "bos", "eos")}
    )
    return model, processor


def save_model(name: str, model: Any, folder: Path) -> None:
    """As `save_pretrained`, weights in bfloat16; the configuration says in which dtype the family computes."""
    model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "dtype": FAMILIES[name].dtype}, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def save_processor(processor: Any, folder: Path) -> None:
    """As `save_pretrained`; a processor built without its video part names it, as checkpoints do.

    Where torchvision is installed, transformers then builds the video part; elsewhere `load_processor` leaves it out.
    """
    processor.save_pretrained(folder)
    kind = type(processor).__name__
    # A class of its own name that lacks the video part stands for transformers'.
    if "video_processor" in getattr(transformers, kind, type(processor)).get_attributes():
        path = folder / "processor_config.json"
        settings = json.loads(path.read_text())
        settings["video_processor"] = {"video_processor_type": kind.replace("Processor", "VideoProcessor")}
        path.write_text(json.dumps(settings, indent=2) + "\n")
