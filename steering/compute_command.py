"""Steering vectors of an activation store: from the rows of one answer to those of another, of any kind, with controls.

    hooked-mm steer compute --store runs/questions --hook 'blocks.3.hook_resid_post' --kind '[coarse, probe]' \\
        --source '{answer: red}' --target '{answer: blue}' --where '{question_type: colour}' --output runs/vectors

Everything can stand in a YAML file (`-c compute.yaml`; `--print_config` writes one). A source may be `all` rows or as
many `random` ones as the target has. Every vector is kept with the controls that its effect is to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from concept_dict.dictionary import ConceptDictionary
from hooked_mm.errors import BadInputError
from hooked_mm.extract_command import instantiated
from hooked_mm.run_output import output_folder
from hooked_mm.runner import match_names
from hooked_mm.steering_vector import FILE, SteeringVector, save_vectors
from hooked_mm.store import ActivationStore
from steering.controls import is_control
from steering.directions import KINDS, Kind
from steering.vectors_of_store import Recipe, gates_of_store, kept_shifts, vectors_of_store

Rows = dict[str, Any] | Literal["all", "random"]
COSINES = 12
"""How many vectors at one hook are compared with each other in full."""


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(prog="hooked-mm steer compute", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-c", "--config", action="config", help="a YAML file with any of these options")
    parser.add_argument("--store", type=Path, required=True, help="the activation store's folder")
    parser.add_argument("--hook", type=str | list[str], default="*", help="which of its activations; globs, all")
    kinds = "; ".join(f"{name}: {does}" for name, (_, does) in KINDS.items())
    parser.add_argument("--kind", type=Kind | list[Kind], default="coarse", help=f"one or several. {kinds}")
    parser.add_argument("--source", type=Rows, default="all", help="what to lead from: {answer: red}, all or random")
    parser.add_argument("--target", type=Rows | None, help="what to lead to: {answer: blue}")
    parser.add_argument("--where", type=dict[str, Any], default={}, help="conditions on both: {question_type: colour}")
    parser.add_argument(
        "--gate", type=dict[str, Any] | None, help="also learn gates that open for such rows only: {answer: red}"
    )
    parser.add_argument("--leak", type=float, default=0.005, help="share of all other rows that may pass a gate")
    parser.add_argument("--k", type=int, default=5, help="concepts to learn of each set, without a dictionary")
    parser.add_argument("--dictionary", type=str | None, help="whose concepts to use: a folder or hub name")
    parser.add_argument("--concepts", type=list[int] | None, help="which concepts, for the kind concept; all")
    parser.add_argument("--pair_by", type=str | None, help="column that pairs rows, for the kind principal; by chance")
    parser.add_argument("--shifts", type=Path | None, help="a study that hooked-mm shift kept, for the kind shift")
    parser.add_argument("--controls", type=list[int], default=[0], help="seeds of controls; [] for none")
    parser.add_argument("--orthogonal", action="store_true", help="random controls at right angles to their vectors")
    parser.add_argument("--seed", type=int, default=0, help="of random sets, k-means and pairs")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the vectors")
    return parser


def table(vectors: Sequence[SteeringVector]) -> str:
    """Vectors with norm and rows, and per hook the cosines between them, numbered as they stand."""
    lines = [("", "name", "kind", "hook", "norm", "rows")]
    for number, vector in enumerate(vectors):
        lines.append((str(number), vector.name, vector.kind, vector.hook, f"{vector.norm:.4g}", _rows(vector)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    pushes = [(number, vector) for number, vector in enumerate(vectors) if vector.kind != "gate"]
    for hook in dict.fromkeys(vector.hook for _, vector in pushes):
        told += ["", *_cosines(hook, [(number, vector) for number, vector in pushes if vector.hook == hook])]
    return "\n".join(told)


def _rows(vector: SteeringVector) -> str:
    """How many rows of source and target it is made of, as far as it tells."""
    about = vector.made_from
    pair = about.get("pair_rows") or [about["pairs"]] * 2 if "pairs" in about or "pair_rows" in about else None
    if pair is not None:
        return " -> ".join(map(str, pair))
    sets = [about.get(name) for name in ("source", "target")]
    counts = [str(found["rows"]) for found in sets if isinstance(found, dict)]
    if vector.kind == "gate":
        return "{} | {}".format(*about["rows"])
    return " -> ".join(counts) if counts else str(about.get("rows", ""))


def _cosines(hook: str, vectors: Sequence[tuple[int, SteeringVector]]) -> list[str]:
    """A matrix, or, of many vectors, the range of those that are no controls."""
    units = torch.nn.functional.normalize(torch.stack([vector.values for _, vector in vectors]).double(), dim=1)
    cosines = units @ units.T
    if len(vectors) <= COSINES:
        lines = [f"cosines at {hook}", "     " + "".join(f"{n:>7}" for n, _ in vectors)]
        return lines + [
            f"{n:>5}" + "".join(f"{value:>7.2f}" for value in row)
            for (n, _), row in zip(vectors, cosines.tolist(), strict=True)
        ]
    true = torch.tensor([not is_control(vector) for _, vector in vectors])
    upper = cosines[true][:, true]
    between = upper[torch.triu(torch.ones_like(upper, dtype=torch.bool), 1)]
    if not len(between):
        return [f"cosines at {hook}: a single vector with {len(vectors) - 1} controls"]
    return [f"cosines at {hook}: {between.min():.2f} to {between.max():.2f} between {int(true.sum())} vectors"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `hooked-mm steer compute`."""
    made = instantiated(build_parser(), argv)
    if (made.output / f"{FILE}.json").exists():
        raise BadInputError(f"{str(made.output)!r} already holds steering vectors; choose another folder")
    kinds = list(dict.fromkeys([made.kind] if isinstance(made.kind, str) else made.kind))
    if ("shift" in kinds) != (made.shifts is not None):
        raise BadInputError("the kind 'shift' and --shifts, a study that hooked-mm shift has kept, are given together")
    store = ActivationStore.open(made.store)
    dictionary = None if made.dictionary is None else ConceptDictionary.from_pretrained(made.dictionary)
    recipe = Recipe(made.k, dictionary, made.concepts, made.pair_by, made.controls, made.orthogonal, made.seed)
    found: list[SteeringVector] = []
    own = [kind for kind in kinds if kind != "shift"]
    if own or not kinds:
        hooks = match_names(made.hook, store.hooks)
        found += vectors_of_store(store, hooks, own, made.source, made.target, made.where, recipe)
    if made.shifts is not None:
        found += kept_shifts(made.shifts, store, recipe)
    if made.gate is not None:
        found += gates_of_store(store, match_names(made.hook, store.hooks), made.gate, leak=made.leak)
    save_vectors(found, output_folder(made.output))
    print(table(found))
    alone = sum("no_shuffled" in vector.made_from and not is_control(vector) for vector in found)
    if alone:
        print(f"\n{alone} vectors from or to a concept of a single row have no shuffled control")
    for gate in (vector for vector in found if vector.kind == "gate"):
        inside, outside = gate.made_from["opens"]
        print(
            f"{gate.name} at {gate.hook}: of the rows it was learnt from, opens for {inside:.1%} of its own and "
            f"{outside:.2%} of all others"
        )
    print(f"\n{made.output}")
