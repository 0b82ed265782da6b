"""A question asked as the explorer asks it, and what a tab's Python finds when it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from hooked_mm.explorer.asked import Asked, Point, asked_of
from hooked_mm.explorer.conversation import Conversation, Generation, ModelName
from hooked_mm.explorer.tab import Tab, View, checked
from hooked_mm.explorer.work import Work
from hooked_mm.generation import make_output
from hooked_mm.hooked import HookedMM


def ask(
    model: HookedMM,
    text: str,
    *images: Image.Image,
    name: str = "llava",
    before: Conversation | None = None,
    generation: Generation | None = None,
    tokens: Sequence[int] | None = None,
    points: Sequence[Point] | None = None,
) -> Asked:
    """Ask, and choose tokens and places."""
    said, how = (before or Conversation()).say(text, images), generation or Generation(max_new_tokens=6)
    conversation, prompt, output = said.ask(model, how)
    made = asked_of(model, ModelName("small", name), conversation, prompt, output, how)
    return made.choose(tokens, points)


def told(model: HookedMM, text: str, answer: str, *images: Image.Image, name: str = "llava") -> Asked:
    """Asked, and answered with these words, whatever the model would have said."""
    said, how = Conversation().say(text, images), Generation()
    prompt = said.prepare(model)
    ids = model.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = make_output(prompt, ids, None, model.tokenizer, None)
    return asked_of(model, ModelName("small", name), said.answered(answer), prompt, output, how)


def first_values(tab: Tab, model: HookedMM, **changed: Any) -> dict[str, Any]:
    """What the controls of a tab are at first, some changed; checked as the page checks them."""
    controls = tab.controls(model)
    return checked(controls, {control.name: control.value for control in controls} | changed)


def look(tab: Tab, asked: Asked, **changed: Any) -> View:
    """What a tab shows of a question."""
    return tab.look(asked, first_values(tab, asked.model, **changed), Work())


def made_again(view: View, asked: Asked) -> dict[str, torch.Tensor]:
    """The arrays that the Python of a view makes, run on its own."""
    names: dict[str, Any] = {
        "model": asked.model,
        "batch": asked.batch,
        "prompt": asked.prompt,
        "images": list(asked.images),
        "tokens": asked.tokens,
        "points": asked.points,
    }
    exec(compile(view.python, "a view's python", "exec"), names)
    return names["arrays"]


def assert_same(found: Mapping[str, torch.Tensor], arrays: Mapping[str, torch.Tensor]) -> None:
    """The same arrays, bit for bit."""
    assert list(found) == list(arrays)
    assert arrays, "a view without arrays has nothing that could be found again"
    for name, value in arrays.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
