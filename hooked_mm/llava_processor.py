"""The processor of a LLaVA in its original layout: tokenizer with `<image>`, pictures as the original code makes them,
prompts as the model was trained on.

Sources: haotian-liu/LLaVA and microsoft/LLaVA-Med, llava/mm_utils.py (`expand2square`, `process_images`,
`tokenizer_image_token`), llava/conversation.py (`vicuna_v1`, `mistral_instruct`), llava/serve/cli.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoTokenizer, LlavaProcessor, PretrainedConfig

from hooked_mm.errors import BadInputError
from hooked_mm.llava_keys import PADDED, SELECTED
from hooked_mm.processors import image_processor_class

IMAGE = "<image>"
PAD = "<pad>"
_START, _END = "<im_start>", "<im_end>"

_PREPROCESSOR = (
    "crop_size do_center_crop do_convert_rgb do_normalize do_rescale do_resize image_mean image_std resample "
    "rescale_factor size"
).split()

_CONTENT = (
    "{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}"
    "{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}{{ '%s\n' }}"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endif %%}"
)

_TURNS = {
    # (before everything, before the user, behind the user, before an answer, behind it, what asks for one)
    "llama": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. ",
        "USER: ",
        " ",
        "ASSISTANT: ",
        "</s>",
        "ASSISTANT:",
    ),
    "mistral": ("", "[INST] ", " [/INST]", " ", " </s>", ""),
}
"""By decoder: `vicuna_v1`, which LLaVA-1.5 was trained on, and `mistral_instruct`, LLaVA-Med v1.5's."""


def chat_template(decoder: str, *, marked: bool = False) -> str:
    """The prompt of the original as a chat template; the tokenizer writes the beginning of the text.

    Args:
        decoder: "llama" or "mistral".
        marked: Whether images stand between `<im_start>` and `<im_end>` (`mm_use_im_start_end`).
    """
    first, user, after_user, answer, after_answer, asks = (f'{{{{ "{piece}" }}}}' for piece in _TURNS[decoder])
    content = _CONTENT % (f"{_START}{IMAGE}{_END}" if marked else IMAGE)
    return (
        f"{first}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{user}{content}{after_user}"
        f"{{% else %}}{answer}{content}{after_answer}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    )


def make_processor(
    folder: Path, written: Mapping[str, Any], text: PretrainedConfig, tower: Any, pictures: Mapping[str, Any] | None
) -> LlavaProcessor:
    """The processor of a checkpoint in the original layout.

    Args:
        folder: Where its tokenizer is.
        written: Its config.json.
        text: The decoder's configuration.
        tower: The tower's configuration.
        pictures: The tower's preprocessor_config.json; CLIP's published values for the tower's image size if None.

    Raises:
        BadInputError: If the tokenizer can't be loaded, or lacks the marks that the prompts need.
    """
    tokenizer = _tokenizer(folder, text)
    marked = bool(written.get("mm_use_im_start_end", False))
    if marked:
        ids = tokenizer.convert_tokens_to_ids([_START, _END])
        if any(token is None or token == tokenizer.unk_token_id or token >= written["vocab_size"] for token in ids):
            raise BadInputError(
                f"config.json asks for {_START} and {_END} around pictures (mm_use_im_start_end), but the tokenizer in "
                f"{folder} has no rows for them among the {written['vocab_size']} of the checkpoint"
            )
    side = tower.image_size
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings |= {key: value for key, value in (pictures or {}).items() if key in _PREPROCESSOR}
    return LlavaProcessor(
        image_processor=image_processor_class("Llava")(**settings, do_pad=PADDED[written.get("image_aspect_ratio")]),
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=SELECTED[written.get("mm_vision_select_feature") or "patch"],
        chat_template=chat_template(text.model_type, marked=marked),
        num_additional_image_tokens=1,
    )


def _tokenizer(folder: Path, text: PretrainedConfig) -> Any:
    """With `<image>`, and a padding token where it had none."""
    said = folder / "tokenizer_config.json"
    options = json.loads(said.read_text()) if said.is_file() else {}
    # What the class does by default was changed in transformers 5.
    begins = (
        {"add_bos_token": options.get("add_bos_token", True)} if "Llama" in options.get("tokenizer_class", "") else {}
    )
    try:
        # The configuration is given, since transformers knows none of the type that config.json names.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), config=text, local_files_only=True, **begins)
    except (ImportError, ValueError, OSError, TypeError) as error:
        spoken = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        remedy = "pip install sentencepiece protobuf" if spoken else "put the tokenizer's files there"
        reason = " ".join(str(error).split())
        raise BadInputError(f"the tokenizer in {folder} can't be loaded ({reason}). Remedy: {remedy}") from error
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    space = getattr(backend, "pre_tokenizer", None)
    if isinstance(space, pre_tokenizers.Metaspace) and space.prepend_scheme == "first":
        # The original tokenizes what stands before and behind an image as texts of their own, each with its space.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=space.replacement, prepend_scheme="always", split=space.split
        )
    return tokenizer
