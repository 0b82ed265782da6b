"""What the explorer does for a visitor: ask, look, stop; without a page, so that it can be tested without one.

Everything that runs a model is a generator: it yields what is known so far every tenth of a second, and ends with the
result. When it is closed early, because the visitor pressed stop or has gone, the work is ended first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from hooked_mm.errors import BadInputError, HookedMMError
from hooked_mm.explorer.asked import Asked, asked_of
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.explorer.edits import MOST_PIXELS
from hooked_mm.explorer.panels import Note
from hooked_mm.explorer.tab import Tab, View, checked
from hooked_mm.explorer.visits import Seen, Side, Visit, Visits
from hooked_mm.explorer.work import Running, Stopped, Work, Worker
from hooked_mm.extraction import is_out_of_memory
from hooked_mm.hooked import HookedMM

LONGEST_QUESTION = 4000
"""Characters of a question at most."""

MOST_PICTURES = 16
"""In a conversation at most."""

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What is known while the model works.

    Attributes:
        told: What is being done.
        share: How much of it is done, from 0 to 1; None where that is not known.
        texts: The answers so far, one per side.
    """

    told: str
    share: float | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a visitor asks.

    Attributes:
        text: In words.
        images: Pictures shown with it.
        generation: How it shall be answered.
        other: The model to compare with; None compares with none.
        other_images: The pictures that the other side is shown instead; None for the same.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    generation: Generation = field(default_factory=Generation)
    other: ModelName | None = None
    other_images: tuple[Image.Image, ...] | None = None


class Desk:
    """The explorer behind its page.

    Args:
        models: Those that can be chosen, the first at first; each is loaded when it is first needed, and kept.
        tabs: As `tab.load_tabs` gives them.

    Raises:
        BadInputError: Without a model, or if two would have one name.
    """

    def __init__(self, models: Sequence[ModelName], tabs: Sequence[Tab]) -> None:
        if not models:
            raise BadInputError("no model to explore; give one by --model or --small")
        self.names = {str(name): name for name in models}
        if len(self.names) < len(models):
            raise BadInputError(f"two models would have one name: {', '.join(map(str, models))}; give each once")
        self.tabs = {tab.name: tab for tab in tabs}
        self.visits = Visits([models[0]])
        self.worker = Worker()
        self._loaded: dict[ModelName, HookedMM] = {}

    def model(self, name: ModelName, work: Work | None = None) -> HookedMM:
        """A model by its name, loaded if it was not: in the models' thread, as it is run to check it.

        Args:
            name: The model.
            work: What it is loaded for, in that thread; None from any other.
        """
        if name in self._loaded:
            return self._loaded[name]
        if work is None:
            return self.worker.start(lambda own: self.model(name, own)).result()
        work.step(f"loading {name}")
        self._loaded[name] = name.load()
        return self._loaded[name]

    def named(self, name: str) -> ModelName:
        """A model that can be chosen, by what the page calls it.

        Raises:
            BadInputError: If it is none of them: a visitor can't have any other loaded.
        """
        if name not in self.names:
            raise BadInputError(f"no model {str(name)[:80]!r} is open here; there are: {', '.join(self.names)}")
        return self.names[name]

    def warm(self) -> None:
        """Let the first model answer once, for nobody: the first pass takes longer than those after it."""
        model = self.model(next(iter(self.names.values())))
        said = Conversation().say("what is this ?", (Image.new("RGB", (64, 64), "grey"),))
        self.worker.start(lambda _: said.ask(model, Generation(max_new_tokens=2))).result()

    def close(self) -> None:
        """End all work and all visits."""
        self.visits.close_all()
        self.worker.close()

    def ask(self, visit: Visit, question: Question) -> Iterator[Progress]:
        """Ask; at its end the visit's sides have the answer.

        Raises:
            HookedMMError: If the question can't be asked; the visit is as it was.
            Stopped: If it was stopped; the visit is as it was.
        """
        if not question.text.strip():
            raise BadInputError("the question is empty; write what you want to know")
        if len(question.text) > LONGEST_QUESTION:
            raise BadInputError(f"the question has {len(question.text)} characters; {LONGEST_QUESTION} at most")
        sides = self.sides(visit, question)
        for side in sides:
            check_pictures(side.conversation.images)
        texts = [""] * len(sides)
        number = visit.number

        def do(work: Work) -> list[Asked]:
            return [self._answer(side, question.generation, texts, place, work) for place, side in enumerate(sides)]

        running = self._started(visit, do)
        yield from self._followed(visit, running, texts)
        found = running.result()
        if visit.number != number:
            raise Stopped("the conversation was begun anew")
        visit.sides = [Side(side.name, asked.conversation, asked) for side, asked in zip(sides, found, strict=True)]
        visit.seen, visit.number = {}, visit.number + 1

    def sides(self, visit: Visit, question: Question) -> list[Side]:
        """The visit's sides with the question at their end, not yet answered.

        Another model that is compared from now on has been told all that the first was; another picture begins anew.
        """
        first, text = visit.sides[0], question.text.strip()
        asked = [Side(first.name, first.conversation.say(text, question.images))]
        if question.other is not None:
            begun = first.conversation if question.other_images is None else Conversation()
            own = [side for side in visit.sides[1:] if side.name == question.other]
            second = own[0] if own else Side(question.other, begun)
            images = question.images if question.other_images is None else question.other_images
            asked.append(Side(question.other, second.conversation.say(text, images)))
        return asked

    def _answer(self, side: Side, generation: Generation, texts: list[str], place: int, work: Work) -> Asked:
        model = self.model(side.name, work)
        work.step("answering" if len(texts) == 1 else f"{side.name} answers", place, len(texts))

        def tell(text: str) -> None:
            work.check()
            texts[place] = text

        with work.watching(model.hf_model):
            conversation, prompt, output = side.conversation.ask(model, generation, tell)
        return asked_of(model, side.name, conversation, prompt, output, generation)

    def look(
        self, visit: Visit, name: str, tokens: Sequence[Sequence[int]], values: Mapping[str, Any]
    ) -> Iterator[Progress]:
        """Let a tab look; at its end `visit.seen[name]` has what it found, per side.

        What a tab can't do with a model or a question stands in its view.

        Args:
            visit: Whose.
            name: Of the tab.
            tokens: Numbers of chosen answer tokens, for every side.
            values: Of the tab's controls, as they came.

        Raises:
            BadInputError: If nothing was asked yet.
            Stopped: If it was stopped.
        """
        tab, number = self.tabs[name], visit.number
        sides = [(side, side.asked) for side in visit.sides if side.asked is not None]
        if not sides:
            raise BadInputError("nothing was asked yet; ask a question first")

        def do(work: Work) -> tuple[Seen, ...]:
            return tuple(
                self._seen(tab, side, asked, tokens[place] if place < len(tokens) else (), values, work)
                for place, (side, asked) in enumerate(sides)
            )

        running = self._started(visit, do)
        yield from self._followed(visit, running, [])
        seen = running.result()
        if visit.number != number:
            raise Stopped("another question was asked meanwhile")
        visit.seen[name] = seen

    def _seen(
        self, tab: Tab, side: Side, asked: Asked, tokens: Sequence[int], values: Mapping[str, Any], work: Work
    ) -> Seen:
        try:
            own = checked(tab.controls(asked.model), values)
            asked = asked.choose(tokens, side.points())
            work.step(tab.title)
            with work.watching(asked.model.hf_model):
                return Seen(asked, tab.look(asked, own, work))
        except HookedMMError as error:
            return Seen(asked, View([Note(str(error), "warning")]))

    def switch(self, visit: Visit, name: ModelName) -> Iterator[Progress]:
        """Load a model if it was not, and begin a new conversation with it; at its end the visit has it.

        Raises:
            HookedMMError: If it can't be loaded; the visit is as it was.
            Stopped: If it was stopped.
        """
        running = self._started(visit, lambda work: self.model(name, work))
        yield from self._followed(visit, running, [])
        running.result()
        visit.clear([name])

    def _started(self, visit: Visit, do: Any) -> Running[Any]:
        visit.stop()
        running = self.worker.start(do)
        visit.work = running.work
        return running

    def _followed(self, visit: Visit, running: Running[Any], texts: list[str]) -> Iterator[Progress]:
        """What is known, until the work has ended; ended early, the work ends too."""
        try:
            while not running.wait(0.1):
                yield Progress(running.work.told or "waiting", running.work.share, tuple(texts))
        finally:
            if not running.wait(0):
                running.give_up()
            if visit.work is running.work:
                visit.work = None


def check_pictures(images: Sequence[Image.Image]) -> None:
    """Refuse more pictures than a conversation may hold: all of them stay in memory as long as it lasts.

    Raises:
        BadInputError: If they are too many, or have too many pixels together.
    """
    pixels = sum(image.width * image.height for image in images)
    if len(images) > MOST_PICTURES or pixels > MOST_PIXELS:
        raise BadInputError(
            f"the conversation would have {len(images)} pictures of {pixels / 1e6:.1f} million pixels together; at "
            f"most {MOST_PICTURES} and {MOST_PIXELS / 1e6:.0f} million are kept: begin a new one or show smaller ones"
        )


def said(error: BaseException) -> str:
    """What a visitor is told of an error: ours as they are; of others, which may name files, that they happened."""
    if isinstance(error, HookedMMError | Stopped):
        return str(error)
    log.error("the explorer failed", exc_info=error)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return "there is not enough memory for this; take smaller or fewer pictures, fewer tokens or a shorter question"
    return f"this failed ({type(error).__name__}); whoever runs this page finds more in its log"


def unseen(last: Image.Image | None, now: Image.Image | None) -> tuple[Image.Image, ...]:
    """A picture, unless it is the one that was shown last: nobody means to show it again with every question."""
    if now is None or (last is not None and last.size == now.size and last.tobytes() == now.tobytes()):
        return ()
    return (now,)
