"""What a model says with steering vectors added, beside what it says without: to a data set, or to a few prompts.

    hooked-mm steer apply --model.id small:llava --vectors runs/vectors --names 'red -> blue' --alpha 1.5 \\
        --image scene.png --prompt 'what colour is the circle ?' --output runs/steered
    hooked-mm steer apply --model.id small:llava --vectors runs/vectors --names '[red -> blue, yes -> no]' \\
        --alpha '[1.5, 0.5]' --data ScenesDataModule --data.task questions --output runs/steered

Several vectors act at the same time. Everything can stand in a YAML file (`-c apply.yaml`; `--print_config` writes
one).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from hooked_mm.data import Sample, SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.extract_command import instantiated
from hooked_mm.extraction_job import quiet
from steering.command_options import (
    Given,
    add_run_options,
    answering,
    called,
    check_output,
    first_alone,
    given,
    new_parser,
)
from steering.grid import Grid
from steering.setting import ANSWERING, Setting
from steering.steered_answers import Answers, answer
from steering.sweep_result import write_rows


class Prompts(SampleDataModule):
    """A few prompts with pictures: as many of each, or one for all.

    Args:
        prompts: What is asked.
        images: Paths; none asks without a picture.
        batch_size: Samples per batch at most.

    Raises:
        BadInputError: If their numbers do not fit.
    """

    def __init__(self, prompts: list[str], images: list[str] | None = None, batch_size: int = 32) -> None:
        self.prompts, self.images = prompts, images or []
        counts = {len(prompts), len(self.images) or 1}
        if not prompts or len(counts - {1}) > 1:
            raise BadInputError(
                f"{len(prompts)} prompts and {len(self.images)} images; give as many of each, or one for all"
            )
        asked = prompts * (max(counts) // len(prompts))
        files: list[str | None] = [*self.images] or [None]
        shown = files * (max(counts) // len(files))
        super().__init__([Sample(str(n), shown[n], asked[n]) for n in range(max(counts))], batch_size)

    def check(self) -> None:
        """Refuse files that are not there."""
        for path in self.images:
            if not Path(path).is_file():
                raise BadInputError(f"image {path!r} does not exist; check the path")

    def describe(self) -> dict[str, Any]:
        """What is asked about which files."""
        return {**super().describe(), "prompts": self.prompts, "images": self.images}


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = new_parser("apply", __doc__)
    parser.add_subclass_arguments(SampleDataModule, "data", required=False, help="the samples")
    asked = parser.add_argument_group("instead of samples")
    asked.add_argument("--image", type=str | list[str], default=[], help="a picture's file; once or several times")
    asked.add_argument("--prompt", type=str | list[str], default=[], help="what is asked, for each picture or for all")
    setting = parser.add_argument_group("setting: all chosen vectors at the same time")
    setting.add_argument("--alpha", type=float | list[float], default=1.0, help="how much, of all or of each")
    setting.add_argument("--at", type=str, default=ANSWERING, help="where, see steering.setting.positions")
    setting.add_argument("--operation", type=str, default="add", help="how, see the table in steering.setting")
    setting.add_argument("--gated", type=bool, default=False, help="only samples that the gate opens for")
    parser.add_argument("--shown", type=int, default=5, help="how many answers to print")
    add_run_options(parser)
    return parser


def repeated(arguments: Sequence[str]) -> list[str]:
    """Arguments whose options, where given again, are added to what was given: `--prompt+`, as jsonargparse has it."""
    seen: set[str] = set()
    found = []
    for argument in arguments:
        name, sign, value = argument.partition("=")
        again = name in ("--image", "--prompt") and name in seen
        seen.add(name)
        found.append(f"{name}+{sign}{value}" if again else argument)
    return found


def setting_of(chosen: Given, alpha: float | Sequence[float], at: str, operation: str, gated: bool) -> Setting:
    """All vectors at the same time.

    Args:
        chosen: The vectors, and gates.
        alpha: One for all, or one for each in their order.
        at: Where.
        operation: How.
        gated: Whether samples must pass the gate.

    Raises:
        BadInputError: If alphas do not fit, no gate or more than one could be meant, and as `Setting`.
    """
    vectors = chosen.vectors
    names = ", ".join(f"{called(vector)!r} at {vector.hook}" for vector in vectors)
    alphas = [float(alpha)] * len(vectors) if isinstance(alpha, int | float) else list(alpha)
    if len(alphas) != len(vectors):
        raise BadInputError(f"{len(alphas)} alphas for {len(vectors)} vectors ({names}); give one for all, or one each")
    parts = []
    for vector, amount in zip(vectors, alphas, strict=True):
        fitting = Grid((1.0,), (at,), (operation,), (gated,)).settings([vector], chosen.gates)
        if len(fitting) > 1:
            gates = [one.gate.name for one in fitting if one.gate is not None]
            raise BadInputError(f"the gates {gates} could all be meant; choose one with --gates")
        parts.append(replace(fitting[0], alpha=amount))
    return replace(parts[0], also=tuple(parts[1:]))


def rows_of_answers(answers: Answers) -> list[dict[str, Any]]:
    """A row per sample: what was asked, and said without and with steering."""
    before, after = answers.texts
    return [
        {
            "sample": sample["sample"],
            "prompt": sample["prompt"],
            "reference": sample["answer"],
            "before": said,
            "after": steered,
            "changed": said != steered,
        }
        for sample, said, steered in zip(answers.samples, before, after, strict=True)
    ]


def asked_of(made: Any) -> SampleDataModule:
    """The samples.

    Raises:
        BadInputError: If there are none, or of both sorts.
    """
    prompts, images = ([one] if isinstance(one, str) else one for one in (made.prompt, made.image))
    if (made.data is None) == (not prompts):
        raise BadInputError("what is asked? give --data, or --prompt (with --image), and not both")
    if made.data is not None and images:
        raise BadInputError("--image is given beside --data, which has pictures of its own; leave one of them out")
    return made.data if made.data is not None else Prompts(prompts, images)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm steer apply`."""
    quiet()
    made = instantiated(build_parser(), repeated(sys.argv[1:] if argv is None else argv))
    data, chosen = asked_of(made), given(made)
    if made.names == made.hooks == made.kinds == "*" and len(chosen.vectors) > 1:
        names = ", ".join(dict.fromkeys(map(called, chosen.vectors)))
        raise BadInputError(
            f"there are {len(chosen.vectors)} vectors ({names}), which would all act at the same time; choose with "
            "--names, --kinds and --hooks ('*' among several globs for all)"
        )
    setting = setting_of(chosen, made.alpha, made.at, made.operation, made.gated)
    data.check()
    folder = check_output(made.output, made.resume)
    shared = {"resume": made.resume, "on_error": made.on_error, "options": answering(made)}
    answers = answer(made.model, data, [setting], folder / "answers", **shared, **made.trainer)
    if not first_alone():
        return
    rows = rows_of_answers(answers)
    write_rows(rows, folder / "answers.csv")
    for part in setting.parts:
        vector, gate = "{vector} ({kind}) at {hook}".format(**part.describe()), part.gate
        how = [f"alpha {part.alpha:g}", part.at, part.operation, *([f"gate {gate.name}"] if gate else [])]
        print(f"{vector}, {', '.join(how)}")
    for row in sorted(rows, key=lambda row: not row["changed"])[: made.shown]:
        print(f"\n{row['sample']}: {row['prompt']}\n  before: {row['before']}\n  after:  {row['after']}")
    print(f"\n{sum(row['changed'] for row in rows)} of {len(rows)} answers changed\n{folder / 'answers.csv'}")
