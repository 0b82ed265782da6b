"""How well a small model sees: `python -m hooked_mm.small.evaluate FOLDER` asks it about fresh scenes.

| measure | scenes | what is counted |
|---|---|---|
| questions, `test` | N | one question of every type that a scene allows |
| questions, `unseen` | 3/5 N | the same where every scene shows a held-out pair; those about that object once more |
| wrong image | 2/5 N | questions of `test` and the default prompt about another scene's picture: what needs no seeing |
| captions, default prompt | N and 3/5 N | every word right (in either wording), and attribute words in their slots |
| captions, each other style | 3/10 N each | the same |

No description of a `test` scene occurs in training, by how scenes are dealt out (`world.split_of`): every exact caption
in `full` or `short` is one that was never trained on. The other styles leave so much out that their answers recur.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from hooked_mm.hooked import HookedMM
from hooked_mm.scenes.captions import CAPTION_PROMPT, STYLES, WORDINGS, right_captions
from hooked_mm.scenes.dataset import picture
from hooked_mm.scenes.language import DESCRIBED, attribute_words
from hooked_mm.scenes.questions import QUESTION_TYPES, Question, questions
from hooked_mm.scenes.world import HELD_OUT, SPLITS, Scene, Split, scene
from hooked_mm.small.accuracy import FILE, HELD_OUT_OBJECT, Accuracy, Captions, Share

BATCH = 128
CAPTION_TOKENS = 48
"""The longest right caption has 39 words and an end."""


@dataclass(frozen=True)
class Asked:
    """A prompt about a picture; `tokens`: how many a right answer and its end take."""

    image: Image.Image
    text: str
    tokens: int


def answers(model: HookedMM, asked: Sequence[Asked], what: str) -> list[str]:
    """Greedy answers, in the order asked. Pictures of one size and answers of one length go together, for speed."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, one in sorted(enumerate(asked), key=lambda pair: len(pair[1].text.split())):
        groups[one.image.size, one.tokens].append(number)
    parts = [rows[start : start + BATCH] for rows in groups.values() for start in range(0, len(rows), BATCH)]
    said = [""] * len(asked)
    with tqdm(total=len(asked), desc=what, unit="prompt") as bar:
        for rows in parts:
            batch = model.prepare([asked[row].image for row in rows], [asked[row].text for row in rows])
            for row, text in zip(rows, model.generate(batch, asked[rows[0]].tokens).text, strict=True):
                said[row] = text
            bar.update(len(rows))
    return said


def strangers(scenes: Sequence[Scene], split: Split, seed: int) -> list[Scene]:
    """For each of a split's first scenes another one of the same canvas: the next ones of the split, each used once.

    The canvas stays, so that neither the size of the picture nor what is likely on such a canvas gives the change away.
    """
    stock: dict[tuple[int, int], list[Scene]] = defaultdict(list)
    found, index = [], len(scenes)
    for item in scenes:
        canvas = (item.width, item.height)
        while not stock[canvas]:
            other = scene(split, index, seed)
            stock[other.width, other.height].append(other)
            index += 1
        found.append(stock[canvas].pop())
    return found


def offered(question: Question) -> str:
    """The question's type with what its wording leaves open: a relation is asked on one of two axes."""
    return f"{question.type} {question.answer in ('above', 'below')}" if question.type == "relation" else question.type


def constant_answer(asked: Iterable[Question]) -> dict[str, Share]:
    """Per question type, what one answer for all questions that offer the same choice gets at best."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in asked:
        counts[question.type, offered(question)][question.answer] += 1
    found: dict[str, Share] = defaultdict(lambda: Share(0, 0))
    for (kind, _), said in counts.items():
        found[kind] += Share(max(said.values()), said.total())
    return {kind: found[kind] for kind in QUESTION_TYPES}


def means_held_out(question: Question) -> bool:
    """Whether a question is about an object with a held-out pair, or names one that is there ("is there a ...")."""
    if question.about is not None:
        return question.about.held_out
    words = attribute_words(question.text)
    pair = question.type == "is there a pair" and question.answer == "yes"
    return pair and HELD_OUT.get(words["shapes"][0]) == words["colours"][0]


def count_right(asked: Sequence[Question], said: Sequence[str]) -> dict[str, Share]:
    """Per question type, how many were answered as they should be."""
    found = {kind: Share(0, 0) for kind in QUESTION_TYPES}
    for question, answer in zip(asked, said, strict=True):
        found[question.type] += Share(int(answer == question.answer), 1)
    return found


def slots(said: str, true: str) -> dict[str, Share]:
    """Per word class that the true caption names: attribute words that stand in the same slot of the other one.

    A slot is a word's number among those of its class; saying more words than there are slots adds wrong ones.
    """
    found, wanted = attribute_words(said), attribute_words(true)
    return {
        name: Share(
            sum(a == b for a, b in zip(found[name], wanted[name], strict=False)),
            max(len(wanted[name]), len(found[name])),
        )
        for name in DESCRIBED
        if wanted[name]
    }


def count_captions(scenes: Sequence[Scene], said: Sequence[str], style: str) -> Captions:
    """How many captions are right, in which wording, and what of the others is."""
    exact, wordings = Share(0, 0), dict.fromkeys(WORDINGS if style == "any" else [style], 0)
    attributes: dict[str, Share] = {}
    for item, text in zip(scenes, said, strict=True):
        right = right_captions(item, style)
        exact += Share(int(text in right), 1)
        if text in right:
            wordings[list(wordings)[right.index(text)]] += 1
        for name, share in slots(text, right[0]).items():
            attributes[name] = attributes.get(name, Share(0, 0)) + share
    return Captions(exact, wordings, {name: attributes[name] for name in DESCRIBED if name in attributes})


class _Exam:
    """The scenes of a split with their pictures and a question of every type, made once."""

    def __init__(self, model: HookedMM, split: Split, count: int, seed: int) -> None:
        self.model, self.split = model, split
        self.scenes = [scene(split, index, seed) for index in range(count)]
        self.pictures = [picture(item) for item in self.scenes]
        self.asked = [
            (number, question)
            for number, item in enumerate(self.scenes)
            for question in questions(item, np.random.default_rng([SPLITS.index(split), seed, number, 99]))
        ]

    def questions(self, shown: Sequence[Image.Image], what: str) -> tuple[list[Question], list[str]]:
        """The questions of as many scenes as pictures are shown, and what is answered when these are seen."""
        asked = [(number, question) for number, question in self.asked if number < len(shown)]
        prompts = [Asked(shown[number], q.text, len(q.answer.split()) + 1) for number, q in asked]
        return [question for _, question in asked], answers(self.model, prompts, what)

    def captions(self, count: int) -> dict[str, Captions]:
        """Every style on the first `count` scenes; the default prompt on all."""
        found = {}
        for style, described in STYLES.items():
            scenes = self.scenes if style == "any" else self.scenes[:count]
            prompts = [Asked(image, described.prompt, CAPTION_TOKENS) for image in self.pictures[: len(scenes)]]
            said = answers(self.model, prompts, f"{self.split}: captions, {style}")
            found[style] = count_captions(scenes, said, style)
        return found


def measure(model: HookedMM, scenes: int = 500, seed: int = 0) -> Accuracy:
    """Ask a loaded model; see the table above, where N is `scenes`.

    Args:
        model: With its processor.
        scenes: At least one.
        seed: Of the scenes.
    """
    test, unseen = _Exam(model, "test", scenes, seed), _Exam(model, "unseen", -(-scenes * 3 // 5), seed)
    found = {exam.split: exam.questions(exam.pictures, f"{exam.split}: questions") for exam in (test, unseen)}
    right = {split: count_right(*both) for split, both in found.items()}
    about = [(q, said) for q, said in zip(*found["unseen"], strict=True) if means_held_out(q)]
    held_out = count_right([question for question, _ in about], [said for _, said in about])
    others = strangers(test.scenes, "test", seed)[: -(-scenes * 2 // 5)]
    shown = [picture(item) for item in others]
    asked, said = test.questions(shown, "test: questions, wrong image")
    prompts = [Asked(image, CAPTION_PROMPT, CAPTION_TOKENS) for image in shown]
    told = answers(model, prompts, "test: captions, wrong image")
    styled = -(-scenes * 3 // 10)
    return Accuracy(
        seed=seed,
        questions={
            **{str(split): shares for split, shares in right.items()},
            HELD_OUT_OBJECT: {kind: share for kind, share in held_out.items() if share.of},
        },
        wrong_image=count_right(asked, said),
        wrong_image_captions=count_captions(test.scenes[: len(told)], told, "any").exact,
        chance=constant_answer(asked),
        captions={exam.split: exam.captions(styled) for exam in (test, unseen)},
    )


def evaluate(folder: str | Path, scenes: int = 500, seed: int = 0) -> Accuracy:
    """`measure` for a saved model, through its real processor, in float32 arithmetic."""
    # What hook points mean plays no part here.
    return measure(HookedMM.from_pretrained(folder, dtype="float32", check=False), scenes, seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a saved model and write it down."""
    parser = argparse.ArgumentParser(prog="python -m hooked_mm.small.evaluate", description=evaluate.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--output", type=Path, help=f"default: FOLDER/{FILE}")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)  # small batches of small matrices: more threads only wait for each other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(chosen.folder, chosen.scenes, chosen.seed)
    (chosen.output or chosen.folder / FILE).write_text(result.to_json())


if __name__ == "__main__":
    main()
