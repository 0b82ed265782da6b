"""From pictures and texts to a padded batch: chat template, image loading, modality and role of every position.

The roles are found on the *unexpanded* prompt, where each image is one token, and carried over to the processor's ids
by matching the text between images. So it does not matter how many tokens a processor makes of an image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from hooked_mm.batch import Batch, Modality, Role, count_positions, image_owner
from hooked_mm.errors import BadInputError
from hooked_mm.structure import Structure

ImageSource = Image.Image | str | os.PathLike
SampleImages = ImageSource | Sequence[ImageSource] | None

# Private-use characters no tokenizer or template treats specially; they stand for the question while the template is
# rendered, so that its own text can't be mistaken for the question.
_MARK = "\ue000"


def load_image(source: ImageSource) -> Image.Image:
    """An RGB picture from a path or a PIL image, wholly decoded.

    Raises:
        BadInputError: If the file is missing, not an image, or truncated.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    if not isinstance(source, str | os.PathLike):
        raise BadInputError(f"an image must be a PIL image or a path, not {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise BadInputError(f"image {str(path)!r} does not exist; check the path")
    try:
        with Image.open(path) as picture:
            return _upright_rgb(picture)
    except UnidentifiedImageError as error:
        raise BadInputError(f"{str(path)!r} is not an image that Pillow can read") from error
    except (OSError, SyntaxError) as error:
        raise BadInputError(f"image {str(path)!r} is broken ({error}); replace the file") from error


def _upright_rgb(picture: Image.Image) -> Image.Image:
    """As a person sees it: turned as its EXIF data says, 16-bit grey scaled to 8 bits instead of cut off."""
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.uint32) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise BadInputError(
            f"the picture has mode {picture.mode!r}, whose range of brightness is not known; convert it to 8 or 16 bits"
        )
    return ImageOps.exif_transpose(picture).convert("RGB")


def load_images(source: SampleImages) -> list[Image.Image]:
    """All pictures of one sample; `None` means it has none."""
    if source is None:
        return []
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [load_image(item) for item in source]
    return [load_image(source)]


def _message(text: str, images: int, image_token: str) -> list[dict[str, Any]]:
    """One user turn. Image tokens in the text say where the images go; without any, images go first."""
    count = text.count(image_token)
    if count not in (0, images):
        raise BadInputError(
            f"the text has {count} image tokens {image_token!r} for {images} images: {text!r}. Write one per image, "
            "or none to have the images placed before the text"
        )
    if not text.replace(image_token, "").strip():
        raise BadInputError(f"the prompt is empty ({text!r}); write a question or an instruction")
    # Without tokens all images stand first; with tokens each stands between the pieces that its token parts.
    pieces = text.split(image_token) if count else [text]
    content: list[dict[str, Any]] = [{"type": "image"}] * (0 if count else images)
    for index, piece in enumerate(pieces):
        if index:
            content.append({"type": "image"})
        if piece.strip():
            content.append({"type": "text", "text": piece.strip()})
    return [{"role": "user", "content": content}]


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    content = [
        {**part, "text": f"{_MARK}{part['text']}{_MARK}"} if part["type"] == "text" else part
        for part in messages[0]["content"]
    ]
    return [{**messages[0], "content": content}]


def render_prompt(processor: Any, text: str, images: int, *, template: bool) -> list[tuple[str, Role]]:
    """The prompt as pieces of text with their roles, image tokens unexpanded.

    Args:
        processor: The model's processor.
        text: The user's words, or with `template=False` the whole prompt as the model shall see it.
        images: How many images the sample has.
        template: Whether to wrap the text in the processor's chat template.

    Raises:
        BadInputError: If the text is empty or its image tokens do not match the images.
    """
    token = processor.image_token
    if _MARK in text:
        raise BadInputError(f"the text contains the private-use character U+E000: {text!r}; remove it")
    if not template:
        count = text.count(token)
        if count != images:
            raise BadInputError(
                f"the text has {count} image tokens {token!r} for {images} images: {text!r}. With template=False the "
                "text is taken as it stands: write one image token per image"
            )
        if not text.replace(token, "").strip():
            raise BadInputError(f"the prompt is empty ({text!r}); write a question or an instruction")
        return [(text, Role.QUESTION)]
    messages = _message(text, images, token)
    if not getattr(processor, "chat_template", None):
        raise BadInputError(
            "this processor has no chat template; give the whole prompt yourself with template=False, image tokens "
            "included"
        )
    rendered = processor.apply_chat_template(_marked(messages), add_generation_prompt=True, tokenize=False)
    pieces = rendered.split(_MARK)
    if rendered.replace(_MARK, "").count(token) != images:
        raise BadInputError(
            f"the chat template wrote {rendered.count(token)} image tokens for {images} images; it may not support "
            "images. Give the whole prompt yourself with template=False"
        )
    return [(piece, Role.QUESTION if index % 2 else Role.TEMPLATE) for index, piece in enumerate(pieces) if piece]


def _check_answer(answer: str | None, image_token: str) -> None:
    if answer is not None and not answer.strip():
        raise BadInputError(f"the answer is empty ({answer!r}); pass None for a sample without an answer")
    if answer is not None and image_token in answer:
        raise BadInputError(f"the answer contains the image token {image_token!r}: {answer!r}; remove it")


def join_answer(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt: with a space before it unless the prompt ends in white space."""
    return answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else f" {answer}"


def token_roles(tokenizer: Any, pieces: list[tuple[str, Role]], **options: Any) -> tuple[list[int], list[Role]]:
    """Token ids of the joined pieces and the role of each token.

    A token belongs to the piece in which it ends (leading-space tokens begin in the piece before). Special tokens that
    the tokenizer adds are template.
    """
    text = "".join(piece for piece, _ in pieces)
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    ends, total = [], 0
    for piece, role in pieces:
        total += len(piece)
        ends.append((total, role))
    roles = []
    for start, end in encoded["offset_mapping"]:
        if start == end:
            roles.append(Role.TEMPLATE)
        else:
            roles.append(next(role for limit, role in ends if end <= limit))
    return list(encoded["input_ids"]), roles


def expand_roles(plain: list[int], roles: list[Role], full: list[int], image_id: int) -> list[Role]:
    """Carry roles from ids with one token per image to the processor's ids, where each image takes many.

    The runs of text between images stand unchanged in `full`; what lies between two runs is image (role NONE).

    Raises:
        BadInputError: If a run of text can't be found, because the processor rewrote the text.
    """
    cuts = [index for index, token in enumerate(plain) if token == image_id]
    bounds = zip([0, *[cut + 1 for cut in cuts]], [*cuts, len(plain)], strict=True)
    found: list[Role] = []
    runs = [(plain[a:b], roles[a:b]) for a, b in bounds]
    # Between two adjacent images there is no text to look for.
    runs = [run for number, run in enumerate(runs) if run[0] or number in (0, len(runs) - 1)]
    for number, (ids, run_roles) in enumerate(runs):
        if number == 0:
            start = 0
        elif number == len(runs) - 1:
            start = len(full) - len(ids)
        else:
            # At least one position is taken by the image before this run, and no image id is text.
            start = len(found) + 1
            while start < len(full) and (full[start] == image_id or full[start : start + len(ids)] != ids):
                start += 1
        if start < len(found) or full[start : start + len(ids)] != ids:
            raise BadInputError(
                "the processor's token ids do not contain the prompt's own text, so roles can't be told; tokens of the "
                f"text: {ids}"
            )
        found += [Role.NONE] * (start - len(found)) + run_roles
    return found


def prepare(
    processor: Any,
    structure: Structure,
    images: Sequence[SampleImages],
    text: Sequence[str],
    answers: Sequence[str | None],
    *,
    template: bool,
    padding_side: str,
    dtype: torch.dtype,
) -> Batch:
    """Build the padded batch; see `HookedMM.prepare` for the arguments (here already one per sample)."""
    pictures: list[list[Image.Image]] = []
    prompts: list[str] = []
    plains: list[tuple[list[int], list[Role]]] = []
    tokenizer = processor.tokenizer
    specials: set[bool] = set()
    for index, (source, words, answer) in enumerate(zip(images, text, answers, strict=True)):
        try:
            loaded = load_images(source)
            pieces = render_prompt(processor, words, len(loaded), template=template)
            _check_answer(answer, processor.image_token)
        except BadInputError as error:
            raise type(error)(error.reason, index) from error
        prompt = "".join(piece for piece, _ in pieces)
        # A template that writes the first special token itself must not get it from the tokenizer again.
        add_special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        specials.add(add_special)
        if answer is not None:
            pieces.append((join_answer(prompt, answer), Role.ANSWER))
        pictures.append(loaded)
        prompts.append("".join(piece for piece, _ in pieces))
        plains.append(token_roles(tokenizer, pieces, add_special_tokens=add_special))
    if len(specials) > 1:
        raise BadInputError(
            f"some prompts begin with {tokenizer.bos_token!r} and some do not; write all of them one way"
        )
    nested = [sample for sample in pictures if sample]
    encoded = processor(
        text=prompts,
        images=nested or None,
        return_tensors="pt",
        padding=True,
        padding_side=padding_side,
        add_special_tokens=specials.pop(),
    )
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in encoded.items()
        if isinstance(value, torch.Tensor)
    }
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if structure.plain_positions:
        inputs["position_ids"] = count_positions(inputs["attention_mask"])
    image_id = -1 if structure.image_token_id is None else structure.image_token_id
    role = torch.zeros_like(ids, dtype=torch.int8)
    for row, (plain, roles) in enumerate(plains):
        full = ids[row][mask[row]].tolist()
        expanded = expand_roles(plain, roles, full, image_id)
        role[row, mask[row]] = torch.tensor([int(item) for item in expanded], dtype=torch.int8)
    modality = torch.where(mask, int(Modality.TEXT), int(Modality.PAD)).to(torch.int8)
    modality = modality.masked_fill(mask & (role == Role.NONE), int(Modality.IMAGE))
    count = sum(map(len, nested))
    return Batch(
        inputs=inputs,
        modality=modality,
        role=role,
        image_sample=image_owner(modality == Modality.IMAGE, count),
        tokens=[tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()],
    )
