"""What becomes of a prompt: its text with the role of every character, through the processor's own rewriting.

Processors replace each image token by many, with marks around them, and some add words or spaces. All of this is
followed character by character; at the end the text is tokenized again and must give the processor's own ids. So roles
are exact under any tokenizer, also where a token spans a mark and a word, or they are refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from hooked_mm.batch import Role
from hooked_mm.errors import BadInputError
from hooked_mm.habits import Habit, Prompt, habit, image_token

# Private-use characters no tokenizer or template treats specially; they stand for the question while the template is
# rendered, so that its own text can't be mistaken for the question.
_MARK = "\ue000"


@dataclass(frozen=True)
class Turn:
    """An earlier exchange of a conversation.

    Attributes:
        text: What the user said.
        answer: What the model answered.
        images: How many pictures the user showed with it.

    Raises:
        BadInputError: If that is no number of pictures.
    """

    text: str
    answer: str
    images: int = 0

    def __post_init__(self) -> None:
        if type(self.images) is not int or self.images < 0:
            raise BadInputError(f"a turn has images={self.images!r}; give how many pictures were shown with it")


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


def _earlier(history: Sequence[Turn], image_token: str) -> list[dict[str, Any]]:
    """Earlier turns: the user's and the model's by turns."""
    messages: list[dict[str, Any]] = []
    for turn in history:
        check_answer(turn.answer, image_token)
        messages += _message(turn.text, turn.images, image_token)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer.strip()}]})
    return messages


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    content = [
        {**part, "text": f"{_MARK}{part['text']}{_MARK}"} if part["type"] == "text" else part
        for part in messages[-1]["content"]
    ]
    return [*messages[:-1], {**messages[-1], "content": content}]


def render_prompt(processor: Any, text: str, images: int, *, template: bool, history: Sequence[Turn] = ()) -> Prompt:
    """The prompt with its roles, image tokens unexpanded; earlier turns are template.

    Args:
        processor: The model's processor.
        text: The user's words, or with `template=False` the whole prompt as the model shall see it.
        images: How many images the sample has, those of earlier turns included.
        template: Whether to wrap the text in the processor's chat template.
        history: Earlier turns, whose images come first.

    Raises:
        BadInputError: If a text is empty or its image tokens do not match the images, or earlier turns are given where
            the whole prompt is one text.
    """
    token = image_token(processor)
    for said in (text, *(part for turn in history for part in (turn.text, turn.answer))):
        if _MARK in said:
            raise BadInputError(f"the text contains the private-use character U+E000: {said!r}; remove it")
    if history and (habit(processor).inserts or not template):
        reason = f"{type(processor).__name__} takes one text" if template else "with template=False the text is whole"
        raise BadInputError(f"{len(history)} earlier turns were given, but {reason}; write them into it, or ask anew")
    own = images - sum(turn.images for turn in history)
    if own < 0:
        raise BadInputError(
            f"earlier turns have {images - own} images, but the sample has {images}; give all of them, in their order"
        )
    if habit(processor).inserts:
        _check_inserted(processor, text, images)
        return Prompt.of(text, Role.QUESTION)
    if not template:
        count = text.count(token)
        if count != images:
            raise BadInputError(
                f"the text has {count} image tokens {token!r} for {images} images: {text!r}. With template=False the "
                "text is taken as it stands: write one image token per image"
            )
        if not text.replace(token, "").strip():
            raise BadInputError(f"the prompt is empty ({text!r}); write a question or an instruction")
        return Prompt.of(text, Role.QUESTION).sub(re.escape(token), lambda match: token)
    messages = [*_earlier(history, token), *_message(text, own, token)]
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
    parts = [Prompt.of(piece, Role.QUESTION if index % 2 else Role.TEMPLATE) for index, piece in enumerate(pieces)]
    return sum(parts[1:], parts[0])


def _check_inserted(processor: Any, text: str, images: int) -> None:
    """A prompt for a processor that writes the image token itself: one image, no token, no template."""
    token, name = image_token(processor), type(processor).__name__
    if token in text:
        raise BadInputError(f"{name} writes the image token {token!r} itself; remove it from the text: {text!r}")
    if images > 1 or (habit(processor).needs_image and not images):
        wanted = "exactly one image" if habit(processor).needs_image else "at most one image"
        raise BadInputError(f"{name} takes {wanted} per prompt, got {images}")
    if not text.strip():
        raise BadInputError(f"the prompt is empty ({text!r}); write a question or an instruction")


def check_answer(answer: str | None, image_token: str) -> None:
    """Refuse an answer that is empty or holds an image token."""
    if answer is not None and not answer.strip():
        raise BadInputError(f"the answer is empty ({answer!r}); pass None for a sample without an answer")
    if answer is not None and image_token in answer:
        raise BadInputError(f"the answer contains the image token {image_token!r}: {answer!r}; remove it")


def join_answer(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt: with a space before it unless the prompt ends in white space."""
    return answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else f" {answer}"


@dataclass(frozen=True)
class Processed:
    """What the processor made of a batch.

    Attributes:
        inputs: Its tensors.
        roles: Per sample, the role of each token that is not padding.
        counts: Per image, how many image positions it takes; None where the processor does not say.
    """

    inputs: dict[str, Tensor]
    roles: list[list[Role]]
    counts: list[int | None]


def process_prompts(
    processor: Any,
    image_id: int | None,
    prompts: Sequence[Prompt],
    pictures: Sequence[Sequence[Image.Image]],
    padding_side: str,
) -> Processed:
    """Call the processor and follow what it does to the prompts.

    Args:
        processor: The model's processor.
        image_id: The id of the token whose embedding image features replace.
        prompts: One per sample, image tokens unexpanded.
        pictures: Those of each sample.
        padding_side: `"left"` or `"right"`.

    Raises:
        BadInputError: If the processor takes no such mix of prompts, or made another text of them than is known here.
    """
    images, tokenizer, special = sum(map(len, pictures)), processor.tokenizer, habit(processor)
    if special.inserts and images not in (0, len(pictures)):
        lacking = next(index for index, sample in enumerate(pictures) if not sample)
        raise BadInputError(
            f"has no image, but others of the batch have; {type(processor).__name__} writes an image token into every "
            "prompt. Make a batch of its own of the prompts without images",
            lacking,
        )
    rewritten = [special.rewrite(processor, prompt, images) for prompt in prompts]
    # A template that writes the first special token itself must not get it from the tokenizer again.
    begins = {not (tokenizer.bos_token and prompt.text.startswith(tokenizer.bos_token)) for prompt in rewritten}
    if special.begins:
        begins = {False}
    if len(begins) > 1:
        raise BadInputError(
            f"some prompts begin with {tokenizer.bos_token!r} and some do not; write all of them one way"
        )
    add_special = begins.pop()
    said: list[list[str]] = []
    encoded = _listening(processor, said)(
        text=[prompt.text for prompt in prompts],
        images=[list(sample) for sample in pictures] if images else None,
        return_tensors="pt",
        padding=True,
        padding_side=padding_side,
        add_special_tokens=add_special,
    )
    inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    said = said or [[] for _ in prompts]
    name: Any = tokenizer.convert_ids_to_tokens(image_id) if image_id is not None else None
    roles: list[list[Role]] = []
    counts: list[int | None] = []
    for row, (prompt, blocks) in enumerate(zip(rewritten, said, strict=True)):
        if blocks:
            queue = iter(blocks)
            prompt = prompt.sub(re.escape(image_token(processor)), lambda _, queue=queue: next(queue))  # type: ignore[misc]
        full = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        roles.append(_token_roles(tokenizer, prompt, full, image_id, row, add_special))
        counts += [block.count(name) for block in blocks] or [special.count(processor)] * len(pictures[row])
    return Processed(inputs, roles, counts)


def _listening(processor: Any, said: list[list[str]]) -> Any:
    """A copy of the processor that notes, per sample, what it puts in the place of image tokens.

    Not all of them hand this out when asked (`return_text_replacement_offsets`), and older ones do it all in one piece:
    there, marks around the image tokens go with the text up to the tokenizer, and no further.
    """
    heard, special = copy.copy(processor), habit(processor)
    if not hasattr(processor, "get_text_with_replacements"):
        if special.inserts or special.rewrite is not Habit.rewrite:
            return processor
        heard.tokenizer = _Unmarking(processor.tokenizer, said)
        return _Marking(heard)
    inner = processor.get_text_with_replacements

    def listen(*args: Any, **kwargs: Any) -> Any:
        text, replaced = inner(*args, **kwargs)
        said.extend([item["replacement"] for item in sample] for sample in replaced)
        return text, replaced

    heard.get_text_with_replacements = listen
    return heard


class _Marking:
    """A processor that is given a mark before and behind every image token."""

    def __init__(self, processor: Any) -> None:
        self._processor, self._token = processor, image_token(processor)

    def __call__(self, text: list[str], **options: Any) -> Any:
        marked = f"{_MARK}{self._token}{_MARK}"
        return self._processor(text=[sample.replace(self._token, marked) for sample in text], **options)


class _Unmarking:
    """A tokenizer that notes what stands between marks and takes them out."""

    def __init__(self, tokenizer: Any, said: list[list[str]]) -> None:
        self._tokenizer, self._said = tokenizer, said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: list[str], *args: Any, **options: Any) -> Any:
        self._said.extend(sample.split(_MARK)[1::2] for sample in text)
        return self._tokenizer([sample.replace(_MARK, "") for sample in text], *args, **options)


def _token_roles(
    tokenizer: Any, prompt: Prompt, full: list[int], image_id: int | None, row: int, add_special: bool
) -> list[Role]:
    ids, roles = token_roles(tokenizer, prompt, add_special_tokens=add_special)
    # Blip2 puts the image tokens in front of the tokenized text.
    lead = len(full) - len(ids)
    if lead < 0 or full[lead:] != ids or any(token != image_id for token in full[:lead]):
        raise BadInputError(
            "the processor's token ids are not those of the prompt's text as it was followed here, so roles can't be "
            f"told; followed: {prompt.text!r}, the processor's: {tokenizer.decode(full)!r}",
            row,
        )
    return [Role.NONE] * lead + roles


def token_roles(tokenizer: Any, prompt: Prompt, **options: Any) -> tuple[list[int], list[Role]]:
    """Token ids of a text and the role of each token.

    A token has the role of its last character (leading-space tokens begin in the piece before). Special tokens that
    the tokenizer adds are template.
    """
    encoded = tokenizer(prompt.text, return_offsets_mapping=True, **options)
    roles = [Role.TEMPLATE if start == end else prompt.roles[end - 1] for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), roles
