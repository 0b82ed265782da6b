"""From pictures and texts to a padded batch: image loading, and the modality and role of every position."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hooked_mm.batch import (
    Batch,
    Role,
    count_positions,
    decoder_batch,
    image_positions,
    modalities,
)
from hooked_mm.errors import BadInputError
from hooked_mm.habits import Prompt, image_token
from hooked_mm.layout_kinds import read_layout
from hooked_mm.layout_source import Arrange, Source
from hooked_mm.processors import arrangement
from hooked_mm.prompts import Turn, check_answer, join_answer, process_prompts, render_prompt
from hooked_mm.structure import Structure

ImageSource = Image.Image | str | os.PathLike | bytes
"""A picture, the path of its file, or the file's bytes."""
SampleImages = ImageSource | Sequence[ImageSource] | None


def load_image(source: ImageSource) -> Image.Image:
    """An RGB picture from a path or a PIL image, wholly decoded: as viewers show it, the first frame if it moves.

    Raises:
        BadInputError: If the file is missing, not an image, truncated, or larger than Pillow thinks safe.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    if not isinstance(source, str | os.PathLike | bytes):
        raise BadInputError(f"an image must be a PIL image, a path or a file's bytes, not {type(source).__name__}")
    if isinstance(source, bytes):
        name = f"of {len(source)} bytes"
    elif Path(source).is_file():
        name = repr(str(source))
    else:
        raise BadInputError(f"image {str(source)!r} does not exist; check the path")
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return _upright_rgb(picture)
    except UnidentifiedImageError as error:
        raise BadInputError(f"image {name} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise BadInputError(
            f"image {name} is suspiciously large ({error}); scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    # Pillow's readers end in errors of any kind where a file breaks their expectations.
    except Exception as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"image {name} is broken ({error}); replace the file") from error


def _upright_rgb(picture: Image.Image) -> Image.Image:
    """As a person sees it: turned as its EXIF data says, on white where transparent, 16-bit grey scaled to 8 bits."""
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.uint32) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise BadInputError(
            f"the picture has mode {picture.mode!r}, whose range of brightness is not known; convert it to 8 or 16 bits"
        )
    turned = ImageOps.exif_transpose(picture)
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")
    return turned.convert("RGB")


def load_images(source: SampleImages) -> list[Image.Image]:
    """All pictures of one sample; `None` means it has none."""
    return [load_image(item) for item in sources(source)]


def sources(images: SampleImages) -> list[ImageSource]:
    """The pictures of a sample as a list, not loaded."""
    if images is None:
        return []
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return list(images)
    return [images]


def one_per_sample(
    images: Sequence[SampleImages] | ImageSource | None,
    text: Sequence[str] | str,
    answers: Sequence[str | None] | None,
    answer_prefix: str | Sequence[str | None] | None,
) -> tuple[list[SampleImages], list[str], list[str | None]]:
    """Pictures, texts and what is put behind them (prefix, then answer), one of each per sample.

    Raises:
        BadInputError: If there is not the same number of each.
    """
    pictures = [images] if isinstance(images, Image.Image | str | os.PathLike | bytes) else images
    if isinstance(text, str):
        text = [text] * (1 if pictures is None else len(pictures))
    if pictures is None:
        pictures = [None] * len(text)
    prefixes = [answer_prefix] * len(text) if answer_prefix is None or isinstance(answer_prefix, str) else answer_prefix
    answers = [None] * len(text) if answers is None else answers
    counts = {"images": len(pictures), "text": len(text), "answers": len(answers), "answer_prefix": len(prefixes)}
    if not len(text) or len(set(counts.values())) > 1:
        raise BadInputError(f"a batch needs the same number of each, at least one; got {counts}")
    said = [
        " ".join(part.strip() for part in (prefix, answer) if part is not None) if prefix is not None else answer
        for prefix, answer in zip(prefixes, answers, strict=True)
    ]
    return list(pictures), list(text), said


def prepare(
    processor: Any,
    structure: Structure,
    config: Any,
    images: Sequence[SampleImages],
    text: Sequence[str],
    answers: Sequence[str | None],
    *,
    template: bool,
    padding_side: str,
    dtype: torch.dtype,
    history: Sequence[Sequence[Turn]] | None = None,
) -> Batch:
    """Build the padded batch; see `HookedMM.prepare` for the arguments (here already one per sample).

    In an encoder-decoder model the answers go to the decoder.
    """
    separate = bool(getattr(config, "is_encoder_decoder", False))
    pictures: list[list[Image.Image]] = []
    prompts: list[Prompt] = []
    earlier = [()] * len(text) if history is None else history
    if len(earlier) != len(text) or any(isinstance(turns, Turn) for turns in earlier):
        raise BadInputError(
            f"history has {len(earlier)} entries for {len(text)} samples; give a list of turns for each, for one "
            "sample a list of one list"
        )
    for index, (source, words, answer, turns) in enumerate(zip(images, text, answers, earlier, strict=True)):
        try:
            if sources(source):
                structure.refuse_pictures()
            loaded = load_images(source)
            prompt = render_prompt(processor, words, len(loaded), template=template, history=turns)
            check_answer(answer, image_token(processor))
        except BadInputError as error:
            raise type(error)(error.reason, index) from error
        if answer is not None and not separate:
            prompt = prompt + Prompt.of(join_answer(prompt.text, answer), Role.ANSWER)
        pictures.append(loaded)
        prompts.append(prompt)
    flat = [picture for sample in pictures for picture in sample]
    processed = process_prompts(processor, structure.image_token_id, prompts, pictures, padding_side)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in processed.inputs.items()}
    if structure.plain_positions and not separate:
        inputs["position_ids"] = count_positions(inputs["attention_mask"])
    image = image_positions(inputs, structure, config)
    mask = inputs["attention_mask"].bool()
    role = torch.zeros_like(inputs["input_ids"], dtype=torch.int8)
    for row, roles in enumerate(processed.roles):
        role[row, mask[row]] = torch.tensor([int(item) for item in roles], dtype=torch.int8)
    role = role.masked_fill(image, int(Role.NONE))
    counts = [count for count in processed.counts if count is not None]
    told = counts if len(counts) == len(flat) else None
    layout = read_layout(Source(inputs, image, config, told, _arrange(processor, flat)))
    if len(layout.image_sample) != len(flat):
        raise BadInputError(
            f"the processor made {len(layout.image_sample)} images of the {len(flat)} given; their crops can't be told "
            "apart"
        )
    tokenizer = processor.tokenizer
    names = [tokenizer.convert_ids_to_tokens(row) for row in inputs["input_ids"].tolist()]
    decoder = None
    if separate:
        decoder = _decoder(tokenizer, config, answers)
        inputs |= {f"decoder_{name}": value for name, value in decoder.inputs.items()}
    return Batch(inputs, modalities(image, inputs["attention_mask"]), role, layout, names, decoder)


def _arrange(processor: Any, pictures: list[Image.Image]) -> Arrange | None:
    """How this processor cuts these pictures; None if it never does, or marks its crops in the text."""
    rule = arrangement(processor)
    if rule is None:
        return None
    return lambda number, crops: rule(pictures[number].height, pictures[number].width, crops)


def _decoder(tokenizer: Any, config: Any, answers: Sequence[str | None]) -> Batch:
    """The decoder's start token and the answers, padded on the right: its positions are counted from the left."""
    start = config.get_text_config().decoder_start_token_id
    rows = [[start] + (tokenizer(a, add_special_tokens=False)["input_ids"] if a else []) for a in answers]
    width = max(map(len, rows))
    filled = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask: Int[Tensor, "b q"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    role = torch.full_like(filled, int(Role.ANSWER)).masked_fill(mask == 0, int(Role.NONE))
    role[:, 0] = int(Role.TEMPLATE)
    return decoder_batch(filled, mask, role, [tokenizer.convert_ids_to_tokens(row) for row in filled.tolist()])
