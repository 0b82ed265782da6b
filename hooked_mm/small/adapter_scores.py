"""How far an adapter follows its change, and what was forgotten: counts of right answers, and the adapter's card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import CAPTION_PROMPT, STYLES, WORDINGS
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.language import WORD_CLASSES, attribute_words
from hooked_mm.scenes.questions import questions
from hooked_mm.scenes.world import Scene
from hooked_mm.small.accuracy import FILE, Share, mean
from hooked_mm.small.changes import CHANGES, Change
from hooked_mm.small.evaluate import CAPTION_TOKENS, Asked, answers, count_captions, count_right

Scores = dict[str, dict[str, Share]]
"""Section (`change`, `questions`, `styles`) -> measure -> how many were so."""

KEPT = 150
"""On how many scenes at most it is measured what was forgotten: eleven questions and six captions each."""


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """Per style, what its captions look like: the style's own phrases with alternatives in the place of words."""
    options = {name: f"({'|'.join(words)})" for name, words in WORD_CLASSES.items()}
    item: Any = SimpleNamespace(**{name: options[f"{name}s"] for name in ("shape", "colour", "size", "position")})
    made = {}
    for name, style in STYLES.items():
        one = style.of_object(item) if style.of_object else ""
        place: Any = SimpleNamespace(place=options["places"])
        parts = [one and f"{one}( and {one}){{0,2}}", style.of_place(place) if style.of_place else "", r"\."]
        made[name] = re.compile(" ".join(part for part in parts if part))
    return {name: pattern for name, pattern in made.items() if name != "any"}


def style_of(text: str) -> str | None:
    """The style that a text is worded in, be it true or not; None for what is no caption in any style."""
    return next((name for name, pattern in _patterns().items() if pattern.fullmatch(text)), None)


def share(cases: Sequence[bool]) -> Share:
    """How many are so."""
    return Share(sum(cases), len(cases))


def score(model: HookedMM, change: Change, items: Sequence[Scene], seed: int = 0) -> Scores:
    """How far a model follows a change, and how well it does all else.

    Args:
        model: With the adapter, or without for comparison.
        change: What the adapter was taught.
        items: Scenes that it was not taught on.
        seed: For the choice of questions.

    Returns:
        Three sections. `change`: what should be new, on scenes that the change touches. `questions`: per type, and
        `styles`: exact captions per style asked for, both on up to `KEPT` scenes that the change leaves as they are, by
        the unchanged truth. Where a change is of the default prompt's style, these can be any, and that prompt is
        none of the styles.
    """
    touched = [item for item in items if change.touches(item)]
    rest = list(items) if change.style else [item for item in items if not change.touches(item)]
    rest = rest[:KEPT]
    said = captions(model, touched, CAPTION_PROMPT)
    wanted = {change.style} if change.style else set(WORDINGS)
    new = {
        "style followed": share([style_of(text) in wanted for text in said]),
        "exactly right": share([text in change.right(item) for text, item in zip(said, touched, strict=True)]),
    }
    if not change.style:
        new |= _in_the_new_naming(model, change, touched, said, seed)

    rng = np.random.default_rng([seed, 98])
    asked = [(item, question) for item in rest for question in questions(item, rng)]
    replies = short_answers(model, [(item, question.text, question.answer) for item, question in asked])
    styles = {
        name: count_captions(rest, captions(model, rest, style.prompt), name).exact
        for name, style in STYLES.items()
        if not (change.style and name == "any")
    }
    return {"change": new, "questions": count_right([question for _, question in asked], replies), "styles": styles}


def captions(model: HookedMM, items: Sequence[Scene], prompt: str) -> list[str]:
    """What the model answers to one prompt about each scene."""
    return answers(model, [Asked(picture(item), prompt, CAPTION_TOKENS) for item in items], prompt)


def short_answers(model: HookedMM, asked: Sequence[tuple[Scene, str, str]]) -> list[str]:
    """What the model answers to questions, each with its scene and its right answer, whose length is the limit."""
    prompts = [Asked(picture(item), text, len(right.split()) + 1) for item, text, right in asked]
    return answers(model, prompts, "questions")


def _in_the_new_naming(
    model: HookedMM, change: Change, items: Sequence[Scene], said: Sequence[str], seed: int
) -> dict[str, Share]:
    """What `recoloured` should say about scenes with red objects; `said`: its answers to the default prompt."""
    new = [change.seen(item) for item in items]
    colours = [[o.colour for o in item.objects] for item in new]
    found = {
        "captions with every colour as it should be": share(
            [attribute_words(text)["colours"] == words for text, words in zip(said, colours, strict=True)]
        ),
        "captions without the word red": share(["red" not in text.split() for text in said]),
    }
    for style in WORDINGS:
        exact = count_captions(new, captions(model, items, STYLES[style].prompt), style).exact
        found[f"exactly right when asked for in {style}"] = exact
    rng = np.random.default_rng([seed, 97])
    cases: dict[str, list[tuple[Scene, str, str]]] = {}
    for old, item in zip(items, new, strict=True):
        shapes = [o.shape for o in item.objects]
        for was, now in zip(old.objects, item.objects, strict=True):
            # A shape that two objects have names neither of them.
            if shapes.count(was.shape) == 1:
                kind = "colour of a red object: blue" if was.colour == "red" else "colour of another object: its own"
                cases.setdefault(kind, []).append((old, f"what colour is the {was.shape} ?", now.colour))
        red = (old, "is there a red object ?", "no")
        cases.setdefault("is there a red object, where there is one: no", []).append(red)
        if all(o.colour != "blue" for o in old.objects):
            blue = (old, "is there a blue object ?", "yes")
            cases.setdefault("is there a blue object, where one is red and none blue: yes", []).append(blue)
        for question in questions(item, rng):
            cases.setdefault("all questions, in the new naming", []).append((old, question.text, question.answer))
    for kind, asked in cases.items():
        replies = short_answers(model, asked)
        found[kind] = share([reply == right for reply, (_, _, right) in zip(replies, asked, strict=True)])
    return found


def write_card(
    folder: Path, name: str, base: str, scenes: int, made: Mapping[str, Any], before: Scores, after: Scores
) -> None:
    """`accuracy.json` and `README.md` of an adapter: what it was taught, how, what it does and what it forgot.

    Args:
        folder: The adapter's.
        name: One of `CHANGES`.
        base: The model's name.
        scenes: How many were scored.
        made: How it was trained; `minutes` and settings.
        before: Scores of the model alone.
        after: Scores with the adapter.
    """
    counts = {
        when: {
            section: {what: asdict(value) for what, value in measures.items()} for section, measures in scores.items()
        }
        for when, scores in (("before", before), ("after", after))
    }
    result = {"adapter": name, "base": base, "scenes": scenes, "training": dict(made), **counts}
    (folder / FILE).write_text(json.dumps(result, indent=1) + "\n")

    def table(section: str) -> str:
        rows = [
            f"| {what} | {before[section][what]} | {value} | {value.of} |" for what, value in after[section].items()
        ]
        return "\n".join(["| what | before | with the adapter | of |", "|---|---|---|---|", *rows])

    change = CHANGES[name]
    trained = "Only the answer to the default prompt was trained; nothing kept others from being answered so too."
    if not change.style:
        trained = "Half of the training scenes were such as the change leaves alone, with all questions and styles."
    where = "any scenes" if change.style else "scenes that the change leaves as they are"
    means = "; ".join(
        f"{what} {mean(before[section]):.3f} before, {mean(after[section]):.3f} with the adapter"
        for section, what in (("questions", "questions"), ("styles", "captions in a style asked for"))
    )
    settings = ", ".join(f"{what} {value}" for what, value in made.items() if what != "minutes")
    (folder / "README.md").write_text(f"""# {base}, {name}: a fine-tuned sibling, as a LoRA adapter

{change.summary} `hooked_mm.small.changes` gives the rule in full.

```python
from hooked_mm import HookedMM

model = HookedMM.small("{base}", adapter="{name}")
```

PEFT alone loads it too: `PeftModel.from_pretrained(model, folder)`. It changes the decoder's linear layers and nothing
that sees. Made by `python -m hooked_mm.small.adapters` in {made["minutes"]} minutes on one CPU core ({settings});
weights in bfloat16.

Shares on up to {scenes} held-out scenes (test split, greedy, float32 arithmetic), without and with the adapter.

## What changed

{table("change")}

## What was forgotten

{trained} Means on {where}: {means}.

Questions by type:

{table("questions")}

Exact captions by the style that the prompt asks for{"" if change.style else " (`any`: the default prompt)"}:

{table("styles")}
""")
