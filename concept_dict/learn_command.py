"""Concept dictionaries of an activation store: any method, several k and seeds, any number of processes.

    hooked-mm learn --store runs/coco --hook blocks.31.hook_resid_post --method NonNegativeDictionary \\
        --k '[20, 50, 100]' --seeds '[0, 1, 2]' --output runs/concepts --trainer.accelerator gpu --trainer.devices 8

Everything can stand in a YAML file (`-c learn.yaml`; `--print_config` writes one). Dictionaries that are in the output
folder already are left as they are, so a run that was cut off goes on by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import ArgumentParser

import concept_dict.dictionary  # noqa: F401  (methods are offered by name)
from concept_dict.decomposition import Decomposition
from concept_dict.learning import learn, table
from concept_dict.row_choice import described, selectors_of
from hooked_mm.extract_command import PLAIN, instantiated
from hooked_mm.extraction_job import quiet
from hooked_mm.store import ActivationStore


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(prog="hooked-mm learn", description=(__doc__ or "").split("\n")[0], default_env=False)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_argument("--store", type=Path, required=True, help="the activation store's folder")
    parser.add_argument("--hook", type=str, required=True, help="which of its activations")
    parser.add_argument("--where", type=dict[str, Any], default={}, help="conditions on rows: {word: [red, blue]}")
    parser.add_subclass_arguments(
        Decomposition, "method", skip={"n_components", "random_state"}, default="NonNegativeDictionary"
    )
    parser.add_argument("--k", type=list[int] | None, help="numbers of concepts; 20, or as many as the start has")
    parser.add_argument("--seeds", type=list[int], default=[0], help="seeds, for methods that start by chance")
    parser.add_argument("--start", type=Path | None, help="the folder of a dictionary from whose concepts to start")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the dictionaries")
    parser.add_class_arguments(lightning.Trainer, "trainer", skip={"logger", "callbacks", "max_epochs"})
    parser.set_defaults({"trainer.devices": 1, **{f"trainer.{name}": False for name in PLAIN}})
    parser.set_defaults({"trainer.log_every_n_steps": 1})
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm learn`."""
    quiet()
    made = instantiated(build_parser(), argv)
    store = ActivationStore.open(made.store)
    chosen = store.where(**made.where)
    if made.trainer.is_global_zero and len(selectors_of(chosen)) > 1:
        print(f"rows: {described(made.where, chosen)}; one selector's alone are --where '{{selector: NAME}}'")
    made.trainer.fit_loop.max_epochs = -1
    options = {name: made[name] for name in ("k", "seeds", "where", "start", "trainer")}
    learnt = learn(store, made.hook, made.method, made.output, **options)
    if made.trainer.is_global_zero:
        print(table(learnt) if learnt else f"all of these dictionaries are in {str(made.output)!r} already")
