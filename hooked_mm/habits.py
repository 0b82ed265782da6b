"""What processors do with prompts, each in its own way, followed character by character.

Some write image tokens themselves, some add words, marks or spaces; a row of `HABITS` says so. Add a processor that
does more than to replace image tokens and to say so: a row of the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hooked_mm.batch import Role


@dataclass(frozen=True)
class Prompt:
    """A text and the role of each of its characters, equally many."""

    text: str
    roles: tuple[Role, ...]

    @classmethod
    def of(cls, text: str, role: Role) -> Prompt:
        """A text that plays one role."""
        return cls(text, (role,) * len(text))

    def __add__(self, other: Prompt) -> Prompt:
        return Prompt(self.text + other.text, self.roles + other.roles)

    def __getitem__(self, part: slice) -> Prompt:
        return Prompt(self.text[part], self.roles[part])

    def sub(self, pattern: str, new: Callable[[re.Match[str]], str]) -> Prompt:
        """Every match replaced, as `re.sub`; what is put in is template."""
        made, last = Prompt("", ()), 0
        for match in re.finditer(pattern, self.text):
            made = made + self[last : match.start()] + Prompt.of(new(match), Role.TEMPLATE)
            last = match.end()
        return made + self[last:]


@dataclass(frozen=True)
class Habit:
    """What a processor does with prompts beside putting many image tokens in the place of one, and saying so.

    Attributes:
        inserts: It writes the image tokens itself: prompts have none, and no chat template.
        needs_image: It, or its model, takes no prompt without an image.
        begins: It writes the beginning-of-text token itself, so the tokenizer must not.
        token: The image token of prompts.
        count: How many image positions each image takes, where the processor does not say it with the text.
        rewrite: (processor, prompt, images of the whole batch) -> the text as it is tokenized, followed by role.
    """

    inserts: bool = False
    needs_image: bool = False
    begins: bool = False
    token: Callable[[Any], str] = lambda processor: processor.image_token
    count: Callable[[Any], int | None] = lambda processor: None
    rewrite: Callable[[Any, Prompt, int], Prompt] = lambda processor, prompt, images: prompt


def _idefics2(processor: Any, prompt: Prompt, images: int) -> Prompt:
    """Latents between fake tokens, five times if the image is split; touching fake tokens become one."""
    fake, token = processor.fake_image_token, processor.image_token
    block = f"{fake}{token * processor.image_seq_len}{fake}" * (
        5 if processor.image_processor.do_image_splitting else 1
    )
    prompt = prompt.sub(re.escape(token), lambda match: block)
    prompt = prompt.sub(re.escape(fake + fake), lambda match: fake)
    return prompt.sub(re.escape(fake) + r"(?=[^\s<])", lambda match: f"{fake} ")


def _mllama(processor: Any, prompt: Prompt, images: int) -> Prompt:
    """A beginning-of-text token behind leading image tokens, unless there is one."""
    if processor.bos_token in prompt.text:
        return prompt
    lead = re.match(f"(?:{re.escape(processor.image_token)})*", prompt.text)
    cut = lead.end() if lead else 0
    return prompt[:cut] + Prompt.of(processor.bos_token, Role.TEMPLATE) + prompt[cut:]


def _florence2(processor: Any, prompt: Prompt, images: int) -> Prompt:
    """A task token becomes its sentence; with images, an image token, begin and end stand around it."""
    (words,) = processor._construct_prompts([prompt.text])
    if words != prompt.text:
        prompt = Prompt.of(words, Role.QUESTION)
    if not images:
        return prompt
    before = Prompt.of(processor.image_token + processor.tokenizer.bos_token, Role.TEMPLATE)
    return before + prompt + Prompt.of(processor.tokenizer.eos_token, Role.TEMPLATE)


def _molmo(processor: Any, prompt: Prompt, images: int) -> Prompt:
    """The end-of-text token first, since there is none that begins a text."""
    if prompt.text.startswith(processor.begin_token):
        return prompt
    return Prompt.of(processor.begin_token, Role.TEMPLATE) + prompt


HABITS = {
    "Idefics2Processor": Habit(
        count=lambda processor: processor.image_seq_len * (5 if processor.image_processor.do_image_splitting else 1),
        rewrite=_idefics2,
    ),
    # Older versions call the token of the tower's features its image token.
    "Gemma3Processor": Habit(token=lambda processor: processor.boi_token),
    "MllamaProcessor": Habit(begins=True, rewrite=_mllama),
    "MolmoProcessor": Habit(begins=True, rewrite=_molmo),
    "Blip2Processor": Habit(inserts=True, needs_image=True, count=lambda processor: processor.num_query_tokens),
    "Florence2Processor": Habit(inserts=True, begins=True, rewrite=_florence2),
}
"""By the name of the processor's class; the others only replace image tokens, and say so."""


def habit(processor: Any) -> Habit:
    """What is special about a processor."""
    return HABITS.get(type(processor).__name__, Habit())


def image_token(processor: Any) -> str:
    """The image token of prompts, as text."""
    return str(habit(processor).token(processor))
