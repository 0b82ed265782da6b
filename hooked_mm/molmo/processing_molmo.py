"""Molmo's processor: prompts with pictures to the tensors that the model takes.

A picture's token in a prompt becomes two blocks of tokens, the whole picture's and the stitched crops', row by row:

    <im_start> (<im_patch> ... <im_col>) ... <im_end> <im_start> (<im_patch> ... <im_col>) ... <im_end>

Prompts begin with the end-of-text token, then come pictures, then ` User: ... Assistant:`. Facts: the published
preprocessing_molmo.py and, for several turns, olmo/data/data_formatter.py of the training repository.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from hooked_mm.errors import BadInputError
from hooked_mm.molmo.image_processing_molmo import Crops, MolmoImageProcessor

START, END, PATCH, COLUMN, PICTURE = "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"
# Pictures that come first stand before the user's name, as the published processor puts them.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
    "else message['content'] -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- set said = namespace(text=false) -%}"
    "{%- for part in parts -%}"
    "{%- if part['type'] == 'image' -%}{{ '" + PICTURE + "' }}"
    "{%- else -%}{{ ' ' if said.text else ' User: ' }}{{ part['text'] }}{%- set said.text = true -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if not said.text -%}{{ ' User:' }}{%- endif -%}"
    "{%- else -%}"
    "{{ ' Assistant:' }}"
    "{%- for part in parts -%}{{ ' ' + part['text'] }}{%- endfor -%}{{ eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif -%}"
)
_NOWHERE = -100


class MolmoProcessor(ProcessorMixin):
    """Pictures and prompts to tensors.

    Args:
        image_processor: Cuts pictures into crops.
        tokenizer: Qwen2's, with Molmo's five tokens.
        chat_template: For a template other than Molmo's own.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_processor = MolmoImageProcessor() if image_processor is None else image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template or TEMPLATE
        self.image_token = PICTURE

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> MolmoProcessor:
        """From a folder or the hub, in the published layout; remote code named there is not run."""
        options.pop("trust_remote_code", None)
        images = MolmoImageProcessor.from_pretrained(pretrained_model_name_or_path, **options)
        return cls(images, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **options))

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **options: Any
    ) -> list[str]:
        """Write the tokenizer's files and `preprocessor_config.json`, as the published model has them."""
        if push_to_hub:
            raise BadInputError(
                "a Molmo processor is written into folders only; upload the folder with huggingface_hub"
            )
        written = list(self.tokenizer.save_pretrained(save_directory))
        named = Path(save_directory) / "processor_config.json"
        named.write_text(json.dumps({"processor_class": type(self).__name__}, indent=2) + "\n")
        return [*written, str(named), *self.image_processor.save_pretrained(save_directory)]

    @property
    def model_input_names(self) -> list[str]:
        """The tensors that a call makes."""
        return ["input_ids", "attention_mask", *MolmoImageProcessor.model_input_names]

    @property
    def begin_token(self) -> str:
        """What every prompt begins with: Qwen2 has no token of its own for that."""
        return str(self.tokenizer.bos_token or self.tokenizer.eos_token)

    def replacement(self, crops: Crops) -> str:
        """The tokens of one picture, as text."""
        side = int(self.image_processor.side) // 2
        blocks = ((side, side), (crops.rows, crops.cols))
        return "".join(f"{START}{f'{PATCH * cols}{COLUMN}' * rows}{END}" for rows, cols in blocks)

    def get_text_with_replacements(
        self, text: Sequence[str], replacements: Sequence[Sequence[str]]
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Prompts with each picture's token replaced; and what was put in, per prompt.

        Raises:
            BadInputError: If a prompt has another number of picture tokens than pictures.
        """
        made, said = [], []
        for number, (prompt, own) in enumerate(zip(text, replacements, strict=True)):
            if prompt.count(PICTURE) != len(own):
                raise BadInputError(
                    f"has {prompt.count(PICTURE)} picture tokens {PICTURE!r} for {len(own)} pictures; write one each",
                    number,
                )
            pieces = prompt.split(PICTURE)
            made.append("".join(piece + new for piece, new in zip(pieces, [*own, ""], strict=True)))
            said.append([{"replacement": each} for each in own])
        return made, said

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = "pt",
        **options: Any,
    ) -> BatchFeature:
        """The model's tensors.

        Args:
            images: A picture; a list of them, if there is one prompt or one picture each; or a list per prompt.
            text: Prompts, with `<|image|>` where pictures go. Without any of these they go first.
            return_tensors: `"pt"` only.
            options: Of the tokenizer (`padding`, `padding_side`, ...), which adds no special tokens: every prompt gets
                the end-of-text token in front, if it does not begin so already.

        Raises:
            BadInputError: If pictures and prompts do not fit each other.
        """
        if text is None or return_tensors != "pt":
            raise BadInputError(
                "Molmo's processor makes torch tensors of prompts; give text=... and return_tensors='pt'"
            )
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = _per_prompt(images, len(prompts))
        prompts = [
            PICTURE * len(own) + prompt if own and PICTURE not in prompt else prompt
            for prompt, own in zip(prompts, pictures, strict=True)
        ]
        begin = self.begin_token
        prompts = [prompt if prompt.startswith(begin) else begin + prompt for prompt in prompts]
        cuts = [self._cut(number, own) for number, own in enumerate(pictures)]
        prompts, _ = self.get_text_with_replacements(prompts, [list(map(self.replacement, own)) for own in cuts])
        encoded = self.tokenizer(prompts, return_tensors="pt", **{**options, "add_special_tokens": False})
        made = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        return BatchFeature(made | self._joined(made["input_ids"], cuts) if any(cuts) else made)

    def _cut(self, number: int, pictures: Sequence[Image.Image]) -> list[Crops]:
        """The crops of one prompt's pictures."""
        try:
            return [self.image_processor.cut(picture) for picture in pictures]
        except BadInputError as error:
            raise BadInputError(f"the processor refused it ({error.reason})", number) from error

    def _joined(self, ids: Int[Tensor, "b p"], cuts: list[list[Crops]]) -> dict[str, Tensor]:
        """Every sample's crops, filled up to the most that one has with crops of -1 that belong nowhere."""
        patch = self.tokenizer.convert_tokens_to_ids(PATCH)
        samples = []
        for row, own in zip(ids, cuts, strict=True):
            places, begin, where = (row == patch).nonzero()[:, 0], 0, []
            for crops in own:
                where.append(torch.where(crops.order >= 0, places[begin + crops.order.clamp_min(0)], _NOWHERE))
                begin += int((crops.order >= 0).sum())
            samples.append(where)
        first = next(crops for own in cuts for crops in own)
        most = max(sum(len(crops.pixels) for crops in own) for own in cuts)
        images = torch.full((len(cuts), most, *first.pixels.shape[1:]), -1.0)
        masks = torch.full(images.shape[:3], -1.0)
        index = torch.full((len(cuts), most, first.order.shape[1]), _NOWHERE)
        for row, (own, where) in enumerate(zip(cuts, samples, strict=True)):
            if own:
                count = sum(len(crops.pixels) for crops in own)
                images[row, :count] = torch.cat([crops.pixels for crops in own])
                masks[row, :count] = torch.cat([crops.masks for crops in own])
                index[row, :count] = torch.cat(where)
        return {"images": images, "image_masks": masks, "image_input_idx": index}

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """The tokenizer's."""
        found: list[str] = self.tokenizer.batch_decode(*args, **options)
        return found

    def decode(self, *args: Any, **options: Any) -> str:
        """The tokenizer's."""
        return str(self.tokenizer.decode(*args, **options))


def _per_prompt(images: Any, count: int) -> list[list[Image.Image]]:
    """The pictures of each prompt."""
    if images is None:
        return [[] for _ in range(count)]
    if isinstance(images, Image.Image):
        images = [images]
    if any(isinstance(one, Sequence) for one in images):
        found = [[one] if isinstance(one, Image.Image) else list(one) for one in images]
    else:
        found = [list(images)] if count == 1 else [[one] for one in images]
    if len(found) != count:
        raise BadInputError(f"there are pictures for {len(found)} prompts, and {count} prompts; give a list per prompt")
    return found
