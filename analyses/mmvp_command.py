"""MMVP: pairs of pictures that look alike to CLIP, one question, opposite answers; right only if both answers are.

    hooked-mm analyse mmvp --model.id llava-hf/llava-1.5-7b-hf --model.dtype bfloat16 --device cuda \\
        --data.folder MMVP --data.template llava-choice --output runs/mmvp

The folder is the benchmark as downloaded: `Questions.csv` and `MMVP Images`. `--grade letters` compares the
log-probabilities of "(a)" and "(b)", `options` those of the options' own words, `parsed` reads a generated answer.
Writes `answers.csv`, one row per question.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from analyses.frame import finish, new_parser, parsed
from analyses.mmvp_protocol import Ask, Grade, Graded, graded_questions, pair_scores, questions_of
from analyses.model_samples import loaded
from analyses.result import Result, Score
from hooked_mm.datasets.mmvp import Mmvp
from hooked_mm.intervals import bootstrap
from hooked_mm.loading import OnError
from hooked_mm.reader import ModelSource


def scores(graded: Sequence[Graded], draws: int, seed: int) -> tuple[list[Score], list[str]]:
    """The protocol's scores with intervals over pairs, and what a reader must know.

    Args:
        graded: The questions with what was answered.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    found, made = pair_scores(graded), []
    about = {"rows": 2 * len(found.pairs), "samples": len(found.pairs), "left_out": found.left_out}
    for name, which in (("pairs right", "pairs"), ("answers right", "singles"), ("same letter for both", "alike")):
        value, low, high = map(float, found.interval(which, draws, seed))
        made.append(Score(name, "all", None, value, low, high, **about))
    said = torch.tensor([one.said == sorted(one.question.options)[0] for one in graded]).double()
    value, low, high = map(float, bootstrap(said, draws=draws, seed=seed))
    made.append(Score("first letter of the alphabet", "all", None, value, low, high, len(graded), len(graded)))
    lost = sum(one.said is None for one in graded)
    notes = [f"right: {found.told()}", f"{lost} of {len(graded)} answers give no letter, and count as wrong"]
    if found.left_out:
        notes.append(f"{found.left_out} questions count for nothing: the other one of their pair could not be asked")
    return made, notes


def write_answers(path: Path, graded: Sequence[Graded]) -> None:
    """One row per question: what is right, what was said, the options' log-probabilities or the generated text."""
    letters = sorted({letter for one in graded for letter in one.question.options})
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "index",
                "pair",
                "question",
                "options",
                "answer",
                "said",
                "right",
                *(f"log p {x}" for x in letters),
                "text",
            ]
        )
        for one in graded:
            asked = one.question
            known = [one.scores.get(letter, "") for letter in letters]
            shown = [asked.index, asked.pair, asked.text, asked.offered, asked.answer, one.said or "", int(one.right)]
            writer.writerow([*shown, *known, one.text])


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm analyse mmvp`."""
    parser = new_parser("mmvp", __doc__)
    parser.add_argument("--model", type=ModelSource, required=True, help="the model to ask")
    parser.add_class_arguments(Mmvp, "data", help="the benchmark, or some pairs of it")
    parser.add_argument("--grade", type=Grade, default="letters", help="how an answer is read")
    parser.add_argument("--ask", type=Ask, default="question and options", help="what the prompt is")
    parser.add_argument("--fix_labels", action="store_true", help="put known errors of the published labels right")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="of generated answers")
    parser.add_argument("--on_error", type=OnError, default="skip", help="list a bad question and go on, or stop")
    parser.add_argument("--device", type=str, default="cpu", help="where the model runs: cuda, cuda:1, ...")
    parser.add_argument("--name", type=str | None, help="what to call the model in tables and plots")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap, over pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    made: Any = parsed(parser, argv)
    made.data.check()
    questions = questions_of(made.data, fix_labels=made.fix_labels)
    graded, skipped = graded_questions(
        loaded(made),
        questions,
        made.grade,
        ask=made.ask,
        max_new_tokens=made.max_new_tokens,
        batch_size=made.data.batch_size,
        on_error=made.on_error,
    )
    found, notes = scores(graded, made.draws, made.seed)
    if len(graded) < len(questions):
        notes.append(f"{len(questions) - len(graded)} questions were left out ({'; '.join(skipped[:3])})")
    settings = {name: made[name] for name in ("grade", "ask", "fix_labels", "max_new_tokens", "draws", "seed")}
    result = Result("mmvp", made.name or made.model.name, found, {**settings, "data": made.data.describe()}, notes)
    write_answers(made.output / "answers.csv", graded)
    finish(result, made.output)
