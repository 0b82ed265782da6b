"""What the commands that steer share: options, saved vectors and what is chosen of them, the folder of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from PIL import Image

import hooked_mm.datasets
import hooked_mm.scenes.dataset  # noqa: F401  (data modules are offered by name)
from hooked_mm.data import SampleDataModule
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.loading import OnError
from hooked_mm.prepare import load_images
from hooked_mm.processes import goes_on_alone
from hooked_mm.reader import ModelSource
from hooked_mm.run_output import output_folder
from hooked_mm.runner import match_names
from hooked_mm.steering_vector import SteeringVector, last_part
from hooked_mm.store import ActivationStore
from hooked_mm.vector_hub import vectors_from_hub
from steering.answer_tables import accuracy_by_type, answer_changes, transitions_of
from steering.controls import is_control
from steering.gate import Gate, gates_of
from steering.steered_answers import Answers, SteeredAnswers
from steering.sweep_report import write_html, write_tensorboard
from steering.sweep_result import SweepResult, write_rows
from steering.sweep_tables import front_table, write_csv

Globs = str | list[str]


@dataclass(frozen=True)
class Given:
    """What folders or repositories of vectors hold, as far as it is chosen.

    Attributes:
        vectors: Those that are to steer.
        controls: Of vectors, whichever are chosen.
        gates: For samples to pass.
    """

    vectors: list[SteeringVector]
    controls: list[SteeringVector]
    gates: list[Gate]


def new_parser(command: str, doc: str | None) -> ArgumentParser:
    """A parser with the model and the vectors; the description is the first line of a module's text."""
    described = (doc or "").split("\n")[0]
    parser = ArgumentParser(prog=f"hooked-mm steer {command}", description=described, default_env=False)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_class_arguments(ModelSource, "model")
    vectors = parser.add_argument_group("vectors")
    vectors.add_argument(
        "--vectors",
        type=str | list[str],
        required=True,
        help="folders or hub names of vectors, their controls, and gates",
    )
    vectors.add_argument("--hooks", type=Globs, default="*", help="which of them, by hook; globs, all")
    vectors.add_argument("--names", type=Globs, default="*", help="which of them, by name; globs, all")
    vectors.add_argument("--kinds", type=Globs, default="*", help="which of them, by kind; globs, all")
    vectors.add_argument("--gates", type=Globs, default="*", help="which gates, by name; globs, all")
    return parser


def add_run_options(parser: ArgumentParser) -> None:
    """How answers are made, and where everything goes."""
    parser.add_class_arguments(SteeredAnswers, None, skip={"model", "settings"})
    run = parser.add_argument_group("run")
    run.add_argument("--on_error", type=OnError, default="skip", help="list a bad sample and go on, or stop")
    run.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    run.add_argument("--trainer", type=dict[str, Any], default={}, help="of Lightning: {devices: 8, strategy: ddp}")
    run.add_argument("--output", type=Path, required=True, help="a folder for answers, tables and pages")


def answering(made: Any) -> dict[str, Any]:
    """The options of `SteeredAnswers`."""
    names = ("max_new_tokens", "answer_prefix", "rows", "side_effects", "surprise", "max_positions", "force")
    return {name: made[name] for name in names}


def sources_of(made: Any) -> list[str]:
    """The folders and hub names of vectors."""
    return [made.vectors] if isinstance(made.vectors, str) else made.vectors


def given(made: Any) -> Given:
    """The vectors, controls and gates that options choose.

    Raises:
        BadInputError: If there are no vectors there, or none to steer with, a name matches nothing, or a vector is one
            of another model than the one that is asked for.
        UnknownHookError: If a hook matches nothing.
    """
    sources = sources_of(made)
    found = [vector for source in sources for vector in vectors_from_hub(source)]
    real = [vector for vector in found if vector.kind != "gate" and not is_control(vector)]
    where = ", ".join(sources)
    if not real:
        raise BadInputError(
            f"there are {len(found)} vectors in {where}, but all are controls or gates; add a folder with a vector to "
            "steer with"
        )
    hooks = match_names(made.hooks, [vector.hook for vector in real])
    at_hooks = [vector for vector in real if vector.hook in hooks]
    names = matching(made.names, map(called, at_hooks), "steering vector")
    gates = gates_of(found)
    opening = matching(made.gates, [gate.name for gate in gates], "gate") if gates or made.gates != "*" else []
    named = [vector for vector in at_hooks if called(vector) in names]
    kinds = matching(made.kinds, [vector.kind for vector in named], "kind among these vectors")
    chosen = [vector for vector in named if vector.kind in kinds]
    if not made.force:
        check_owner([*chosen, *(vector for vector in found if vector.kind == "gate")], made.model)
    return Given(chosen, [v for v in found if is_control(v)], [gate for gate in gates if gate.name in opening])


def told_apart(chosen: Given) -> Given:
    """Vectors of one name but several kinds called by both, with their controls: tables go by names."""
    kinds: dict[str, set[str]] = {}
    for vector in chosen.vectors:
        kinds.setdefault(vector.name, set()).add(vector.kind)

    def new_name(name: str, kind: str) -> str:
        return f"{name} ({kind})" if name and len(kinds.get(name, ())) > 1 else name

    def renamed(control: SteeringVector) -> SteeringVector:
        of = control.made_from.get("control_of") or {}
        old = str(of.get("name", ""))
        if (new := new_name(old, str(of.get("kind")))) == old:
            return control
        made_from = {**control.made_from, "control_of": {**of, "name": new}}
        return replace(
            control, name=control.name.replace(f" for {old}, seed", f" for {new}, seed"), made_from=made_from
        )

    vectors = [replace(vector, name=new_name(vector.name, vector.kind)) for vector in chosen.vectors]
    return replace(chosen, vectors=vectors, controls=[renamed(control) for control in chosen.controls])


def called(vector: SteeringVector) -> str:
    """Its name, as tables have it."""
    return vector.name or vector.kind


def matching(globs: Globs, names: Iterable[str], what: str) -> list[str]:
    """The names that are given or match a glob.

    Raises:
        BadInputError: If one matches nothing.
    """
    known = list(dict.fromkeys(names))
    found: list[str] = []
    for one in [globs] if isinstance(globs, str) else globs:
        own = [name for name in known if name == one] or [name for name in known if fnmatchcase(name, one)]
        if not own:
            raise unknown(what, one, known)
        found += own
    return list(dict.fromkeys(found))


def check_owner(vectors: Sequence[SteeringVector], source: ModelSource) -> None:
    """Refuse vectors of another model before one is loaded, as far as they tell; see `SteeringVector.check_model`.

    Raises:
        BadInputError: It names both models.
    """
    for vector in vectors:
        if vector.model and last_part(vector.model) != last_part(source.id):
            raise BadInputError(
                f"the steering vector {called(vector)!r} is one of the model {vector.model!r}, the model is to be "
                f"{source.id!r}; make it for this model, or pass --force true"
            )


def check_output(folder: Path, resume: bool) -> Path:
    """The folder of a run, made.

    Raises:
        BadInputError: If it holds something that the run does not go on with, or can't be made.
    """
    if not resume and folder.is_dir() and (there := sorted(file.name for file in folder.iterdir())):
        raise BadInputError(
            f"{str(folder)!r} already holds {', '.join(there[:5])}; pass --resume to go on with a run that was cut "
            "off, or choose another folder"
        )
    return output_folder(folder)


def first_alone() -> bool:
    """Whether this process is the one that writes and prints, now that all have answered."""
    # Processes that were started from outside and found every answer there have never met.
    return goes_on_alone() and not int(os.environ.get("RANK", "0"))


def facts_of(made: Any, chosen: Given, data: SampleDataModule) -> list[tuple[str, str]]:
    """What stands on top of tables and pages."""
    source = made.model
    told = [f"{len(chosen.vectors)} of {', '.join(sources_of(made))}"]
    told += [f"{len(chosen.gates)} gates"] if chosen.gates else []
    about = ", ".join(
        f"{name} {value}".removeprefix("name ") for name, value in data.describe().items() if value is not None
    )
    return [
        ("model", source.id + (f" with {source.adapter}" if source.adapter else "")),
        ("vectors", ", ".join(told)),
        ("test data", about),
        ("seed", str(made.seed)),
    ]


def keep(result: SweepResult, folder: Path, data: SampleDataModule) -> None:
    """Write tables, page and TensorBoard's files, and print what was found.

    Args:
        result: To keep.
        folder: Of the run.
        data: The samples that examples are of.
    """
    # Tables first: pictures may be gone.
    result.save(folder)
    write_csv(result, folder)
    print(f"\n{front_table(result, 'test')}\n{folder / 'settings.csv'}, front.csv, sweep.json", flush=True)
    pictures = {example["picture"]: pictures_of(data, example["picture"]) for example in result.examples}
    # Samples without a picture are shown without one.
    examples = [{**one, "picture": one["picture"] if pictures[one["picture"]] else None} for one in result.examples]
    write_html(replace(result, examples=examples), folder / "report.html", pictures=lambda n: pictures[n][0])
    # A run that was cut off has left its own there, which would be shown as the same run.
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    write_tensorboard(result, folder / "tensorboard")
    print(f"{folder / 'report.html'}\ntensorboard --logdir {folder}")


def keep_counts(result: SweepResult, folder: Path, type_column: str) -> None:
    """Write what was said on test, counted: `types.csv`, `counts.csv`, `transitions.csv`.

    Args:
        result: Whose settings they are of.
        folder: Of the run, with the answers to the test samples in `test`.
        type_column: Which of the samples' columns says of which type they are.
    """
    said, numbers = Answers.of(ActivationStore.open(folder / "test")), [row["setting"] for row in result.of("test")]
    write_rows(accuracy_by_type(said, numbers, type_column), folder / "types.csv")
    write_rows(answer_changes(said, numbers), folder / "counts.csv")
    write_rows(transitions_of(said, numbers), folder / "transitions.csv")


def pictures_of(data: SampleDataModule, number: int) -> list[Image.Image]:
    """Those of a sample."""
    return load_images(data.dataset[number].images)
