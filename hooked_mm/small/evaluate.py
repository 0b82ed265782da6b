"""How well a small model sees: questions and captions on fresh scenes, with a wrong-image control; the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.dataset import SceneDataset, picture
from hooked_mm.scenes.language import CAPTION_PROMPT, QUESTION_TYPES, caption, caption_slots, questions


@dataclass(frozen=True)
class Evaluation:
    """Shares right, 0 to 1, on `scenes` scenes.

    `questions` per question type; `caption_attributes` per word class; `exact_captions`: the whole caption;
    `wrong_image`: the mean over question types when every question is asked of another scene's picture.
    """

    scenes: int
    questions: dict[str, float]
    caption_attributes: dict[str, float]
    exact_captions: float
    wrong_image: float

    @property
    def mean_question(self) -> float:
        """Mean over question types."""
        return float(np.mean(list(self.questions.values())))

    @property
    def mean_caption_attribute(self) -> float:
        """Mean over word classes."""
        return float(np.mean(list(self.caption_attributes.values())))


def slot_accuracy(said: str, true: str) -> dict[str, float]:
    """Per word class, the share of the true caption's attribute words that stand in the same slot of the other one."""
    found, wanted = caption_slots(said), caption_slots(true)
    return {
        name: sum(a == b for a, b in zip(found[name], words, strict=False)) / max(len(words), len(found[name]))
        for name, words in wanted.items()
        if words
    }


def _answers(
    model: HookedMM, images: Sequence[Image.Image], prompts: Sequence[str], length: int, what: str
) -> list[str]:
    said: list[str] = []
    step = 128
    for start in tqdm(range(0, len(prompts), step), desc=what, unit="batch"):
        part = slice(start, start + step)
        said += model.generate(model.prepare(images[part], prompts[part]), length).text
    return said


def evaluate(folder: str | Path, scenes: int = 1000, seed: int = 0) -> Evaluation:
    """Greedy answers of the saved model, through its real processor, on the first test scenes of `seed`."""
    model = HookedMM.from_pretrained(folder, dtype="float32")
    data = SceneDataset(scenes, split="test", seed=seed)
    worlds = [data.scene(index) for index in range(scenes)]
    images = [picture(item) for item in worlds]
    truth = [caption(item) for item in worlds]
    said = _answers(model, images, [CAPTION_PROMPT] * scenes, 48, "captions")
    slots = [slot_accuracy(a, b) for a, b in zip(said, truth, strict=True)]
    rng = np.random.default_rng([seed, 99])
    asked = [(index, question) for index, item in enumerate(worlds) for question in questions(item, rng)]

    def right(shift: int, what: str) -> dict[str, float]:
        pictures = [images[(index + shift) % scenes] for index, _ in asked]
        answers = _answers(model, pictures, [question.text for _, question in asked], 4, what)
        hits: dict[str, list[bool]] = {name: [] for name in QUESTION_TYPES}
        for (_, question), answer in zip(asked, answers, strict=True):
            hits[question.type].append(answer == question.answer)
        return {name: float(np.mean(values)) for name, values in hits.items()}

    return Evaluation(
        scenes=scenes,
        questions=right(0, "questions"),
        caption_attributes={
            name: float(np.mean([slot[name] for slot in slots]))
            for name in ("shapes", "colours", "sizes", "positions", "places")
        },
        exact_captions=float(np.mean([a == b for a, b in zip(said, truth, strict=True)])),
        wrong_image=float(np.mean(list(right(1, "wrong images").values()))),
    )


def write_model_card(folder: Path, result: Evaluation, minutes: float, options: Mapping[str, Any]) -> None:
    """`README.md` of a small model: what it is, how it was made, what it can do."""
    settings = ", ".join(f"{name} {value}" for name, value in sorted(options.items()) if name != "output")
    rows = [f"| question: {name} | {value:.3f} |" for name, value in result.questions.items()]
    rows += [f"| **questions, mean over types** | **{result.mean_question:.3f}** |"]
    rows += [f"| caption: {name} | {value:.3f} |" for name, value in result.caption_attributes.items()]
    rows += [
        f"| **caption attributes, mean** | **{result.mean_caption_attribute:.3f}** |",
        f"| exact captions | {result.exact_captions:.3f} |",
        f"| control: questions with a wrong image | {result.wrong_image:.3f} |",
    ]
    table = "\n".join(rows)
    (folder / "README.md").write_text(f"""# {folder.name}: a small trained vision-language model

A genuine `LlavaForConditionalGeneration` (CLIP tower, MLP projector, Llama decoder) with its processor, trained from
nothing on hooked-mm's scenes: 48 x 48 pictures of one or two objects (6 shapes, 8 colours, 2 sizes, 4 positions) in one
of 6 places. It exists so that interpretability methods can be tried and tested on a model that works, whose pictures'
truth is known, without downloading anything. It knows nothing else.

```python
from hooked_mm import HookedMM

model = HookedMM.small("{folder.name}")
```

Made by `python -m hooked_mm.small.train` in {minutes:.1f} minutes on 2 CPU cores ({settings}); weights in bfloat16.

Shares right on {result.scenes} fresh scenes (test split, greedy, float32 arithmetic on the bfloat16 weights):

| what | share right |
|---|---|
{table}

Captions are scored per attribute word in its slot; an exact caption has every word right. Questions are asked of each
scene once per type; yes/no questions are balanced. Words outside the scenes' vocabulary become `<unk>`.
""")
