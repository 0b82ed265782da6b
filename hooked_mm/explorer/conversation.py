"""A conversation with a model: turns, their pictures, and how answers are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import torch
from PIL import Image

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, shown
from hooked_mm.explorer.work import partial_text
from hooked_mm.generation import GenerationOutput
from hooked_mm.hooked import HookedMM
from hooked_mm.prompts import Turn

MOST_TOKENS = 512
"""Tokens of an answer at most."""


@dataclass(frozen=True)
class ModelName:
    """What a model is loaded by.

    Attributes:
        kind: A shipped small model, or one from the hub or a folder.
        name: Its name, id or folder.
        options: For `from_pretrained`: dtype, device_map, revision.
    """

    kind: Literal["small", "id"]
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"small:{self.name}" if self.kind == "small" else self.portable.name

    @property
    def portable(self) -> ModelName:
        """The same without the way to its folder on this machine, which is no visitor's business."""
        if self.kind == "small":
            return self
        local = Path(self.name).exists() or PurePosixPath(self.name).is_absolute() or PureWindowsPath(self.name).drive
        return replace(self, name=PureWindowsPath(self.name).name) if local else self

    @property
    def python(self) -> str:
        """The expression that loads it."""
        maker = "small" if self.kind == "small" else "from_pretrained"
        rest = "".join(f", {key}={value!r}" for key, value in self.options)
        return f"HookedMM.{maker}({self.name!r}{rest})"

    def load(self) -> HookedMM:
        """Load it, and check it."""
        maker = HookedMM.small if self.kind == "small" else HookedMM.from_pretrained
        return maker(self.name, **dict(self.options))


@dataclass(frozen=True)
class Generation:
    """How an answer is generated.

    Attributes:
        max_new_tokens: Tokens at most, up to `MOST_TOKENS`.
        temperature: 0 takes the likeliest token at every step; from 0.01 on, tokens are drawn.
        top_p: Drawn among the likeliest tokens that make up this share.
        seed: Of the drawing.

    Raises:
        BadInputError: For a value out of its range.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {"max_new_tokens": (1, MOST_TOKENS), "temperature": (0, 5), "top_p": (0.01, 1), "seed": (0, 2**31)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise BadInputError(f"{name}={shown(value)}; it lies between {low} and {high}")
        for name in ("max_new_tokens", "seed"):
            if getattr(self, name) != int(getattr(self, name)):
                raise BadInputError(f"{name}={getattr(self, name)}; it is a whole number")
            object.__setattr__(self, name, int(getattr(self, name)))
        if 0 < self.temperature < 0.01:
            raise BadInputError(f"temperature={self.temperature}; it is 0, or at least 0.01")

    @property
    def options(self) -> dict[str, Any]:
        """For `HookedMM.generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            # Nothing else narrows the choice, whatever the model came with or transformers does by itself.
            found |= {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": 0}
        return found

    def run(self, model: HookedMM, prompt: Batch, **more: Any) -> GenerationOutput:
        """Generate; the random state of others is left as it was."""
        # A model may lie on several devices; seeding seeds them all.
        devices = list(range(torch.cuda.device_count())) if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            return model.generate(prompt, **self.options, **more)


@dataclass(frozen=True)
class Said:
    """One turn: what a person said and showed, and what the model answered, if it has."""

    text: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns, in their order; only the last may lack its answer."""

    turns: tuple[Said, ...] = ()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All pictures, in the order in which they were shown."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def history(self) -> list[Turn]:
        """The turns before the last, for `HookedMM.prepare`."""
        return [Turn(turn.text, turn.answer or "", len(turn.images)) for turn in self.turns[:-1]]

    def say(self, text: str, images: tuple[Image.Image, ...] = ()) -> Conversation:
        """One turn more."""
        return Conversation((*self.turns, Said(text, images)))

    def answered(self, answer: str) -> Conversation:
        """The last turn with its answer."""
        return Conversation((*self.turns[:-1], replace(self.turns[-1], answer=answer)))

    def prepare(self, model: HookedMM) -> Batch:
        """The prompt that ends with the last question, as a batch of one sample.

        Raises:
            BadInputError: If the model takes no such prompt: no text, too many pictures, several turns, odd shapes.
        """
        if any(not (turn.answer or "").strip() for turn in self.turns[:-1]):
            raise BadInputError(
                "an earlier question was answered with no word, so that nothing can follow it; begin a new conversation"
            )
        history = [self.history] if len(self.turns) > 1 else None
        try:
            return model.prepare([list(self.images) or None], [self.turns[-1].text], history=history)
        except BadInputError:
            raise
        except ValueError as error:
            # As of a picture that is 200 times as long as wide: this is no fault of the page.
            raise BadInputError(f"the model's processor refused the question or a picture ({error})") from error

    def ask(
        self, model: HookedMM, generation: Generation, tell: Callable[[str], None] | None = None
    ) -> tuple[Conversation, Batch, GenerationOutput]:
        """Let a model answer the last question.

        Args:
            model: The model.
            generation: How.
            tell: Called with the answer so far, at every token.

        Returns:
            The conversation with the answer, the prompt, and what was generated.

        Raises:
            BadInputError: As of `prepare`, and if question and answer may be longer than the model can read.
        """
        prompt = self.prepare(model)
        check_length(model, prompt, generation.max_new_tokens)
        more = {} if tell is None else {"streamer": partial_text(model.tokenizer, tell)}
        output = generation.run(model, prompt, **more)
        return self.answered(output.text[0]), prompt, output


def check_length(model: HookedMM, prompt: Batch, max_new_tokens: int) -> None:
    """Refuse what is longer than a model was made for.

    Some would answer with noise; of others, whose positions are learned, a GPU takes no further work after it.

    Args:
        model: The model.
        prompt: A batch of one sample.
        max_new_tokens: That may come behind it.

    Raises:
        BadInputError: If its positions do not suffice; it says for how many tokens they do.
    """
    config = model.hf_model.config
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    # Encoder and decoder count by themselves, and many of them from each token to the next.
    if config.is_encoder_decoder or not isinstance(most, int) or most <= 0:
        return
    long = prompt.input_ids.shape[1]
    if long >= most:
        raise BadInputError(
            f"the conversation has {long} tokens, pictures included, and the model reads at most {most}; begin a new "
            "one, or show fewer or smaller pictures"
        )
    if long + max_new_tokens > most:
        raise BadInputError(
            f"the conversation has {long} tokens, pictures included, and the model reads at most {most}, its answer "
            f"included; set the answer's tokens to {most - long} at most"
        )
