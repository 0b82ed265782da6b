"""What steering does, over layers x alphas x vectors, or for settings that are given, with controls and intervals.

    hooked-mm steer sweep --model.id small:llava --vectors runs/vectors \\
        --task AnswerTask --task.source red --task.target blue --task.types '[colour]' \\
        --data ScenesDataModule --data.size 60 --data.task questions --data.split validation \\
        --test ScenesDataModule --test.size 60 --test.task questions \\
        --alphas '[0.5, 1, 2]' --output runs/sweep
    tensorboard --logdir runs/sweep

A sweep chooses among all settings by the samples of `--data` and says what the chosen one, the Pareto front and the
controls do to those of `--test`; `hooked-mm steer evaluate` says it of every vector at every alpha, for the samples of
`--data`. Controls and gates are found among the vectors by their kind. Everything can stand in a YAML file
(`-c sweep.yaml`; `--print_config` writes one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from hooked_mm.data import SampleDataModule
from hooked_mm.extract_command import instantiated
from hooked_mm.extraction_job import quiet
from hooked_mm.pair_extraction import Once
from steering.command_options import (
    Given,
    add_run_options,
    answering,
    check_output,
    facts_of,
    first_alone,
    given,
    keep,
    keep_counts,
    new_parser,
    told_apart,
)
from steering.grid import Grid
from steering.setting import ANSWERING
from steering.sweeping import evaluate, sweep
from steering.tasks import Task


def build_parser() -> ArgumentParser:
    """The options of a sweep."""
    parser = new_parser("sweep", __doc__)
    parser.add_subclass_arguments(Task, "task", required=True)
    parser.add_subclass_arguments(SampleDataModule, "data", required=True, help="samples to choose by")
    parser.add_subclass_arguments(SampleDataModule, "test", required=True, help="other samples, to report")
    parser.add_class_arguments(Grid, None)
    _add_measuring(parser)
    add_run_options(parser)
    return parser


def build_evaluate_parser() -> ArgumentParser:
    """The options of an evaluation."""
    parser = new_parser("evaluate", "What given settings do: effect, damage, intervals, controls")
    parser.add_subclass_arguments(Task, "task", required=True)
    parser.add_subclass_arguments(SampleDataModule, "data", required=True, help="the samples")
    setting = parser.add_argument_group("settings: every vector at every alpha")
    setting.add_argument("--alphas", type=list[float], default=[1.0], help="how much")
    setting.add_argument("--at", type=str, default=ANSWERING, help="where, see steering.setting.positions")
    setting.add_argument("--operation", type=str, default="add", help="how, see the table in steering.setting")
    setting.add_argument("--gated", type=bool, default=False, help="only samples that a gate opens for")
    _add_measuring(parser)
    add_run_options(parser)
    return parser


def _add_measuring(parser: ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=2, help="random controls of a setting")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap intervals")


def _begin(made: Any, *data: SampleDataModule) -> Given:
    """Refuse what can't be before a model is loaded, and make the folder."""
    chosen = told_apart(given(made))
    for one in data:
        one.check()
    check_output(made.output, made.resume)
    return chosen


def _shared(made: Any) -> dict[str, Any]:
    """What a sweep and an evaluation are both told."""
    names = ("seeds", "seed", "resume", "on_error")
    return {**{name: made[name] for name in names}, "options": answering(made), **made.trainer}


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm steer sweep`."""
    quiet()
    made = instantiated(build_parser(), argv)
    chosen = _begin(made, made.data, made.test)
    result = sweep(
        Once.of(made.model),
        [*chosen.vectors, *chosen.controls],
        made.task,
        made.data,
        made.test,
        made.output,
        grid=Grid(**{name: made[name] for name in Grid.__dataclass_fields__}),
        gates=chosen.gates,
        facts=facts_of(made, chosen, made.test),
        **_shared(made),
    )
    if first_alone():
        keep_counts(result, made.output, made.task.type_column)
        keep(result, made.output, made.test)


def evaluate_main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm steer evaluate`."""
    quiet()
    made = instantiated(build_evaluate_parser(), argv)
    chosen = _begin(made, made.data)
    grid = Grid(made.alphas, (made.at,), (made.operation,), (made.gated,))
    result = evaluate(
        Once.of(made.model),
        grid.settings(chosen.vectors, chosen.gates),
        made.task,
        made.data,
        made.output,
        shuffled=chosen.controls,
        facts=facts_of(made, chosen, made.data),
        **_shared(made),
    )
    if first_alone():
        keep_counts(result, made.output, made.task.type_column)
        keep(result, made.output, made.data)
