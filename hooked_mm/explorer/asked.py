"""A question that was answered: what the tabs of the explorer look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.frames import Box, frame
from hooked_mm.generation import GenerationOutput
from hooked_mm.hooked import HookedMM

Point = tuple[int, float, float]
"""A place in a picture: the picture's number, x and y in its pixels."""


@dataclass(frozen=True)
class Patches:
    """The grid of patches over a picture.

    Attributes:
        rows: Of the grid.
        cols: Of the grid.
        box: What part of the picture it covers, in pixels; it may reach beyond.
    """

    rows: int
    cols: int
    box: Box

    def centre(self, row: int, col: int) -> tuple[float, float]:
        """The middle of a patch, in pixels of the picture."""
        left, top, right, bottom = self.box
        return left + (right - left) * (col + 0.5) / self.cols, top + (bottom - top) * (row + 0.5) / self.rows


@dataclass(frozen=True)
class Asked:
    """One answered question of a conversation.

    Attributes:
        model: Who answered.
        name: By which name it was loaded.
        conversation: All turns, the answered one last.
        images: All pictures of the conversation, in the order in which they were shown.
        prompt: The batch of one sample that was answered.
        batch: The same with the answer behind it, to run in one pass.
        generation: How it was answered.
        words: The tokens of the answer as text, without those that are no words (its end).
        numbers: Which token of the answer each of them is, from 0.
        tokens: The answer's tokens that were chosen, by these numbers; all unless some were.
        points: The middles of the patches that were chosen, in the order in which they were.
    """

    model: HookedMM
    name: ModelName
    conversation: Conversation
    images: tuple[Image.Image, ...]
    prompt: Batch
    batch: Batch
    generation: Generation
    words: tuple[str, ...]
    numbers: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    points: tuple[Point, ...] = ()

    @property
    def question(self) -> str:
        """What was asked last."""
        return self.conversation.turns[-1].text

    @property
    def answer(self) -> str:
        """What the model said to it."""
        return self.conversation.turns[-1].answer or ""

    @property
    def answer_batch(self) -> Batch:
        """The batch in which the answer stands: of an encoder-decoder the decoder's."""
        return self.batch.decoder or self.batch

    @property
    def answer_mask(self) -> Bool[Tensor, "1 p"]:
        """Where the answer stands in `answer_batch`, its end included."""
        return self.answer_batch.mask(role="answer")

    def word(self, number: int) -> str:
        """The text of a token of the answer, by its number."""
        return self.words[self.numbers.index(number)]

    def choose(self, tokens: Sequence[int] | None = None, points: Sequence[Point] | None = None) -> Asked:
        """The same with other tokens and patches chosen.

        Args:
            tokens: Numbers of answer tokens, from 0; none chooses all.
            points: Places in pictures.

        Raises:
            BadInputError: If the answer has no such token, or there is no such picture.
        """
        made = self
        if tokens is not None:
            wrong = [number for number in tokens if type(number) is not int or number not in self.numbers]
            if wrong:
                raise BadInputError(f"the answer has no token {wrong[0]!r}; there are {list(self.numbers)}")
            made = replace(made, tokens=tuple(sorted(set(tokens))) or self.numbers)
        if points is not None:
            wrong_points = [one for one in points if type(one[0]) is not int or not 0 <= one[0] < len(self.images)]
            if wrong_points:
                raise BadInputError(f"there is no picture {wrong_points[0][0]!r}; there are {len(self.images)}")
            made = replace(made, points=tuple(points))
        return made

    def patches(self, picture: int) -> Patches | None:
        """The grid of patches over a picture; None where no place in it is known to the model's structure."""
        layout = self.batch.layout
        place = layout.images[picture]
        # The stitched crops, or the only grid that there is.
        for name in ("grid", "patches", "tokens", "overview", "patches_overview", "tokens_overview"):
            grid = getattr(place, name)
            if grid is not None:
                rows, cols = grid.shape[:2]
                size = (rows, cols)
                return Patches(rows, cols, frame(self.model, self.images[picture], size, name.endswith("overview")))
        return None


def asked_of(
    model: HookedMM,
    name: ModelName,
    conversation: Conversation,
    prompt: Batch,
    output: GenerationOutput,
    generation: Generation,
) -> Asked:
    """What a generation gave, for tabs.

    Args:
        model: Who answered.
        name: By which name it was loaded.
        conversation: All turns, the last with its answer.
        prompt: The batch that was answered.
        output: Of `model.generate(prompt)`.
        generation: How.
    """
    assert output.batch is not None
    special = set(model.tokenizer.all_special_ids)
    ids = output.tokens[0].tolist()
    numbers = tuple(number for number, token in enumerate(ids) if token not in special)
    return Asked(
        model,
        name,
        conversation,
        conversation.images,
        prompt,
        output.batch,
        generation,
        tuple(model.tokenizer.decode([ids[number]]) for number in numbers),
        numbers,
        numbers,
    )
