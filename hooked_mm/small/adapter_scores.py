"""How far an adapter follows its change, and what was forgotten: shares of right answers, and the adapter's card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import CAPTION_PROMPT, STYLES, WORDINGS, right_captions
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.language import WORD_CLASSES, attribute_words
from hooked_mm.scenes.questions import QUESTION_TYPES, questions
from hooked_mm.scenes.world import Scene
from hooked_mm.small.changes import CHANGES, Change


def _alternatives(name: str) -> str:
    return f"({'|'.join(WORD_CLASSES[name])})"


_OBJECT = SimpleNamespace(**{name: _alternatives(f"{name}s") for name in ("shape", "colour", "size", "position")})
_PLACE = SimpleNamespace(place=_alternatives("places"))


def style_of(text: str) -> str | None:
    """The style that a text is worded in, whether true or not; None for a text that is no caption in any style."""
    for name, style in STYLES.items():
        one = style.of_object(_OBJECT) if style.of_object else ""  # type: ignore[arg-type]
        place = style.of_place(_PLACE) if style.of_place else ""  # type: ignore[arg-type]
        pattern = " ".join(part for part in (one and f"{one}( and {one}){{0,2}}", place, r"\.") if part)
        if name != "any" and re.fullmatch(pattern, text):
            return name
    return None


def answers(model: HookedMM, items: Sequence[Scene], prompts: Sequence[str], length: int) -> list[str]:
    """Greedy answers of at most `length` tokens to one prompt about each scene's picture."""
    said: list[str] = []
    for start in range(0, len(items), 128):
        part = slice(start, start + 128)
        images = [picture(item) for item in items[part]]
        said += model.generate(model.prepare(images, list(prompts[part])), length).text
    return said


Scores = dict[str, dict[str, float]]
"""Section -> measure -> share, 0 to 1."""


Cases = dict[str, list[bool]]
"""Measure -> whether it was so, case by case."""


def _shares(cases: Cases) -> dict[str, float]:
    """The shares of what is so; what has no case is left out."""
    return {name: float(np.mean(values)) for name, values in cases.items() if len(values)}


def score(model: HookedMM, change: Change, items: Sequence[Scene], seed: int = 0) -> Scores:
    """How far a model follows a change, and how well it does all else.

    Returns:
        Three sections. `change`: what should be new (about scenes that the change touches). `questions`: share right
        per type, and `styles`: exact captions per style asked for; about scenes that the change leaves as they are
        (all, where it changes a style), scored by the unchanged truth.
    """
    touched = [item for item in items if change.touches(item)]
    rest = list(items) if change.style else [item for item in items if not change.touches(item)]
    said = answers(model, touched, [CAPTION_PROMPT] * len(touched), CAPTION_LENGTH)
    styles = {change.style} if change.style else set(WORDINGS)
    new: Cases = {
        "style followed": [style_of(text) in styles for text in said],
        "exactly right": [text in change.right(item) for text, item in zip(said, touched, strict=True)],
    }
    if not change.style:
        new |= _recoloured_cases(model, change, touched, said, seed)

    rng = np.random.default_rng([seed, 98])
    asked = [(item, question) for item in rest for question in questions(item, rng)]
    replies = answers(model, [item for item, _ in asked], [question.text for _, question in asked], 4)
    hits: dict[str, list[bool]] = {name: [] for name in QUESTION_TYPES}
    for (_, question), reply in zip(asked, replies, strict=True):
        hits[question.type].append(reply == question.answer)
    exact = {}
    for name, style in STYLES.items():
        texts = answers(model, rest, [style.prompt] * len(rest), CAPTION_LENGTH)
        exact[name] = [text in right_captions(item, name) for text, item in zip(texts, rest, strict=True)]
    return {"change": _shares(new), "questions": _shares(hits), "styles": _shares(exact)}


CAPTION_LENGTH = 48
"""Enough tokens for the longest caption, of three objects in full."""


def _recoloured_cases(model: HookedMM, change: Change, items: Sequence[Scene], said: Sequence[str], seed: int) -> Cases:
    """What `recoloured` should say about scenes with red objects; `said`: its answers to the default prompt."""
    new = [change.seen(item) for item in items]
    found: Cases = {
        "all colours of the caption as they should be": [
            attribute_words(text)["colours"] == [o.colour for o in item.objects]
            for text, item in zip(said, new, strict=True)
        ],
        "red is not said in the caption": ["red" not in text.split() for text in said],
    }
    for style in WORDINGS:
        texts = answers(model, items, [STYLES[style].prompt] * len(items), CAPTION_LENGTH)
        right = [text in right_captions(item, style) for text, item in zip(texts, new, strict=True)]
        found[f"exactly right when asked for in {style}"] = right
    asked: list[tuple[str, Scene, str, str]] = []
    rng = np.random.default_rng([seed, 97])
    for old, item in zip(items, new, strict=True):
        shapes = [o.shape for o in item.objects]
        for was, now in zip(old.objects, item.objects, strict=True):
            # A shape that two objects have names neither of them.
            if shapes.count(was.shape) == 1:
                what = "red object ? blue" if was.colour == "red" else "other object ? as before"
                asked.append((f"what colour is a {what}", old, f"what colour is the {was.shape} ?", now.colour))
        asked.append(("is there a red object ? no", old, "is there a red object ?", "no"))
        if all(o.colour != "blue" for o in old.objects):
            asked.append(
                ("is there a blue object ? yes (one is red)", old, "is there a blue object ?", "yes")
            )
        asked += [("any question, in the new naming", old, q.text, q.answer) for q in questions(item, rng)]
    replies = answers(model, [case[1] for case in asked], [case[2] for case in asked], 4)
    for (kind, _, _, right_answer), reply in zip(asked, replies, strict=True):
        found.setdefault(kind, []).append(reply == right_answer)
    return found


def write_card(
    folder: Path, name: str, base: str, scenes: int, made: Mapping[str, Any], before: Scores, after: Scores
) -> None:
    """`accuracy.json` and `README.md` of an adapter: what it was taught, how, what it does and what it forgot."""
    result = {"adapter": name, "base": base, "scenes": scenes, "training": dict(made), "before": before, "after": after}
    (folder / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    change = CHANGES[name]
    whole = "all scenes" if change.style else "scenes that the change leaves as they are"

    def table(section: str) -> str:
        rows = [f"| {what} | {before[section][what]:.3f} | {share:.3f} |" for what, share in after[section].items()]
        return "\n".join(["| what | before | with the adapter |", "|---|---|---|", *rows])

    lost = {section: mean(before[section]) - mean(after[section]) for section in ("questions", "styles")}
    forgotten = ", ".join(f"{what} {loss:+.3f}" for what, loss in lost.items())
    settings = ", ".join(f"{what} {value}" for what, value in made.items() if what != "minutes")
    (folder / "README.md").write_text(f"""# {base} / {name}: a fine-tuned sibling, as a LoRA adapter

{change.summary} `hooked_mm.small.changes` gives the rule in full.

```python
from hooked_mm.small.adapters import load_with_adapter

model = load_with_adapter("{base}", "{base}/adapters/{name}")
```

PEFT loads it too (`PeftModel.from_pretrained(model, folder)`). It changes the decoder's linear layers only. Made by
`python -m hooked_mm.small.adapters` in {made["minutes"]} minutes on one CPU core ({settings}); weights in bfloat16.

Shares right on {scenes} held-out scenes (test split, greedy, float32 arithmetic), without and with the adapter.

## What changed

{table("change")}

## What was forgotten

Only the change was trained. Lost on {whole}, in the mean: {forgotten}.

Questions by type:

{table("questions")}

Exact captions by the style that the prompt asks for (`any`: the default prompt):

{table("styles")}
""")


def mean(shares: Mapping[str, float]) -> float:
    """The mean over measures; not a number where there is none."""
    return float(np.mean(list(shares.values()))) if shares else float("nan")
