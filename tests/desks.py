"""A desk of small models to test with, without a page; what a visitor has, to compare."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.explorer.desk import Desk, Progress, Question
from hooked_mm.explorer.panels import Facts
from hooked_mm.explorer.tab import Control, Number, View
from hooked_mm.explorer.visits import Visit
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM

LLAVA, QWEN = ModelName("small", "llava"), ModelName("small", "qwen2_vl")
SHORT, OTHER, FULL = "what place is this ?", "what shape is the object ?", "describe the scene in full ."
LONG = Generation(24)


class Shows:
    """A tab that shows what it was given."""

    name, title, about, order = "shows", "Shows", "", 1

    def __init__(self) -> None:
        self.meanwhile: Callable[[Asked, Work], None] = lambda asked, work: None

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """One number, up to the model's last layer."""
        return [Number("layer", "Layer", 0, model.cfg.n_layers - 1, 0)]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """What was asked and chosen."""
        work.step("showing", 1, 2)
        self.meanwhile(asked, work)
        logits = asked.model.run_with_hooks(asked.batch)
        assert logits is not None
        facts = [("model", str(asked.name)), ("tokens", asked.tokens), ("points", asked.points), *values.items()]
        return View([Facts(facts)], arrays={"logits": logits})


@contextmanager
def slowly(model: HookedMM, seconds: float = 0.12) -> Iterator[None]:
    """Every pass of the model takes longer than `Desk` waits before it tells of it, so that there is a meanwhile."""
    handle = model.hf_model.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


def state(visit: Visit) -> dict[str, Any]:
    """All that a visit has, to compare: asked questions by identity, as they hold tensors."""
    sides = [(side.name, side.conversation, id(side.asked), side.cells) for side in visit.sides]
    return {
        **vars(visit),
        "sides": sides,
        "seen": {name: [id(one) for one in seen] for name, seen in visit.seen.items()},
    }


def ask(desk: Desk, visit: Visit, *images: Image.Image, text: str = SHORT, **more: Any) -> list[Progress]:
    """Ask to the end."""
    return list(desk.ask(visit, Question(text, images, **more)))


def alone(model: HookedMM, conversation: Conversation, generation: Generation | None = None) -> str:
    """What a model answers without a desk."""
    return conversation.ask(model, generation or Generation())[0].turns[-1].answer or ""


def look(desk: Desk, visit: Visit, *tokens: Sequence[int], **values: Any) -> list[Progress]:
    """Let the tab look to the end."""
    return list(desk.look(visit, "shows", tokens, {"layer": 0} | values))


def hooks_of(model: HookedMM) -> int:
    """Hooks before passes of the whole model."""
    return len(model.hf_model._forward_pre_hooks)


def free(desk: Desk) -> bool:
    """Whether the models' thread is free for the next."""
    return desk.worker.start(lambda work: None).wait(5)


Setting = tuple[Desk, Shows, list[tuple[str, str]]]


@contextmanager
def opened(monkeypatch: pytest.MonkeyPatch, small: Callable[[str], HookedMM]) -> Iterator[Setting]:
    """A desk of two models and a tab; small models are not loaded again.

    Yields:
        The desk, its tab, and which model was asked for in which thread.
    """
    told: list[tuple[str, str]] = []

    def load(name: ModelName) -> HookedMM:
        told.append((str(name), threading.current_thread().name))
        return small(name.name)

    monkeypatch.setattr(ModelName, "load", load)
    tab = Shows()
    desk = Desk([LLAVA, QWEN], [tab])
    try:
        yield desk, tab, told
    finally:
        desk.close()
