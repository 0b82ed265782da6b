"""Real transformers processors of every family, built offline: PIL image processors with small sizes, a small BPE
tokenizer with the family's special tokens, and a chat template of the family's style.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hooked_mm.processors import image_processor_class, load_processor

CORPUS = [
    "what is the colour of the triangle in the snow, and where is it?\n\n",
    "User: describe the picture. Assistant: a red circle in the city.\n",
    "Here is the original image and here are some crops to help you see better",
]


def _tokenizer(
    specials: list[str], pad: str, bos: str | None, eos: str, extra: dict[str, str] | None = None, **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `extra` are named special tokens (`image_token`, ...); a bos is written before every text."""
    names = list(dict.fromkeys([pad, *([bos] if bos else []), eos, *specials]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + 340,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    named = {"extra_special_tokens": extra} if extra else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[name for name in specials if name not in (extra or {}).values()],
        **named,
        **options,
    )


def _template(start: str, user: str, image: str, end: str, reply: str) -> str:
    """A chat template: bos, the user's turn with images in place, and what begins the reply."""
    return (
        f"{start}{{% for message in messages %}}{user}"
        f"{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        f"{end}{{% endfor %}}{{% if add_generation_prompt %}}{reply}{{% endif %}}"
    )


_LLAVA = _template("<s>", "USER: ", "<image>\n", "", " ASSISTANT:")
_QWEN = _template(
    "", "<|im_start|>user\n", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n", "<|im_start|>assistant\n"
)
_CHATML = _template("", "<|im_start|>user\n", "<image>\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_IDEFICS2 = _template("<s>", "User:", "<image>", "<end_of_utterance>\n", "Assistant:")
_IDEFICS3 = _template("<|im_start|>", "User:", "<image>", "<end_of_utterance>\n", "Assistant:")
_GEMMA = _template("<bos>", "<start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n")
_INTERN = _template("", "<|im_start|>user\n", "<IMG_CONTEXT>\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_LLAMA = _template(
    "<|begin_of_text|>",
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|image|>",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
_ROWS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _llava() -> Any:
    return transformers.LlavaProcessor(
        image_processor=image_processor_class("CLIP")(size={"shortest_edge": 24}, crop_size=_square(24), **_HALF),
        tokenizer=_tokenizer(["<image>"], "<pad>", "<s>", "</s>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA,
    )


PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]


def _llava_next() -> Any:
    return transformers.LlavaNextProcessor(
        image_processor=image_processor_class("LlavaNext")(
            size={"shortest_edge": 16}, crop_size=_square(16), image_grid_pinpoints=PINPOINTS, **_HALF
        ),
        tokenizer=_tokenizer(["<image>"], "<pad>", "<s>", "</s>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA,
    )


def _onevision() -> dict[str, Any]:
    return {
        "image_processor": image_processor_class("LlavaOnevision")(
            size=_square(16), image_grid_pinpoints=PINPOINTS, **_HALF
        ),
        "tokenizer": _tokenizer(["<image>", "<video>", "<|im_start|>"], "<pad>", None, "<|im_end|>"),
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
        "chat_template": _CHATML,
    }


def idefics2(split: bool = False) -> Any:
    """Idefics2's processor, with or without image splitting."""
    return transformers.Idefics2Processor(
        image_processor=image_processor_class("Idefics2")(
            do_image_splitting=split, size={"longest_edge": 48, "shortest_edge": 24}, **_HALF
        ),
        tokenizer=_tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>"], "<pad>", "<s>", "</s>"),
        image_seq_len=3,
        chat_template=_IDEFICS2,
    )


def _idefics3_parts(kind: str) -> dict[str, Any]:
    return {
        "image_processor": image_processor_class(kind)(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, **_HALF
        ),
        "tokenizer": _tokenizer(
            ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_ROWS],
            "<pad>",
            None,
            "<|im_start|>",
        ),
        "image_seq_len": 4,
        "chat_template": _IDEFICS3,
    }


def _qwen(patch: int = 4, temporal: int = 2) -> dict[str, Any]:
    return {
        "image_processor": image_processor_class("Qwen2VL")(
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
            patch_size=patch,
            temporal_patch_size=temporal,
            merge_size=2,
            **_HALF,
        ),
        "tokenizer": _tokenizer(
            ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
            "<|endoftext|>",
            None,
            "<|im_end|>",
        ),
        "chat_template": _QWEN,
    }


def _gemma3() -> Any:
    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(["<start_of_turn>", "<end_of_turn>", *marks.values()], "<pad>", "<bos>", "<eos>", marks)
    return transformers.Gemma3Processor(
        image_processor=image_processor_class("Gemma3")(size=_square(16), **_HALF),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=_GEMMA,
    )


def _internvl() -> dict[str, Any]:
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return {
        "image_processor": image_processor_class("GotOcr2")(
            size=_square(16), crop_to_patches=True, min_patches=1, max_patches=6, **_HALF
        ),
        "tokenizer": _tokenizer(["<|im_start|>", *marks.values()], "<|endoftext|>", None, "<|im_end|>", marks),
        "image_seq_length": 4,
        "chat_template": _INTERN,
    }


def _mllama() -> Any:
    return transformers.MllamaProcessor(
        image_processor=image_processor_class("Mllama")(size=_square(16), max_image_tiles=4, **_HALF),
        tokenizer=_tokenizer(
            ["<|image|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"],
            "<|finetune_right_pad_id|>",
            "<|begin_of_text|>",
            "<|eot_id|>",
        ),
        chat_template=_LLAMA,
    )


def _blip2() -> Any:
    return transformers.Blip2Processor(
        image_processor=image_processor_class("Blip")(size=_square(16), **_HALF),
        tokenizer=_tokenizer(["<image>"], "<pad>", "</s>", "</s>"),
        num_query_tokens=5,
    )


def _florence2() -> Any:
    image_processor = image_processor_class("CLIP")(
        size=_square(32), crop_size=_square(32), do_center_crop=False, **_HALF
    )
    image_processor.image_seq_length = 5
    return transformers.Florence2Processor(
        image_processor=image_processor,
        tokenizer=_tokenizer(["<image>"], "<pad>", "<s>", "</s>", {"image_token": "<image>"}),
    )


WHOLE = {
    "llava": _llava,
    "llava_next": _llava_next,
    "idefics2": idefics2,
    "idefics3": lambda: transformers.Idefics3Processor(**_idefics3_parts("Idefics3")),
    "gemma3": _gemma3,
    "mllama": _mllama,
    "blip-2": _blip2,
    "florence2": _florence2,
}
"""Families whose processor transformers makes without torchvision."""

_WITH_VIDEO = {
    "llava_onevision": ("LlavaOnevisionProcessor", _onevision),
    "qwen2_vl": ("Qwen2VLProcessor", _qwen),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", _qwen),
    "qwen3_vl": ("Qwen3VLProcessor", _qwen),
    "internvl": ("InternVLProcessor", _internvl),
    "smolvlm": ("SmolVLMProcessor", lambda: _idefics3_parts("SmolVLM")),
}


def _importable(name: str) -> bool:
    """Not so SmolVLM's processor in transformers 5.0 without torchvision: its file imports that of videos."""
    try:
        return hasattr(transformers, name)
    except ModuleNotFoundError:
        return False


WITH_VIDEO = {family: row for family, row in _WITH_VIDEO.items() if _importable(row[0])}
"""Families whose processor has a video part: class name and its parts."""

FAMILIES = (*WHOLE, *WITH_VIDEO)


def write_parts(family: str, folder: Path) -> None:
    """A folder as `save_pretrained` writes it for a processor with a video part."""
    name, make = WITH_VIDEO[family]
    parts = make()
    tokenizer, image_processor = parts.pop("tokenizer"), parts.pop("image_processor")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(parts.pop("chat_template"))
    images = image_processor.to_dict()
    # Checkpoints name the class without its backend.
    images["image_processor_type"] = type(image_processor).__name__.removesuffix("Pil")
    settings = {**parts, "processor_class": name, "image_processor": images}
    settings["video_processor"] = {"video_processor_type": name.replace("Processor", "VideoProcessor")}
    (folder / "processor_config.json").write_text(json.dumps(settings))


@functools.cache
def processor(family: str) -> Any:
    """The processor of a family (shared: leave it as it is)."""
    if family in WHOLE:
        return WHOLE[family]()
    with tempfile.TemporaryDirectory() as folder:
        write_parts(family, Path(folder))
        return load_processor(folder)
