"""Steering vectors of a store's rows: of every kind, at any hooks, with controls and where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from concept_dict.decomposition import Decomposition
from concept_dict.dictionary import ConceptDictionary
from concept_dict.kmeans import KMeans
from concept_dict.run_table import method_settings
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.steering_vector import SteeringVector, last_part, load_vectors
from hooked_mm.store import ActivationStore
from steering.controls import controls_of
from steering.directions import KINDS, Make, coarse, concept, concept_points, fine, principal, probe
from steering.gate import learn_gate
from steering.row_sets import RowSet, Where, part_of, partners, readable, row_sets

OF_LABELS: dict[str, Make] = {"coarse": coarse, "probe": probe}
OF_CONCEPTS = ("fine", "concept")
OF_TWO_SETS = ("coarse", "probe", "principal")


@dataclass(frozen=True)
class Recipe:
    """How vectors are made of rows.

    Attributes:
        k: How many concepts to learn, where no dictionary is given; as many as there are rows, if these are fewer.
        dictionary: Whose concepts to use.
        concepts: Which concepts `concept` is of; all unless given.
        pair_by: The column by which `principal` pairs source and target rows; by chance unless given.
        controls: Seeds of controls; none without seeds.
        orthogonal: Whether random controls are at right angles to their vectors.
        seed: Of random sets, k-means and pairs.
    """

    k: int = 5
    dictionary: ConceptDictionary | None = None
    concepts: Sequence[int] | None = None
    pair_by: str | None = None
    controls: Sequence[int] = (0,)
    orthogonal: bool = False
    seed: int = 0


@dataclass(frozen=True)
class _Made:
    """A direction before it gets its provenance; with rows and recipe where there are labels to shuffle."""

    values: Float[Tensor, " d"]
    name: str
    about: Mapping[str, Any]
    source: Tensor | None = None
    target: Tensor | None = None
    make: Make | None = None


def vectors_of_store(
    store: ActivationStore,
    hooks: Sequence[str],
    kinds: Sequence[str],
    source: Where = "all",
    target: Where | None = None,
    where: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
) -> list[SteeringVector]:
    """Vectors of several kinds from one set of rows to another, each followed by its controls.

    Args:
        store: Of the rows.
        hooks: Which of its activations.
        kinds: Of `KINDS`, `"shift"` aside (see `kept_shifts`).
        source: What to lead from: conditions (`{"answer": "red"}`), `"all"`, or `"random"`, as many as the target has.
        target: What to lead to, in the same way; `fine` and `concept` do without.
        where: Conditions on both.
        recipe: Everything else.

    Returns:
        Hook by hook and kind by kind. `concept` uses no labels, so that it has random controls alone; a fine-grained
        vector from or to a single row has too, and says so in `made_from["no_shuffled"]`.

    Raises:
        BadInputError: If there are no such rows or kinds, a kind needs a target, or a dictionary is of another hook or
            model.
        UnknownHookError: If the store does not hold a hook.
    """
    recipe = recipe or Recipe()
    check_kinds(kinds, target)
    check_dictionary(recipe.dictionary, store, hooks, kinds)
    part = store if not where else part_of(store, where)
    first, second = row_sets(part, source, target, recipe.seed)
    about = _about(part, first, second, where, recipe)
    found = []
    for hook in hooks:
        rows = first.activations(hook)
        others = None if second is None else second.activations(hook)
        size = float(rows.double().norm(dim=1).mean())
        for kind in kinds:
            for made in _make(kind, first, second, rows, others, recipe):
                told = {**about, "rows_norm": size, **made.about}
                vector = SteeringVector(made.values, hook, kind, made.name, made_from=told, **_owner(part))
                controls = controls_of(vector, made.source, made.target, made.make, recipe.controls, recipe.orthogonal)
                found += [vector, *controls]
    return found


def gates_of_store(
    store: ActivationStore,
    hooks: Sequence[str],
    inside: Mapping[str, Any],
    name: str | None = None,
    leak: float = 0.005,
) -> list[SteeringVector]:
    """Per hook a gate that opens for rows which meet conditions, learnt against all other rows of the store.

    Args:
        store: Of rows of one selector, the last prompt position.
        hooks: Where to look.
        inside: Conditions: `{"text": "red", "question_type": "colour"}`.
        name: For people; the conditions unless given.
        leak: Share of the other rows that may pass.

    Raises:
        BadInputError: If the store has rows of other positions, or too few meet the conditions, or too few do not.
    """
    part = part_of(store, inside)
    about = _owner(store)
    told = [rule.get("selector") for rule in (about["positions"] or {}).values()]
    if told and told != ["LastPrompt"]:
        raise BadInputError(
            f"the store has rows of {', '.join(map(str, told))}, but a gate judges the last prompt position; extract "
            "with the selector LastPrompt"
        )
    rows = store.rows.select(("shard", "row")).to_pylist()
    own = {(row["shard"], row["row"]) for row in part.rows.select(("shard", "row")).to_pylist()}
    opens = torch.tensor([(row["shard"], row["row"]) in own for row in rows], dtype=torch.bool)
    called = name or ", ".join(str(value) for value in readable(store, inside).values())
    made_from = {"store": str(store.path), "inside": dict(inside), "versions": {"hooked-mm": version("hooked-mm")}}
    found = []
    for hook in hooks:
        values = store.activations(hook).float()
        gate = learn_gate(values[opens], values[~opens], hook, f"gate of {called}", leak=leak, made_from=made_from)
        found.append(replace(gate.vector(), **about))
    return found


def kept_shifts(
    folder: str | Path, store: ActivationStore | None = None, recipe: Recipe | None = None
) -> list[SteeringVector]:
    """The shift vectors that `hooked-mm shift` has kept, as they are, each followed by its random controls.

    Args:
        folder: Of a study, such as `runs/shift/KMeans-k20`, or of its vectors.
        store: Of the model that they are to be used beside; another one's are refused.
        recipe: Its `controls` and `orthogonal` are used.

    Raises:
        BadInputError: If the folder holds no shift vectors, or those of another model.
    """
    recipe = recipe or Recipe()
    inner = Path(folder) / "vectors"
    shifts = [vector for vector in load_vectors(inner if inner.is_dir() else folder) if vector.kind == "shift"]
    if not shifts:
        raise BadInputError(f"{str(folder)!r} holds no shift vectors; give a study of `hooked-mm shift`")
    if store is not None:
        for vector in shifts:
            _check_owner(f"the shift vectors in {str(folder)!r}", vector.model, store)
    return [
        one
        for vector in shifts
        for one in (vector, *controls_of(vector, seeds=recipe.controls, orthogonal=recipe.orthogonal))
    ]


def check_kinds(kinds: Sequence[str], target: Where | None) -> None:
    """Refuse kinds that there are not, or that need a target, before rows are read."""
    if not kinds:
        raise BadInputError(f"no kinds; give one or several of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS or kind == "shift":
            raise unknown("kind of vectors of rows", kind, [name for name in KINDS if name != "shift"])
        if kind in OF_TWO_SETS and target is None:
            raise BadInputError(f"{kind!r} leads from source to target rows; give a target, such as {{answer: blue}}")


def check_dictionary(
    dictionary: ConceptDictionary | None, store: ActivationStore, hooks: Sequence[str], kinds: Sequence[str]
) -> None:
    """Refuse a dictionary of other activations."""
    if dictionary is None or not {*kinds} & {*OF_CONCEPTS}:
        return
    if {*hooks} != {dictionary.hook}:
        raise BadInputError(
            f"the dictionary has concepts of {dictionary.hook!r}, but vectors are asked for at {', '.join(hooks)}; "
            "give its own hook alone"
        )
    _check_owner("the dictionary", dictionary.made_by.get("model"), store)


def _check_owner(what: str, model: str | None, store: ActivationStore) -> None:
    own = store.made_by.get("model")
    if model and own and last_part(str(model)) != last_part(str(own)):
        raise BadInputError(f"{what} is of the model {model!r}, the store of {own!r}; give those of one model")


def _make(
    kind: str, first: RowSet, second: RowSet | None, rows: Tensor, others: Tensor | None, recipe: Recipe
) -> Iterator[_Made]:
    name = first.name if second is None else f"{first.name} -> {second.name}"
    if kind == "concept":
        yield from _concepts(rows, recipe)
    elif kind == "fine":
        yield from _fine(name, rows, others, recipe)
    elif second is not None and others is not None:
        about: dict[str, Any] = {}
        make = OF_LABELS.get(kind, aligned)
        if kind == "principal":
            own, theirs = partners(first, second, recipe.pair_by, recipe.seed)
            rows, others = rows[own], others[theirs]
            about = {"pairs": len(own), "pair_by": recipe.pair_by}
        yield _Made(make(rows, others), name, about, rows, others, make)


def aligned(source: Float[Tensor, "n d"], target: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """The first principal component of target minus source, row by row as far as both go."""
    few = min(len(source), len(target))
    return principal(target[:few] - source[:few])


def _dictionary(rows: Tensor, recipe: Recipe) -> Decomposition:
    if recipe.dictionary is not None:
        return recipe.dictionary.decomposition
    if recipe.k < 1:
        raise BadInputError(f"k={recipe.k}; at least one concept must be learnt")
    return KMeans(min(recipe.k, len(rows)), random_state=recipe.seed).fit(rows.float())


def _concepts(rows: Tensor, recipe: Recipe) -> Iterator[_Made]:
    fitted = _dictionary(rows, recipe)
    wanted = range(len(fitted.components_)) if recipe.concepts is None else recipe.concepts
    for number in wanted:
        about = {"concept": number, "concepts": len(fitted.components_), "dictionary": method_settings(fitted)}
        yield _Made(concept(fitted.components_, number), f"concept {number}", about)


def _fine(name: str, rows: Tensor, others: Tensor | None, recipe: Recipe) -> Iterator[_Made]:
    """All pairs; the shuffled control of a pair mixes the rows of its two concepts, since v_{i->j} is the difference of
    their means. Fits to shuffled rows would find the same clusters again."""
    fitted = _dictionary(rows, recipe)
    start = concept_points(rows, fitted)
    if others is None:
        end, theirs, vectors = start, fitted, fine(start.values)
        others = rows
    else:
        theirs = _dictionary(others, recipe)
        end = concept_points(others, theirs)
        vectors = fine(start.values, end.values)
    for values, (one, other) in zip(*vectors, strict=True):
        i, j = int(start.numbers[one]), int(end.numbers[other])
        own, to = rows[start.main == i], others[end.main == j]
        about = {
            "pair": [i, j],
            "pair_rows": [len(own), len(to)],
            "dictionary": method_settings(fitted),
            "target_dictionary": method_settings(theirs),
        }
        if min(len(own), len(to)) < 2:
            yield _Made(values, f"{name}: {i} -> {j}", {**about, "no_shuffled": "a concept has a single row"})
        else:
            yield _Made(values, f"{name}: {i} -> {j}", about, own, to, coarse)


def _owner(store: ActivationStore) -> dict[str, Any]:
    """Model and positions of a store's rows, as a vector has them."""
    made = store.made_by
    chosen = set(store.rows.column("selector").unique().to_pylist())
    positions = {name: rule for name, rule in (made.get("selectors") or {}).items() if name in chosen}
    return {"positions": positions or None, **{part: made.get(part) for part in ("model", "revision", "adapter")}}


def _about(
    store: ActivationStore, first: RowSet, second: RowSet | None, where: Mapping[str, Any] | None, recipe: Recipe
) -> dict[str, Any]:
    """What all vectors of a run have in common."""
    return {
        "store": str(store.path),
        "data": store.made_by.get("data"),
        "where": dict(where or {}),
        "source": first.describe(),
        "target": None if second is None else second.describe(),
        "in_both": 0 if second is None else len(first.places() & second.places()),
        "seed": recipe.seed,
        "versions": {name: version(name) for name in ("hooked-mm", "torch", "scikit-learn")},
        "store_versions": store.made_by.get("versions"),
    }
