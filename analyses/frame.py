"""What the commands of `hooked-mm analyse` share: rows of a store or of a model and data, options, results.

Rows come from `--store`, or from `--model.id` and `--data`: these are extracted first, on any number of processes, into
`OUTPUT/store`, where a run that was cut off goes on by the same command with `--resume`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

import hooked_mm.datasets
import hooked_mm.scenes.dataset  # noqa: F401  (data modules are offered by name)
from analyses.layers import MODALITIES, STREAM, Layers
from analyses.result import RESULT, Result
from hooked_mm.data import SampleDataModule
from hooked_mm.errors import BadInputError
from hooked_mm.extract_command import instantiated
from hooked_mm.extraction import Extractor
from hooked_mm.extraction_job import extract, quiet, quiet_trainer
from hooked_mm.loading import OnError
from hooked_mm.processes import Processes
from hooked_mm.reader import ModelSource
from hooked_mm.run_output import output_folder
from hooked_mm.selectors import EachOf, Selector
from hooked_mm.store import ActivationStore
from hooked_mm.store_format import read_manifest

T = TypeVar("T")


def new_parser(name: str, doc: str | None) -> ArgumentParser:
    """A parser for `hooked-mm analyse NAME`; the description is the first line of a module's text."""
    described = (doc or "").split("\n")[0]
    parser = ArgumentParser(prog=f"hooked-mm analyse {name}", description=described, default_env=False)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_argument("--output", type=Path, required=True, help="a folder for tables and pictures")
    return parser


def add_rows(parser: ArgumentParser, hooks: Sequence[str] = STREAM, selector: Selector | None = None) -> None:
    """Options for the rows of an analysis: a store, or what to extract.

    Args:
        parser: Of the command.
        hooks: What to extract unless told.
        selector: Which positions to extract unless told; every one, with its token.
    """
    rows = parser.add_argument_group("rows: a store, or a model and data to extract it from")
    rows.add_argument("--store", type=Path | None, help="a store of rows at several layers")
    rows.add_argument("--where", type=dict[str, Any], default={}, help="conditions on rows: {role: answer}")
    rows.add_argument("--model", type=ModelSource | None, help="the model to extract from")
    parser.add_subclass_arguments(SampleDataModule, "data", required=False)
    rows.add_argument("--hooks", type=str | list[str], default=list(hooks), help="what to extract")
    rows.add_argument(
        "--selector", type=Selector, default=selector or EachOf(tokens=True), help="which positions are rows"
    )
    rows.add_argument("--answer", type=Literal["generated", "given", "none"], default="none", help="behind the prompt")
    rows.add_argument("--max_new_tokens", type=int, default=40, help="of generated answers")
    rows.add_argument("--max_positions", type=int | None, help="about so many positions in a batch at most")
    rows.add_argument("--on_error", type=OnError, default="skip", help="list a bad sample and go on, or stop")
    rows.add_argument("--resume", action="store_true", help="go on with an extraction that was cut off")
    rows.add_argument(
        "--trainer", type=dict[str, Any], default={}, help="of Lightning: {accelerator: gpu, devices: 8, strategy: ddp}"
    )
    rows.add_argument("--name", type=str | None, help="what to call the model in tables and plots")


def add_layers(parser: ArgumentParser) -> None:
    """Options for scores over layers."""
    scores = parser.add_argument_group("scores")
    scores.add_argument("--modalities", type=list[str], default=list(MODALITIES), help="of rows, side by side")
    scores.add_argument("--layers", type=list[int] | None, help="only these; all unless given")
    scores.add_argument("--point", type=str, default="resid", help="the stream, or another point: hook_attn_out, ...")
    scores.add_argument("--draws", type=int, default=200, help="of the bootstrap, over samples; 0 for no bands")
    scores.add_argument("--seed", type=int, default=0, help="of everything that is left to chance")


def parsed(parser: ArgumentParser, argv: Sequence[str] | None) -> Any:
    """The options as objects, and an output folder that holds no result yet.

    Raises:
        BadInputError: If it holds one.
    """
    quiet()
    made = instantiated(parser, argv)
    if (made.output / RESULT).exists():
        raise BadInputError(f"{str(made.output)!r} already holds a result; choose another folder, or remove it")
    output_folder(made.output)
    return made


def opened(made: Any) -> ActivationStore:
    """The store that options name, or that is extracted as they say, in every process.

    Raises:
        BadInputError: If both or neither are given.
        StoreError: If a cut-off extraction is there and `--resume` was not given.
    """
    given = made.model is not None or made.data is not None
    if (made.store is None) == (not given) or (given and (made.model is None or made.data is None)):
        raise BadInputError("give --store, or --model.id and --data; one of the two")
    if made.store is not None:
        return ActivationStore.open(made.store).where(**made.where)
    path = made.output / "store"
    if made.resume and (path / "manifest.json").is_file() and read_manifest(path)["complete"]:
        return ActivationStore.open(path).where(**made.where)
    extractor = Extractor(
        made.model,
        made.hooks,
        made.selector,
        answer=made.answer,
        max_new_tokens=made.max_new_tokens,
        max_positions=made.max_positions,
    )
    trainer = quiet_trainer(**{"accelerator": "cpu", "devices": 1, **made.trainer})
    store = extract(extractor, made.data, path, resume=made.resume, on_error=made.on_error, trainer=trainer)
    return store.where(**made.where)


def called(made: Any, store: ActivationStore) -> str:
    """The model's name in tables and plots."""
    if made.name is not None:
        return str(made.name)
    if made.model is not None:
        return str(made.model.name)
    told = store.made_by
    name = Path(str(told.get("model") or store.path)).name
    adapter = told.get("adapter")
    name += "" if not adapter else f" + {adapter if isinstance(adapter, str) else ', '.join(adapter)}"
    return name if told.get("random_weights") is None else f"{name}, random weights"


class _Held:
    """Something that Lightning shall not look into for tensors to move; it refuses frozen dataclasses."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Everywhere(lightning.LightningModule):
    """Something that every process of a trainer does once."""

    def __init__(self, what: Callable[[torch.device], Any]) -> None:
        super().__init__()
        self.what = what

    def predict_dataloader(self) -> DataLoader:
        """One item, so that there is one step."""
        return DataLoader([0])  # type: ignore[arg-type]

    def predict_step(self, _: Any) -> _Held:
        """What it gives back, wrapped."""
        return _Held(self.what(self.device))


def everywhere(trainer_options: Mapping[str, Any], what: Callable[[torch.device], T]) -> T:
    """Do it in every process that Lightning starts, on its device; sums may be exchanged there (`Processes`).

    Args:
        trainer_options: Of `lightning.Trainer`; one process on the CPU unless told otherwise.
        what: Takes the device.

    Returns:
        What it gave back in this process.
    """
    trainer = quiet_trainer(**{"accelerator": "cpu", "devices": 1, **trainer_options})
    found: Any = trainer.predict(_Everywhere(what))
    made: T = found[0].value
    return made


def by_modality(
    layers: Layers, modalities: Sequence[str], analyse: Callable[[Layers, str], None], notes: list[str]
) -> None:
    """Run an analysis on the rows of each modality; one without rows is noted, not an error.

    Args:
        layers: All rows.
        modalities: `all`, `text`, `image`, ...
        analyse: Takes the rows and the modality's name.
        notes: Where it is noted.

    Raises:
        BadInputError: If no modality has rows.
    """
    there = {"all", *layers.store.rows.column("modality").to_pylist()}
    lost = [modality for modality in modalities if modality not in there]
    notes += [f"there are no rows of modality {modality}" for modality in lost]
    if len(lost) == len(modalities) or not len(layers):
        raise BadInputError(
            f"the store {str(layers.store.path)!r} has no rows of {', '.join(modalities)}; extract others, or loosen "
            "--where"
        )
    for modality in modalities:
        if modality in there:
            analyse(layers.of(modality), modality)


def finish(result: Result, folder: Path) -> None:
    """Write a result and print its table, in the first process."""
    if not Processes().rank:
        result.write(folder)
        print(result.table())
        print(f"written to {str(folder)!r}")
